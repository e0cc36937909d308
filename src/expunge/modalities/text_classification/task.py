"""Text classification: one label out of C per text; nll is the cross-entropy. For any `AutoModelForSequenceClassification` of transformers.

    model, tokenizer = load("folder")                                                       # checkpoints.load, or transformers' own from_pretrained
    train, test = records(tokenizer, train_rows, test_rows, names=model.config.label2id)    # texts.records; rows {"text": ..., "label": ...}
    gone, kept = train.take([3, 14]), train.take([k for k in range(len(train)) if k not in (3, 14)])
    verdict = expunge.forget(model, text_classification(tokenizer), expunge.Split(gone, kept, test))

Texts are padded on the right, and a batch is cut to its longest one. Under function transforms (per-example gradients) the mask is given as the model's
attention reads it, (B, 1, T, T), since transformers looks at the values of a mask (B, T), which a vectorised forward has not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.guard import quiet
from expunge.core.session import Bound
from expunge.core.types import Batch, Out, Split, Task, device_of, each, float_of
from expunge.modalities.classification.task import head
from expunge.modalities.examples import Examples
from expunge.modalities.text_classification.texts import NAMES, records


def text_classification(tokenizer: Any = None) -> Task:
    """The task of models of transformers that give (B, C) logits for texts, on `Examples` whose x is {"input_ids" (N, T), "attention_mask" (N, T)}, with
    "token_type_ids" (N, T) for models that read them. `tokenizer` is needed for `sample` alone: texts -> the names of their classes.

    Half-precision logits are scored in float32.
    """
    return Task("text_classification", collate, _forward, features, partial(sample, tokenizer=tokenizer))


def collate(data: Examples, index: Tensor, generator: torch.Generator | None) -> Batch:
    """Rows of in-memory data as a batch, as wide as its longest text; augmented when a generator is given."""
    if not isinstance(data.x, Mapping) or not {*NAMES[:2]} <= data.x.keys() <= {*NAMES}:
        raise SplitError(f"texts are a mapping of {' and '.join(NAMES[:2])}, with {NAMES[2]} where the model reads them, not {data!r}; make them by records()")
    x = each(lambda t: t[index], data.x)
    if data.augment is not None and generator is not None:
        x = data.augment(x, generator)
    longest = int(x["attention_mask"].sum(1).max())
    return {"x": each(lambda t: t[:, :longest], x), "y": data.y[index], "i": index}


def inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model takes of the batch, on its device."""
    inner: Any = model.inner[0] if isinstance(model, Bound) else model
    takes = inspect.signature(inner.forward).parameters
    x = {n: t.to(device_of(model)) for n, t in batch["x"].items() if n in takes}
    if isinstance(model, Bound) and getattr(inner, "_supports_sdpa", False):
        x["attention_mask"] = spread(inner, x["attention_mask"])
    return {**x, **({"use_cache": False} if "use_cache" in takes else {})}


def spread(model: nn.Module, mask: Tensor) -> Tensor:
    """(B, 1, T, T) of a mask (B, T): 0 where a token may see another, the least number of the model's floating type where not; in a causal model none sees
    what stands behind it. Raises ModelError for texts longer than the window of a model with local attention, which such a mask would widen."""
    config: Any = model.config
    tokens, window = mask.shape[1], getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    if window and tokens > window:
        raise ModelError(f"per-example gradients of texts of {tokens} tokens are wrong where attention is local ({window} tokens); set max_length to {window}")
    seen = mask[:, None, None, :].bool().expand(-1, 1, tokens, tokens)
    if causal(model):
        seen = seen & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    floating = float_of(model)
    return torch.where(seen, torch.zeros((), dtype=floating, device=mask.device), torch.finfo(floating).min)


def causal(model: nn.Module) -> bool:
    """Whether a token sees none of those behind it."""
    return any(getattr(m, "is_causal", False) is True for m in model.modules())


def _plainly(model: nn.Module) -> contextlib.AbstractContextManager:
    """Attention by its formula under function transforms, which have no rule for the fused kernels of CPUs; as the model has it else."""
    return sdpa_kernel(SDPBackend.MATH) if isinstance(model, Bound) else contextlib.nullcontext()


