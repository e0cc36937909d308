"""Per-example membership attacks, calibrated on shadow models. Source: card audits-classification (Per-example attacks).

All read the same record: for every point, what the target says and what each of K shadow models says, with or without the point in its
training data. Scores are larger for "was trained on". They are pure functions on matrices; how the shadows are trained is `audits.pool`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expunge.core.errors import SettingError

LEAST = 2
"""Fewest shadow models per side."""


def lira(phi: Tensor, shadows: Tensor, inside: Tensor, *, online: bool = True, pooled: bool | None = None) -> Tensor:
    """(N,) likelihood ratio of "trained on" against "not", for log-odds phi (N,) and those of K shadows (K, N), inside (K, N) bool.

    online    log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out)
    offline   log Phi((phi - mu_out) / s_out): only shadows without the point are read
    pooled    one variance per side over all points; None pools where fewer than 16 shadows are on a side

    phi 2, in N(3, 1), out N(0, 1): 1.5 (card). Raises SettingError when a point has fewer than two shadows on a side that is read.
    """
    where = {"out": ~inside, "in": inside} if online else {"out": ~inside}
    fits = {}
    for side, mask in where.items():
        count = mask.sum(0)
        if int(count.min()) < LEAST:
            raise SettingError(f"a point has {int(count.min())} shadow model(s) on side {side}; at least {LEAST} are needed")
        mu = (shadows * mask).sum(0) / count
        square = ((shadows - mu) ** 2 * mask).sum(0)
        pool = pooled if pooled is not None else int(count.min()) < 16
        variance = square.sum() / (count - 1).sum() if pool else square / (count - 1)
        fits[side] = (mu, variance.clamp(min=1e-12))
    mu, variance = fits["out"]
    if not online:
        return torch.special.log_ndtr((phi - mu) / variance.sqrt())
    return gaussian(phi, *fits["in"]) - gaussian(phi, mu, variance)


def gaussian(x: Tensor, mu: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mu, variance).

    >>> one = torch.tensor(1.0)
    >>> round(float(gaussian(torch.tensor(2.0), 3 * one, one) - gaussian(torch.tensor(2.0), 0 * one, one)), 4)
    1.5
    """
    return -0.5 * (x - mu) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)


def rmia(p: Tensor, shadows: Tensor, population: Tensor, shadows_population: Tensor, *, a: float = 0.3, gamma: float = 1.0) -> Tensor:
    """(N,) share of population points z with ratio(x) / ratio(z) > gamma, ratio = p / mean, mean = (1 + a) / 2 * avg_out p + (1 - a) / 2.

    p            (N,) the target's probability of the true label; population (M,) the same of points that nobody trained on
    shadows      (K, N) and (K, M), of models without the point; one is enough

    >>> rmia(torch.tensor([0.9]), torch.tensor([[0.5]]), torch.tensor([0.5, 0.9]), torch.tensor([[0.5, 0.9]]), a=1.0)
    tensor([1.])
    """
    if not 0 <= a <= 1:
        raise SettingError(f"a must be in 0..1, not {a:g}")

    def ratio(own: Tensor, others: Tensor) -> Tensor:
        return own / ((1 + a) / 2 * others.mean(0) + (1 - a) / 2)

    z = ratio(population, shadows_population).sort().values
    return torch.searchsorted(z, (ratio(p, shadows) / gamma).contiguous()).to(p) / len(z)


def offset(p: Tensor, shadows: Tensor, inside: Tensor, population: Tensor, shadows_population: Tensor, grid: int = 11) -> float:
    """RMIA's `a` from 0..1 that tells best on a paired reference model: p (N,) is its probability, `inside` (N,) what it was trained on."""
    from expunge.core.stats import auc

    tried = [k / (grid - 1) for k in range(grid)]
    scores = [rmia(p, shadows, population, shadows_population, a=a) for a in tried]
    return tried[max(range(grid), key=lambda k: auc(scores[k][inside], scores[k][~inside])[0])]


def rates(score: Tensor, member: Tensor, fpr: float) -> tuple[int, int, int, int]:
    """(true positives, members, false positives, others) at the lowest threshold whose false-positive rate is at most `fpr` on these points."""
    others = score[~member].sort(descending=True).values
    allowed = int(fpr * len(others))
    cut = others[allowed] if allowed < len(others) else torch.tensor(-math.inf)
    called = score > cut
    return int((called & member).sum()), int(member.sum()), int((called & ~member).sum()), len(others)


def quantile(score: Tensor, features: Tensor, other_score: Tensor, other_features: Tensor, fpr: float = 0.05, seed: int = 0) -> Tensor:
    """(N,) how far each point's score is above the (1 - fpr) quantile that a regression on non-members expects at its features.

    The regression sees non-members alone, so no shadow model is needed. Gradient-boosted trees with the pinball loss (scikit-learn).
    """
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(loss="quantile", alpha=1 - fpr, n_estimators=50, max_depth=2, random_state=seed)
    model.fit(other_features.flatten(1).double().numpy(), other_score.double().numpy())
    return score - torch.as_tensor(model.predict(features.flatten(1).double().numpy())).to(score)
