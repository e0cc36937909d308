"""Lower bounds on epsilon from the errors of an attack. Source: card audits-classification (Epsilon lower bounds).

An (epsilon, delta)-bound on how far two worlds can be told apart limits every attack: FNR + e^eps FPR >= 1 - delta and FPR + e^eps FNR >= 1 - delta.
So errors seen on n trials bound epsilon from below, once each is replaced by the worst rate that the trials still allow. The attack's
threshold must have been chosen on other trials.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta

from expunge.core.errors import SettingError

FORMS = ("clopper_pearson", "jeffreys", "joint_beta")


def epsilon(fnr: float, fpr: float, delta: float = 0.0) -> float:
    """max(0, ln((1 - delta - FNR) / FPR), ln((1 - delta - FPR) / FNR)): the least epsilon that allows these two error rates.

    >>> round(epsilon(0.4, 0.05, 1e-5), 3)
    2.485
    """

    def one(a: float, b: float) -> float:
        return -math.inf if 1 - delta - a <= 0 else math.inf if b == 0 else math.log((1 - delta - a) / b)

    return max(0.0, one(fnr, fpr), one(fpr, fnr))


def upper(wrong: int, n: int, form: str = "clopper_pearson", alpha: float = 0.05) -> float:
    """One-sided (1 - alpha) upper end of a rate of which `wrong` of n were seen; 1 for n = 0.

    Clopper-Pearson: beta quantile 1 - alpha of (wrong + 1, n - wrong); Jeffreys: of (wrong + 1/2, n - wrong + 1/2).

    >>> round(upper(0, 100, alpha=0.025), 6), round(upper(5, 100, alpha=0.025), 5)
    (0.036217, 0.11283)
    """
    if not 0 <= wrong <= n:
        raise SettingError(f"errors must be 0 to the number of trials, not {wrong} of {n}")
    shift = {"clopper_pearson": (1.0, 0.0), "jeffreys": (0.5, 0.5)}
    if form not in shift:
        raise SettingError(f"form must be one of {', '.join(shift)}, not '{form}'")
    a, b = shift[form]
    return 1.0 if wrong == n else float(beta.ppf(1 - alpha, wrong + a, n - wrong + b))


def lower_bound(
    false_negatives: int, positives: int, false_positives: int, negatives: int, *, form: str = "joint_beta", delta: float = 1e-5, alpha: float = 0.05,
    seed: int = 0, draws: int = 200_000,
) -> float:  # fmt: skip
    """epsilon that holds with confidence 1 - alpha, given what an attack with a threshold chosen on other data got wrong.

    clopper_pearson, jeffreys   both rates at their upper ends, alpha split between them (union bound)
    joint_beta                  the alpha quantile of epsilon over the posterior FNR ~ Beta(1/2 + FN, 1/2 + TP), FPR ~ Beta(1/2 + FP, 1/2 + TN),
                                by `draws` seeded samples in place of the published two-dimensional quadrature. The attack's mirror
                                image is left out: its direction was chosen on other data, and two directions read noise as leakage

    >>> [round(lower_bound(40, 100, 5, 100, form=f), 2) for f in FORMS]
    [1.48, 1.55, 1.81]
    """
    if form not in FORMS:
        raise SettingError(f"form must be one of {', '.join(FORMS)}, not '{form}'")
    if positives < 1 or negatives < 1:
        raise SettingError("epsilon needs at least one positive and one negative trial")
    if form != "joint_beta":
        return epsilon(upper(false_negatives, positives, form, alpha / 2), upper(false_positives, negatives, form, alpha / 2), delta)
    rng = np.random.default_rng(seed)
    fnr = rng.beta(0.5 + false_negatives, 0.5 + positives - false_negatives, draws)
    fpr = rng.beta(0.5 + false_positives, 0.5 + negatives - false_positives, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = ((fnr, fpr), (fpr, fnr))
        each = np.max([np.log(np.maximum(1 - delta - a, 0) / b) for a, b in pairs], axis=0)
    return float(np.quantile(np.maximum(each, 0), alpha))
