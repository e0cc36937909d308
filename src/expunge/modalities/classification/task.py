"""Classification: one label out of C per example; nll is the cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ModelError, SplitError
from expunge.core.types import Batch, Out, Split, Task, device_of, float_of
from expunge.modalities.examples import Examples


def classification() -> Task:
    """The task of models that map (B, ...) inputs to (B, C) logits.

    4-D inputs are laid out channels-last, which makes convolutions on a CPU about a quarter faster.

    >>> task = classification()
    >>> out = task.forward(nn.Identity(), {"x": torch.tensor([[2.0, 0.0]]), "y": torch.tensor([1]), "i": torch.tensor([0])})
    >>> round(float(out.nll), 4)
    2.1269
    """
    return Task("classification", collate, _forward, features)


def collate(data: Examples, index: Tensor, generator: torch.Generator | None) -> Batch:
    """Rows of in-memory data as a batch; augmented when a generator is given."""
    x = data.x[index]
    if data.augment is not None and generator is not None:
        x = data.augment(x, generator)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return {"x": x, "y": data.y[index], "i": index}


def inputs(model: nn.Module, batch: Batch) -> Tensor:
    """The batch's inputs on the model's device; floating inputs in its floating type."""
    x = batch["x"]
    return x.to(device_of(model), float_of(model) if x.is_floating_point() else x.dtype)


def answers(given: Any) -> Tensor:
    """The tensor of a model's answers: itself, `logits` of what transformers gives or of a mapping, or the first of a tuple.

    >>> answers((torch.zeros(1, 2),)).shape, answers({"logits": torch.zeros(1, 3)}).shape
    (torch.Size([1, 2]), torch.Size([1, 3]))
    """
    if isinstance(given, Tensor):
        return given
    found = given.get("logits") if isinstance(given, Mapping) else getattr(given, "logits", None)
    if found is None and isinstance(given, (tuple, list)) and given:
        found = given[0]
    if not isinstance(found, Tensor):
        raise ModelError(f"the model answers with {type(given).__name__}, in which there are no logits")
    return found


def _forward(model: nn.Module, batch: Batch) -> Out:
    logits = answers(model(inputs(model, batch)))
    labels = batch["y"].to(logits.device)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    nll = F.cross_entropy(wide, labels, reduction="none")
    return Out(nll=nll, count=torch.ones_like(nll), logits=wide, labels=labels)


def head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer, in order of registration. Raises ModelError if there is none."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise ModelError("the model has no nn.Linear layer to take features from; name a layer")
    return found[-1]


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, D) output of the named module, flattened; the input of the last linear layer when `layer` is ""."""
    caught: list[Tensor] = []
    module = dict(model.named_modules()).get(layer) if layer else head(model)[1]
    if module is None:
        raise ModelError(f"the model has no module '{layer}'")

    def catch(_, args, out):
        caught.append(out if layer else args[0])

    handle = module.register_forward_hook(catch)
    try:
        model(inputs(model, batch))
    finally:
        handle.remove()
    return caught[0].flatten(1)


def preflight(model: nn.Module, task: Task, split: Split) -> None:
    """Raises SplitError for inputs or labels that the model cannot take."""
    first = task.batches(split.forget, 2)[0]
    try:
        classes = task.forward(model, {**first, "y": torch.zeros_like(first["y"])}).logits.shape[-1]
    except (RuntimeError, IndexError) as error:
        raise SplitError(f"the model cannot take the forget set's inputs {tuple(first['x'].shape[1:])}: {str(error).splitlines()[0]}") from None
    for name, part in split.parts().items():
        if isinstance(part, Examples) and (part.y.is_floating_point() or int(part.y.min()) < 0 or int(part.y.max()) >= classes):
            found = "real-valued targets" if part.y.is_floating_point() else f"labels {int(part.y.min())} to {int(part.y.max())}"
            raise SplitError(f"{name} has {found}; the model has {classes} outputs, so labels must be integers in 0..{classes - 1}")
