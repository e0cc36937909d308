"""How many examples a claim needs. A claim is made only where the worse end of its interval lies inside it."""

from __future__ import annotations

import math

from expunge.core.errors import SettingError
from expunge.core.stats import Z, wilson


def for_auc(claim: float, truth: float = 0.5) -> int:
    """Members, with as many non-members, whose AUC interval ends at `claim` or below if the AUC is `truth` (Hanley and McNeil).

    >>> for_auc(0.55)
    181
    """
    if not truth < claim <= 1:
        raise SettingError(f"the claim must lie above {truth:g}, not at {claim:g}")

    def half(n: int) -> float:
        q1, q2 = truth / (2 - truth), 2 * truth * truth / (1 + truth)
        return Z * math.sqrt((truth * (1 - truth) + (n - 1) * (q1 + q2 - 2 * truth * truth)) / (n * n))

    return _least(lambda n: truth + half(n) <= claim)


def for_rate(claim: float, truth: float = 0.0) -> int:
    """Trials whose Wilson interval ends at `claim` or below if the rate seen is `truth`.

    >>> for_rate(0.05), for_rate(0.01)
    (52, 268)
    """
    if not truth < claim <= 1:
        raise SettingError(f"the claim must lie above {truth:g}, not at {claim:g}")
    return _least(lambda n: wilson(round(truth * n), n)[2] <= claim)


def _least(holds) -> int:
    """The smallest n from which `holds`, for a condition that stays true once it is."""
    high = 2
    while not holds(high):
        high *= 2
        if high > 1 << 40:
            raise SettingError("no number of examples is enough")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
