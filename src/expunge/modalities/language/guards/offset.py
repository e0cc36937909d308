"""Logits of the model plus w < 0 times those of an assistant that knows what must be forgotten (ULD, card uld).

The assistant is the model's own first `blocks` decoder blocks with its embedding, last norm and head, and low-rank weights that only it uses.
config   blocks, weight (w), share (of the filter), filtered (keep or drop), centred, scale
tensors  LAYER.up and LAYER.down
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook
from expunge.core.errors import PatchError
from expunge.core.hooks import Guarded, bare, root, wrap
from expunge.modalities.language.task import blocks
from expunge.parts.adapters import adapt
from expunge.parts.adapters import check as fits

FILTERED = ("keep", "drop")


@contextlib.contextmanager
def truncated(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """The model with its first `count` decoder blocks alone; all of them again on exit."""
    name = blocks(model)[0][0].rpartition(".")[0]
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    whole: Any = getattr(owner, leaf)
    setattr(owner, leaf, nn.ModuleList(list(whole)[:count]))
    try:
        yield model
    finally:
        setattr(owner, leaf, whole)


def plausible(logits: Tensor, share: float) -> Tensor:
    """(..., V) bool: log p >= min( k-th largest log p, largest + log share ), k = share * V, at least 1. All tokens for share 0."""
    if share <= 0:
        return torch.ones_like(logits, dtype=torch.bool)
    q = logits.log_softmax(-1)
    best = q.topk(max(1, int(share * q.shape[-1])), -1).values
    return q >= torch.minimum(best[..., -1:], best[..., :1] + math.log(share))


def combine(base: Tensor, assist: Tensor, *, weight: float, share: float, filtered: str = "keep", centred: bool = True) -> Tensor:
    """z_base + w z_assist where the base finds a token plausible; elsewhere z_base, lowered by 1e3 for `drop`.

    centred   z_assist is log p_assist + log V, which is 0 for an assistant that knows nothing; else the logits as they come. Without a filter (share 0)
              nothing changes but a constant per token.

    >>> base, assist = torch.tensor([3.0, 2.0, 0.0, -4.0]), torch.tensor([2.0, 0.0, 0.0, 1.0])
    >>> free = combine(base, assist, weight=-0.8, share=0, centred=False)
    >>> free, free.softmax(-1)
    (tensor([ 1.4000,  2.0000,  0.0000, -4.8000]), tensor([0.3257, 0.5934, 0.0803, 0.0007]))
    >>> combine(base, assist, weight=-0.8, share=0.01, centred=False)
    tensor([ 1.4000,  2.0000,  0.0000, -4.0000])
    """
    offset = assist.float().log_softmax(-1) + math.log(assist.shape[-1]) if centred else assist
    keep = plausible(base.float(), share)
    return torch.where(keep, base + (weight * offset).to(base.dtype), base - 1e3 if filtered == "drop" else base)


def check(model: nn.Module, hook: Hook) -> None:
    fits(model, hook)
    count = len(blocks(model))
    if not 1 <= hook.config["blocks"] <= count:
        raise PatchError(f"guard {hook.name}: blocks must be in 1..{count}, the model's decoder blocks, not {hook.config['blocks']}")
    if hook.config["filtered"] not in FILTERED or not 0 <= hook.config["share"] < 1:
        raise PatchError(
            f"guard {hook.name}: filtered must be one of {', '.join(FILTERED)} and share in 0..1, not {hook.config['filtered']!r} and {hook.config['share']}"
        )


@wrap(config={"blocks": int, "weight": float, "share": float, "filtered": str, "centred": bool, "scale": float}, tensors={}, check=check)
def offset(model: nn.Module, it: Guarded) -> list[Any]:
    """See the module's docstring."""
    return [*root(model, it, before, after), *adapt(model, it)]


def before(model: nn.Module, it: Guarded, call: dict[str, Any]) -> dict[str, Any]:
    it.now = {"call": call}
    return call


def after(model: nn.Module, it: Guarded, now: dict[str, Any], logits: Tensor) -> Tensor:
    c = it.hook.config
    with bare(model), truncated(model, c["blocks"]):
        it.now = {"weight": torch.ones(1, device=logits.device)}
        assist = model.forward(**now["call"]).logits
    return combine(logits, assist, weight=float(c["weight"]), share=float(c["share"]), filtered=c["filtered"], centred=c["centred"])
