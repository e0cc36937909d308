"""One-shot updates: dampening (SSD), Fisher noise (FF), a step along a flat direction (IU), and a search along one gradient (SLUG)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def dampening(there: Tensor, here: Tensor, *, alpha: float, lam: float, exponent: float = 1.0) -> Tensor:
    """Factors min((lam * I_D / I_f)^exponent, 1) where I_f > alpha * I_D, else 1, for importances here = I_f, there = I_D. Card corrective.

    Where both are 0 the factor is 1; where only I_D is 0 it is 0.

    >>> dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=10, lam=1)
    tensor([1.0000, 0.0500, 0.0100])
    >>> dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=10, lam=50)
    tensor([1.0000, 1.0000, 0.5000])
    """
    chosen = here > alpha * there
    ratio = there / here.masked_fill(~chosen, 1)
    return (lam * ratio).pow(exponent).clamp(max=1).masked_fill(~chosen, 1)


def dampen(params: Mapping[str, Tensor], there: Mapping[str, Tensor], here: Mapping[str, Tensor], **settings: float) -> None:
    """Multiply every parameter by its `dampening` factors, in place."""
    with torch.no_grad():
        for name, p in params.items():
            p.mul_(dampening(there[name], here[name], **settings))


def noise_variance(fisher: Tensor, alpha: float, *, head: bool) -> Tensor:
    """alpha * min(1 / (F + 1e-8), cap), cap 1e2 for the head and 1e3 else, averaged over dimension 1 of matrices and kernels, and times 10
    for the head and for vectors; of F's shape. Card l1-sparse, FF.

    >>> noise_variance(torch.tensor([0.01]), 1e-8, head=False).sqrt()
    tensor([0.0032])
    """
    variance = alpha * (1 / (fisher + 1e-8)).clamp(max=1e2 if head else 1e3)
    if fisher.ndim > 1:
        variance = variance.mean(1, keepdim=True).expand_as(fisher)
    return variance * (10 if head or fisher.ndim == 1 else 1)


def step_along(params: Sequence[Tensor], direction: Tensor, scale: float) -> None:
    """params += scale * direction in place, for a direction (P,) over all of them, flattened in order.

    >>> p = torch.zeros(2, 1); step_along([p], torch.tensor([1.0, 2.0]), 0.5); p.flatten()
    tensor([0.5000, 1.0000])
    """
    with torch.no_grad():
        for p, part in zip(params, direction.split([p.numel() for p in params]), strict=True):
            p.add_((scale * part).view_as(p).to(p))


def first_step(weight: Tensor, gradient: Tensor) -> float:
    """||theta|| / ||g|| / 10: the length at which SLUG's search starts; it is added along the gradient of +L_f. Card slug, step 4.

    >>> first_step(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
    0.25
    """
    return float(weight.norm() / gradient.norm()) / 10


def search(start: float, judge: Callable[[float], tuple[bool, bool]], *, evaluations: int = 10) -> float:
    """The smallest step found that forgets and does not harm, or the largest harmless one when none forgets (0 when all harm).

    judge(step) -> (forgets, harms), called exactly `evaluations` times: a step that neither forgets nor harms is doubled until some step
    does one of the two, after that the interval is halved. Forgetting need not be monotone: a step that harms is never returned.

    >>> 3 <= search(1.0, lambda s: (s >= 3, s > 8)) < 3.1
    True
    >>> search(1.0, lambda s: (s >= 3, s > 2), evaluations=4)
    2.0
    """
    low, high, step, best, forgot = 0.0, None, start, 0.0, False
    for _ in range(evaluations):
        forgets, harms = judge(step)
        if harms:
            high = step
        elif forgets:
            high = step
            best, forgot = step if not forgot else min(best, step), True
        else:
            low = step
            best = best if forgot else max(best, step)
        step = low * 2 if high is None else (low + high) / 2
    return best
