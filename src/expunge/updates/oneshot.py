"""One-shot updates: dampening (SSD) and a search along one gradient (SLUG)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dampening(there: Tensor, here: Tensor, *, alpha: float, lam: float, exponent: float = 1.0) -> Tensor:
    """Factors min((lam * I_D / I_f)^exponent, 1) where I_f > alpha * I_D, else 1, for importances here = I_f, there = I_D. Card corrective.

    >>> dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=10, lam=1)
    tensor([1.0000, 0.0500, 0.0100])
    >>> dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=10, lam=50)
    tensor([1.0000, 1.0000, 0.5000])
    """
    factor = (lam * there / here.clamp(min=1e-38)).pow(exponent).clamp(max=1)
    return torch.where(here > alpha * there, factor, torch.ones_like(factor))


def search(start: float, forgets: Callable[[float], bool], harms: Callable[[float], bool], *, evaluations: int = 10) -> float:
    """The smallest step found that forgets and does not harm, by doubling and bisection from `start`; the last harmless one if none forgets.

    >>> search(1.0, lambda s: s >= 3, lambda s: False, evaluations=10) < 3.1
    True
    """
    low, high, step, harmless = 0.0, None, start, 0.0
    for _ in range(evaluations):
        if harms(step):
            high = step if high is None else min(high, step)
        elif forgets(step):
            high = harmless = step
        else:
            low = step
            harmless = harmless if high is not None and harmless >= low else step
        step = low * 2 if high is None else (low + high) / 2
    return harmless
