"""Multi-label classification: K yes-or-no answers per example; nll is the sum over them of the binary cross-entropy.

data = expunge.Examples(x, y.float(), torch.arange(len(x)))           # y (N, K) of 0 and 1
gone, kept = data.take([3, 14]), data.take([k for k in range(len(data)) if k not in (3, 14)])
verdict = expunge.forget(model, multilabel(), expunge.Split(gone, kept, test))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expunge.core.errors import ModelError, SplitError
from expunge.core.modality import Level
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.classification.task import answers, collate, features, inputs
from expunge.modalities.examples import Examples


def multilabel() -> Task:
    """The task of models that map (B, ...) inputs to (B, K) logits, one per label, on targets (B, K) of 0 and 1.

    Out: count K, pred (B, K) probabilities, target (B, K). Probabilities are float64 and the loss is made of them: that of a label is right to 1e-6 up to 23,
    and at most 36.7, where its gradient ends.

    >>> task = multilabel()
    >>> out = task.forward(nn.Identity(), {"x": torch.tensor([[2.0, 0.0]]), "y": torch.tensor([[0.0, 1.0]]), "i": torch.arange(1)})
    >>> round(float(out.nll), 4), out.pred.round(decimals=4).tolist()
    (2.8201, [[0.8808, 0.5]])
    """
    return Task("multilabel", collate, _forward, features)


def _forward(model: nn.Module, batch: Batch) -> Out:
    logits = answers(model(inputs(model, batch)))
    target = batch["y"].to(logits.device)
    if logits.shape != target.shape:
        raise ModelError(f"the model gives {tuple(logits.shape)} answers for targets {tuple(target.shape)}; there must be one per label")
    pred = logits.double().sigmoid()
    right = torch.where(target > 0.5, pred, 1 - pred).clamp(min=torch.finfo(torch.float64).eps / 2)
    nll = -right.log().sum(1).to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return Out(nll=nll, count=torch.full_like(nll, target.shape[1]), pred=pred, target=target.to(pred))


def preflight(model: nn.Module, task: Task, split: Split) -> None:
    """Raises SplitError for inputs or targets that the model cannot take."""
    first = task.batches(split.forget, 2)[0]
    try:
        shape = tuple(answers(model(inputs(model, first))).shape)
    except (RuntimeError, IndexError) as error:
        raise SplitError(f"the model cannot take the forget set's inputs {tuple(first['x'].shape[1:])}: {str(error).splitlines()[0]}") from None
    if len(shape) != 2:
        raise SplitError(f"the model gives answers of shape {shape[1:]} per record; it must give K logits, one per label")
    for name, part in split.parts().items():
        labelled(name, part, shape[1])


def labelled(name: str, part: Examples, outputs: int) -> None:
    """Raises SplitError unless the targets are (N, K) floats of 0 and 1, K the model's outputs."""
    y = part.y
    if y.ndim != 2 or y.shape[1] != outputs:
        raise SplitError(f"{name} has targets of shape {tuple(y.shape)}; the model has {outputs} outputs, so they must be ({len(y)}, {outputs})")
    if not y.is_floating_point() or not bool(((y == 0) | (y == 1)).all()):
        kind = str(y.dtype).removeprefix("torch.")
        raise SplitError(f"{name} has {kind} targets from {y.min().item():g} to {y.max().item():g}; they must be floating-point 0 and 1 (y.float())")


def fits(model: nn.Module, split: Split, which: str) -> None:
    """Raises SplitError for another model, named by `which`, that gives other answers."""
    try:
        with torch.no_grad():
            shape = tuple(answers(model(inputs(model, collate(split.forget, torch.arange(1), None)))).shape)
    except (RuntimeError, IndexError) as error:
        raise SplitError(f"{which} cannot take the inputs: {str(error).splitlines()[0]}") from None
    if shape != (1, split.forget.y.shape[1]):
        raise SplitError(f"{which} gives answers of shape {shape[1:]} per record, the targets are {tuple(split.forget.y.shape[1:])}")


def level(p: Any, model: nn.Module, part: str) -> Level:
    """Share of right answers over all labels, beside that of the commoner answer to each."""
    s = p.seen(model, part)
    yes = s.target > 0.5
    share = yes.float().mean(0)
    right = float(((s.pred > 0.5) == yes).float().mean())
    chance = float(torch.maximum(share, 1 - share).mean())
    return Level("share of right answers", right, chance, 1.0 if chance == 1 else (right - chance) / (1 - chance), len(yes))
