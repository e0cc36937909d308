"""The score of the NeurIPS 2023 unlearning competition. Source: card audits-classification (NeurIPS 2023 competition score).

Per forgotten example, N unlearned and N retrained models give two samples of log-odds. How well a threshold, or an interval, tells them
apart is an epsilon; examples that cannot be told apart earn 1 point, and every half of epsilon more halves it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expunge.core.errors import SettingError

CAP = 50.0
"""epsilon of samples that never overlap."""

STEPS = 100
"""Thresholds per unit of score."""


def separation(unlearned: Tensor, retrained: Tensor, delta: float = 1e-5) -> float:
    """epsilon of one example from samples (N,) and (N,): the best of all single thresholds, both ways, and of all intervals around the narrower sample.

    Thresholds at which one rate is 0 and the other is not are skipped, since a finite sample cannot bound there; both 0 give infinity,
    capped at 50. A sample with less than 1 % of the other's spread gives 50 as well.
    """
    n = len(unlearned)
    if n < 2 or len(retrained) < 2:
        raise SettingError("the competition score needs at least two unlearned and two retrained models")
    a, b = unlearned.double(), retrained.double()
    spread = sorted((float(a.std()), float(b.std())))
    if spread[1] > 0 and spread[0] < 0.01 * spread[1]:
        return CAP
    low, high = float(torch.minimum(a.min(), b.min())), float(torch.maximum(a.max(), b.max()))
    cuts = torch.linspace(low, high, max(2, math.ceil((high - low) * STEPS)) + 1, dtype=torch.double)
    above_a, above_b = ((s[None] > cuts[:, None]).double().mean(1) for s in (a, b))
    inner, outer = (a, b) if a.std() <= b.std() else (b, a)
    reach = (cuts - low) / 2
    inside_i, inside_o = (((s - inner.median()).abs()[None] <= reach[:, None]).double().mean(1) for s in (inner, outer))
    pairs = ((above_b, 1 - above_a), (1 - above_b, above_a), (inside_o, 1 - inside_i))
    return max(0.0, *(_best(fpr, fnr, delta) for fpr, fnr in pairs))


def _best(fpr: Tensor, fnr: Tensor, delta: float) -> float:
    """max over thresholds of max(ln(1 - delta - FPR) - ln FNR, ln(1 - delta - FNR) - ln FPR), capped."""
    if bool(((fpr == 0) & (fnr == 0)).any()):
        return CAP
    keep = (fpr > 0) & (fnr > 0)
    if not bool(keep.any()):
        return 0.0
    fpr, fnr = fpr[keep], fnr[keep]
    each = torch.maximum((1 - delta - fpr).clamp(min=1e-300).log() - fnr.log(), (1 - delta - fnr).clamp(min=1e-300).log() - fpr.log())
    return min(CAP, float(each.max()))


def points(epsilon: float, n: int) -> float:
    """1 for epsilon in [0, 1/2), 1/2 in [1/2, 1), halving every 1/2; no lower than the bucket of ceil(ln(n - 1)), the most that n models can show.

    >>> points(0.1, 512), points(0.7, 512), points(50.0, 512) == 2.0 ** -13
    (1.0, 0.5, True)
    """
    last = 2 * math.ceil(math.log(max(n - 1, 2))) - 1
    return 2.0 ** -min(int(epsilon / 0.5), last)


def competition(unlearned: Tensor, retrained: Tensor, accuracies: tuple[float, float, float, float], delta: float = 1e-5) -> float:
    """F * (RA_u / RA_r) * (TA_u / TA_r), F the mean points over forgotten examples.

    unlearned, retrained   (N, M) log-odds of M forgotten examples
    accuracies             retain and test accuracy of the unlearned models, then of the retrained ones, 0..1
    """
    forgets = [points(separation(unlearned[:, j], retrained[:, j], delta), len(unlearned)) for j in range(unlearned.shape[1])]
    ra, ta, ra_r, ta_r = accuracies
    return sum(forgets) / len(forgets) * (ra / ra_r) * (ta / ta_r)
