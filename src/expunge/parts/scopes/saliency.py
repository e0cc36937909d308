"""Saliency: the weights that the forget set's gradient points at. Source: card salun, steps 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.types import Out, Scope, Task


def saliency(model: nn.Module, task: Task, batches: Sequence, *, keep: float = 0.5, buffers: str = "move") -> Scope:
    """The share `keep` of all weights, ranked together, with the largest |sum over batches of grad mean CE|.

    The sum is signed, as published: two batches with gradients +1 and -1 on a weight give it saliency 0. One pass in eval mode; the
    model's gradients, flags and modes are put back.
    """
    if not 0 < keep <= 1:
        raise SettingError(f"keep must be in (0, 1], not {keep}")
    return top({n: g.abs() for n, g in gradient_sum(model, task, batches).items()}, keep, buffers)


def gradient_sum(model: nn.Module, task: Task, batches: Sequence, loss=lambda out: out.mean.mean()) -> dict[str, Tensor]:
    """Sum over batches of the gradient of loss(Out), per trainable parameter, in eval mode; nothing about the model changes."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    modes = [(m, m.training) for m in model.modules()]
    wide = {n: torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype for n, p in named.items()}
    total = {n: torch.zeros_like(p, memory_format=torch.contiguous_format, dtype=wide[n]) for n, p in named.items()}
    model.eval()
    try:
        for k in range(len(batches)):
            out: Out = task.forward(model, batches[k])
            grads = torch.autograd.grad(loss(out), list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    total[name] += grad
    finally:
        for module, mode in modes:
            module.training = mode
    return total


def top(scores: dict[str, Tensor], keep: float, buffers: str = "move") -> Scope:
    """Masks of the int(N * keep) highest scores over all tensors together; ties at the threshold go to the first in order.

    One selection of the threshold in one copy of the scores, no sort and no index tensors; benchmarks/mask.py has the figures.

    >>> top({"w": torch.tensor([3.0, 1.0, 2.0, 1.0])}, 0.5).masks["w"]
    tensor([ True, False,  True, False])
    """
    total = sum(s.numel() for s in scores.values())
    n = int(total * keep)
    if n == 0:
        raise SettingError(f"keep={keep} of {total} weights keeps none; raise keep")
    wide = torch.float64 if any(s.dtype is torch.float64 for s in scores.values()) else torch.float32
    flat = np.concatenate([s.detach().reshape(-1).to(wide).cpu().numpy() for s in scores.values()])
    flat.partition(total - n)
    threshold = flat[total - n].item()
    del flat
    spare = n - sum(int((s > threshold).sum()) for s in scores.values())
    masks: dict[str, Tensor | None] = {}
    for name, score in scores.items():
        mask = score > threshold
        if spare > 0:
            tied = (score == threshold).reshape(-1).nonzero().squeeze(1)[:spare]
            mask.view(-1)[tied] = True
            spare -= len(tied)
        masks[name] = mask
    return Scope(masks, buffers)
