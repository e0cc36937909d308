"""Zeroth-order search: what can be said about a function of which only values are at hand. Source: card eco, step 4; Spall 1992 for SPSA."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from expunge.core.errors import Diverged, SettingError

LEAST = 1e-8
"""Smallest value that a search looks at."""


def central(f: Callable[[float], float], b: float, eps: float, low: float = LEAST) -> float:
    """g = (f(b + eps) - f(max(b - eps, low))) / (2 eps); exact for a quadratic.

    >>> round(central(lambda b: (b - 2) ** 2, 1.0, 0.1), 6)
    -2.0
    """
    if not eps > 0:
        raise SettingError(f"eps must be above 0, not {eps:g}")
    return (f(b + eps) - f(max(b - eps, low))) / (2 * eps)


def search(
    f: Callable[[float], float], start: float, *, lr: float, eps: float, steps: int, low: float = LEAST, high: float = math.inf, most: float = math.inf
) -> tuple[float, list[float]]:
    """b <- clamp(b - lr * g, low, high), `steps` times, no step longer than `most`, which halves when g changes its sign.

    Returns the best of all points that f was asked for, and the path of b.

    >>> best, path = search(lambda b: (b - 2) ** 2, 1.0, lr=0.1, eps=0.1, steps=1)
    >>> round(path[-1], 6), round(best, 6)
    (1.2, 1.1)
    """
    seen: dict[float, float] = {}

    def asked(b: float) -> float:
        if b not in seen:
            seen[b] = f(min(b, high))
            if not math.isfinite(seen[b]):
                raise Diverged(f"the searched function is {seen[b]} at {b:g}")
        return seen[b]

    path, last = [start], 0.0
    for _ in range(steps):
        move = lr * central(asked, path[-1], eps, low)
        most = most / 2 if move * last < 0 else most
        last = move
        path.append(min(max(path[-1] - min(max(move, -most), most), low), high))
    best = min(seen, key=seen.__getitem__) if seen else start
    return min(best, high), path


def spsa(x: Tensor, f: Callable[[Tensor], float], *, sigma: float, lr: float, steps: int, generator: torch.Generator) -> Tensor:
    """x <- x - lr g with g = (f(x + sigma d) - f(x - sigma d)) / (2 sigma) d, d of signs drawn anew each step: two values per step whatever the size of x.

    >>> g = torch.Generator().manual_seed(0)
    >>> spsa(torch.tensor([1.0]), lambda x: float((x - 2) ** 2), sigma=0.1, lr=0.1, steps=1, generator=g)
    tensor([1.2000])
    """
    if not sigma > 0:
        raise SettingError(f"sigma must be above 0, not {sigma:g}")
    for _ in range(steps):
        d = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        x = x - lr * (f(x + sigma * d) - f(x - sigma * d)) / (2 * sigma) * d
    return x
