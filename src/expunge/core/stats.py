"""Intervals and samples: every bound in the package is computed here. `low` and `high` are one-sided 95 % bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Z = 1.6448536269514722
"""One-sided 95 % quantile of the normal distribution."""


def wilson(hits: int, n: int) -> tuple[float, float, float]:
    """Share hits / n with Wilson bounds, all in 0..1; (nan, 0, 1) for n = 0.

    >>> [round(v, 3) for v in wilson(0, 50)]
    [0.0, 0.0, 0.051]
    """
    if n == 0:
        return math.nan, 0.0, 1.0
    p, zz = hits / n, Z * Z
    centre, half = (p + zz / (2 * n)) / (1 + zz / n), Z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return p, 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)


def auc(high: Tensor, low: Tensor) -> tuple[float, float, float]:
    """P(high > low) + P(equal) / 2 for scores (N,) and (M,), with Hanley-McNeil bounds.

    >>> [round(v, 3) for v in auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))]
    [0.875, 0.464, 1.0]
    """
    n, m = len(high), len(low)
    if n == 0 or m == 0:
        return math.nan, 0.0, 1.0
    order = torch.cat([high, low]).unique(return_inverse=True)[1]
    counts = torch.bincount(order).double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[order]
    a = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt(max(0.0, (a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m)))
    width = Z * max(error, 0.5 / math.sqrt(n * m))
    return a, max(0.0, a - width), min(1.0, a + width)


def above(mine: tuple[float, float, float], rest: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """A value with bounds minus the mean of others, half-widths added in squares.

    >>> [round(v, 2) for v in above((0.9, 0.6, 1.0), [(0.5, 0.3, 0.7), (0.6, 0.4, 0.8)])]
    [0.35, 0.11, 0.59]
    """
    centre = sum(r[0] for r in rest) / len(rest)
    width = (((mine[2] - mine[1]) / 2) ** 2 + sum(((r[2] - r[1]) / 2) ** 2 for r in rest) / len(rest) ** 2) ** 0.5
    return mine[0] - centre, mine[0] - centre - width, mine[0] - centre + width


def mean(values: Tensor) -> tuple[float, float, float]:
    """Mean of (N,) with normal bounds; infinitely wide for fewer than two values."""
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), -math.inf, math.inf
    m, error = float(values.mean()), Z * float(values.std()) / math.sqrt(len(values))
    return m, m - error, m + error


def bootstrap(statistic: Callable[[Tensor], float], n: int, seed: int, rounds: int = 200) -> tuple[float, float]:
    """5 % and 95 % quantiles of statistic(rows) over `rounds` resamples of n examples."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([statistic(torch.randint(n, (n,), generator=generator)) for _ in range(rounds)], dtype=torch.double)
    low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=torch.double))
    return float(low), float(high)


def bootstrap_mean(values: Tensor, seed: int, rounds: int = 200) -> tuple[float, float]:
    """`bootstrap` of the mean of (N,), all resamples at once."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    means = values.double()[torch.randint(n, (rounds, n), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.05, 0.95], dtype=torch.double))
    return float(low), float(high)


def matched(forget: Tensor, test: Tensor, seed: int) -> tuple[Tensor, str]:
    """Positions in test whose targets follow the forget set's distribution, and a sentence that says how they were drawn.

    Integer labels: as many per label as keep the forget set's shares. Real targets: the same over the forget set's ten quantile bins.
    """
    generator = torch.Generator().manual_seed(seed)
    if forget.is_floating_point():
        flat, other = (t.reshape(len(t), -1)[:, 0].contiguous() for t in (forget, test))
        edges = flat.quantile(torch.linspace(0, 1, 11, dtype=flat.dtype))[1:-1].unique().contiguous()
        inside = (other >= flat.min()) & (other <= flat.max())
        a, b, what = torch.bucketize(flat, edges), torch.where(inside, torch.bucketize(other, edges), -1), "target quantile bins"
    else:
        a, b, what = forget, test, "labels"
    groups = [(k, int((a == k).sum()), (b == k).nonzero().squeeze(1)) for k in a.unique().tolist()]
    have = [(k, n, rows) for k, n, rows in groups if len(rows)]
    if not have:
        return torch.empty(0, dtype=torch.long), f"no test example shares the forget set's {what}"
    factor = min(len(rows) / n for _, n, rows in have)
    chosen = torch.cat([rows[torch.randperm(len(rows), generator=generator)[: max(1, int(factor * n))]] for _, n, rows in have])
    lost = "" if len(have) == len(groups) else f"; {len(groups) - len(have)} of {len(groups)} {what} have no test example"
    return chosen, f"{len(chosen)} non-members drawn from test in the forget set's shares of {what}{lost}"