def _forward(model: nn.Module, batch: Batch) -> Out:
    with _plainly(model):
        logits = model(**inputs(model, batch)).logits
    labels = batch["y"].to(logits.device)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    nll = F.cross_entropy(wide, labels, reduction="none")
    return Out(nll=nll, count=torch.ones_like(nll), logits=wide, labels=labels)


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, D) pooled state that enters the last linear layer, or the output of the named module. Where that has a state for each token, as the `score` of GPT-2
    and Llama, that of the last real one."""
    caught: list[Tensor] = []
    module = dict(model.named_modules()).get(layer) if layer else head(model)[1]
    if module is None:
        raise ModelError(f"the model has no module '{layer}'")

    def catch(_, args, out):
        caught.append((out[0] if isinstance(out, tuple) else out) if layer else args[0])

    handle = module.register_forward_hook(catch)
    try:
        model(**inputs(model, batch))
    finally:
        handle.remove()
    found, mask = caught[0], batch["x"]["attention_mask"]
    if found.ndim == 3 and found.shape[1] == mask.shape[1]:
        found = found[torch.arange(len(found)), (mask.sum(1) - 1).to(found.device)]
    return found.flatten(1)


def sample(model: nn.Module, texts: Sequence[str], *, tokenizer: Any = None, max_length: int = 128) -> list[str]:
    """The names of the classes that the model gives the texts. Raises SettingError without a tokenizer."""
    if tokenizer is None:
        raise SettingError("to class texts the task needs a tokenizer: text_classification(tokenizer)")
    (data,) = records(tokenizer, [{"text": t, "label": 0} for t in texts], max_length=max_length)
    with quiet(model):
        found = _forward(model, collate(data, torch.arange(len(data)), None)).logits.argmax(1)
    config: Any = model.config
    return [config.id2label[k] for k in found.tolist()]


def preflight(model: nn.Module, task: Task, split: Split) -> None:
    """Raises SplitError for texts or labels that the model cannot take."""
    widths = {}
    for name, part in split.parts().items():
        first = task.batches(part, 2)[0]  # says so where the part holds no texts
        _right(name, part)
        widths[name] = part.x["input_ids"].shape[1]
        longest = part.x["attention_mask"].sum(1).topk(min(2, len(part))).indices
        batch = task.collate(part, longest, None) if len(longest) > 1 else first
        try:
            classes = task.forward(model, {**batch, "y": torch.zeros(len(batch["i"]), dtype=torch.long)}).logits.shape[-1]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            shape = tuple(batch["x"]["input_ids"].shape)
            raise SplitError(f"the model cannot take {name}'s texts {shape}: {_why(error)}") from None
        _labels(name, part, classes)
    if len({*widths.values()}) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise SplitError(f"parts are padded to different widths ({found}): make them by one call of records(), else equal texts look different")


def fits(model: nn.Module, split: Split, which: str) -> None:
    """Raises SplitError for another model, named by `which`, whose classes or vocabulary are too few for the texts."""
    config: Any = model.config
    rows = model.get_input_embeddings().num_embeddings  # pyright: ignore[reportCallIssue]
    for name, part in split.parts().items():
        most = int(part.x["input_ids"].max())
        if most >= rows:
            raise SplitError(f"{which} knows {rows} tokens, and {name} holds token {most}: it is not of the same kind as the model")
        if int(part.y.max()) >= config.num_labels:
            raise SplitError(f"{which} has {config.num_labels} classes, and {name} holds class {int(part.y.max())}: it is not of the same kind as the model")


def _right(name: str, part: Examples) -> None:
    mask = part.x["attention_mask"]
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise SplitError(f"texts of {name} are padded on the left or have holes; pad them on the right, as records() does")
    if bool((mask[:, 0] == 0).any()):
        raise SplitError(f"text {int((mask[:, 0] == 0).nonzero()[0])} of {name} holds no token")


def _labels(name: str, part: Examples, classes: int) -> None:
    if part.y.ndim == 1 and not part.y.is_floating_point() and int(part.y.min()) >= 0 and int(part.y.max()) < classes:
        return
    kind = "several per text, " if part.y.ndim > 1 else "real-valued targets, " if part.y.is_floating_point() else ""
    found = f"{kind}{part.y.min().item():g} to {part.y.max().item():g}"
    raise SplitError(f"{name} has labels {found}; the model has {classes} classes, so there must be one whole number in 0..{classes - 1} per text")


def _why(error: Exception) -> str:
    if "padding token" in str(error):
        return "its configuration has no pad_token_id, which it needs to find the last token of a text; set model.config.pad_token_id"
    return str(error).splitlines()[0]
