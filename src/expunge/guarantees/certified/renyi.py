"""How far two worlds can be told apart after noisy gradient descent: bounds on epsilon, from the step size, the noise and the number of steps.

Worlds     A learns on D, deletes, goes on; B never had the records in question. Both start from one law and step
               theta <- theta - eta grad L(theta) + sqrt(2 eta sigma^2) N(0, I),    L = (1/n) sum_i l(theta; x_i) + (lam/2) ||theta||^2.
Letters    q Renyi order > 1; S records in question; M Lipschitz, beta smoothness constant of l; lam strong convexity; n records; eta step size;
           K steps; sigma noise; c = 1 - eta lam; s = sqrt(2 eta sigma^2); d = 2 eta M S / n, the most by which one step differs between the worlds.
Claim      (epsilon, delta): P(world A in E) <= e^epsilon P(world B in E) + delta for all events E, and with A and B swapped. For deletion, B is a model
           trained on what stays, so it is independent of the deleted records; for learning, epsilon is the privacy of the records that are still there.

Three bounds, all valid where l is convex, beta-smooth and M-Lipschitz, eta <= 1/(lam + beta), every step takes all records, and every step is taken:
  renyi        the paper's: eps0(q) = 4 q S^2 M^2 / (lam sigma^2 n^2), times exp(-K eta lam / q) after K steps without the records
  composition  K steps as if each were published: K Gaussian releases of shift d and noise s; says nothing of the steps after a deletion
  shifted      the default, proven here in five lines

Shifted. A step of L is a contraction by c (the Hessian lies in [lam, lam + beta], so that of the step lies in [0, c]). Give world A's iterate X a
companion Y that starts as X, takes the step of world B plus a shift a_k towards X's step, with X's noise, and meets X at step K. If z_k bounds the
distance of X's and Y's steps before noise, z_{k+1} = c (z_k - a_k) + d_k and meeting needs sum c^(K-k) a_k = sum c^(K-k) d_k. Given the past,
Y moves as B does but for a shift of at most a_k under noise s, so B and Y are apart as Gaussians with mean distance mu = sqrt(sum a_k^2) / s (adaptive
composition; the last iterate is a projection). The least sum is at a_k ~ c^(K-k), allowed while d_k does not grow, so that z_k >= a_k throughout:
  mu = sum_k c^(K-k) d_k / (s sqrt(sum_k c^(2(K-k)))),    Renyi q mu^2 / 2,    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu).
With d constant and K -> infinity Renyi tends to at most eps0 / 2; K steps without the records then take c^(2K) off it, not exp(-K eta lam / q): the
paper's bound follows from it, for every q > 1. For a quadratic loss and a fixed start it is exact.

Paper    Chourasia, Shah, Forget Unlearning: Towards True Data-Deletion in Machine Learning, ICML 2023, arXiv 2210.08911. Shifted: the companion is that of
         Bok, Su, Altschuler, Shifted Interpolation for Differential Privacy, ICML 2024.
Differs  `renyi` has constants that the card takes from public code and from memory; it is reported beside `shifted`, which implies it (a test compares both on
         a grid). Many requests: one sum over the whole history in place of the weak triangle inequality, which `sequential` gives for comparison.
         Adaptive requests: each publication costs its own phase, mu^2 = sum over phases, which needs no eps_dd on top; `adaptive` gives the card's form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from scipy.special import log_ndtr, ndtr

from expunge.core.errors import SettingError

MOST = 1e4
"""Largest Renyi order that is tried."""


def eps0(q: float, M: float, lam: float, sigma: float, n: int, S: int = 1) -> float:
    """4 q S^2 M^2 / (lam sigma^2 n^2): Renyi divergence of order q after learning, whatever K.

    >>> round(eps0(10, 1.0, 0.01, 0.03, 10_000), 6)
    0.044444
    """
    return 4 * q * S**2 * M**2 / (lam * sigma**2 * n**2)


def decay(eps: float, q: float, K: float, eta: float, lam: float) -> float:
    """exp(-K eta lam / q) eps: what K steps on data that are the same in both worlds leave of a Renyi divergence."""
    return math.exp(-K * eta * lam / q) * eps


def convert(eps: float, q: float, delta: float) -> float:
    """(q, eps)-Renyi to (epsilon, delta): eps + ln(1/delta) / (q - 1).

    >>> start = eps0(10, 1.0, 0.01, 0.03, 10_000)
    >>> [round(convert(decay(start, 10, K, 1.0, 0.01), 10, 1e-4), 6) for K in (0, 100)]
    [1.067816, 1.063586]
    """
    return eps + math.log(1 / delta) / (q - 1)


def convert_tight(eps: float, q: float, delta: float) -> float:
    """The same, smaller: max(0, eps + ln((q - 1) / q) - (ln delta + ln q) / (q - 1)). Canonne, Kamath, Steinke 2020."""
    return max(0.0, eps + math.log1p(-1 / q) - (math.log(delta) + math.log(q)) / (q - 1))


def best(curve: Callable[[float], float], delta: float, rule: Callable[[float, float, float], float] = convert) -> tuple[float, float]:
    """(epsilon, q): the least of rule(curve(q), q, delta) over q in (1, 1e4], and its order.

    >>> epsilon, q = best(lambda q: eps0(q, 1.0, 0.01, 0.03, 10_000), 1e-4)
    >>> round(epsilon, 4), round(q, 1)
    (0.4091, 46.5)
    """
    value = lambda t: rule(curve(1 + math.exp(t)), 1 + math.exp(t), delta)  # noqa: E731
    low, high, parts = math.log(1e-6), math.log(MOST - 1), 240
    for _ in range(6):  # a grid, then finer grids around its least value: any q is valid, so that nothing rests on the shape of the curve
        grid = [low + (high - low) * k / parts for k in range(parts + 1)]
        k = min(range(parts + 1), key=lambda k: value(grid[k]))
        low, high, parts = grid[max(0, k - 1)], grid[min(parts, k + 1)], 20
    t = (low + high) / 2
    return value(t), 1 + math.exp(t)


def calibrate(eps: float, q: float, M: float, lam: float, n: int, S: int = 1) -> float:
    """sigma^2 = 4 q S^2 M^2 / (lam eps n^2): the noise at which `eps0` is eps.

    >>> round(calibrate(0.1, 2, 1.0, 0.05, 1000), 10)
    0.0016
    """
    return 4 * q * S**2 * M**2 / (lam * eps * n**2)


def steps(start: float, target: float, q: float, eta: float, lam: float) -> int:
    """The least K with exp(-K eta lam / q) start <= target: (q / (eta lam)) ln(start / target), rounded up; 0 where start already is."""
    return max(0, math.ceil(q / (eta * lam) * math.log(start / target) - 1e-9)) if start > 0 else 0


def sequential(q: float, eps: Callable[[float], float], K: Sequence[float], eta: float, lam: float) -> float:
    """Renyi divergence of order q after requests of K[0], K[1], ... steps that do not depend on what was published.

    eps_1(q) = exp(-K eta lam / q) eps(q), eps_s(q) = exp(-K eta lam / q) (q - 1/2) / (q - 1) (eps(2q) + eps_{s-1}(2q)), with eps the curve after learning.

    >>> round(sequential(3, lambda q: 0.01 * q, [100, 100], 1.0, 0.01), 6)
    0.09923
    """
    if not K:
        return eps(q)
    inside = eps(q) if len(K) == 1 else (q - 0.5) / (q - 1) * (eps(2 * q) + sequential(2 * q, eps, K[:-1], eta, lam))
    return decay(inside, q, K[-1], eta, lam)


def adaptive(eps_dd: float, eps_dp: float, p: int) -> float:
    """eps_dd + p eps_dp: deletion under p requests that depend on published models, from deletion under fixed ones and the privacy of learning."""
    return eps_dd + p * eps_dp


def _sum(rate: float, K: int) -> float:
    """1 + e^-rate + ... + e^-(K-1) rate."""
    return math.expm1(-K * rate) / math.expm1(-rate)


def shifted(phases: Sequence[tuple[int, float]], eta: float, lam: float, sigma: float) -> float:
    """mu of the last iterate after phases of (K, d): K steps in which the two worlds' steps differ by at most d. Only that iterate is seen.

    Raises SettingError where d grows from one phase to the next: the sum is not valid there.

    >>> round(shifted([(1000, 0.1), (10, 0.0)], 0.1, 0.5, 0.2), 6) == round(shifted([(1000, 0.1)], 0.1, 0.5, 0.2) * 0.95**10, 6)
    True
    """
    if any(b[1] > a[1] for a, b in itertools.pairwise(phases)):
        raise SettingError("the difference between the worlds must not grow from one phase to the next")
    rate, drift, squares = -math.log1p(-eta * lam), 0.0, 0.0
    for K, d in phases:
        drift = math.exp(-K * rate) * drift + d * _sum(rate, K)
        squares = math.exp(-2 * K * rate) * squares + _sum(2 * rate, K)
    return drift / math.sqrt(2 * eta * sigma**2 * squares)


def published(phases: Sequence[tuple[int, float]], eta: float, lam: float, sigma: float) -> float:
    """mu of all last iterates of the phases together, each published, under requests that may depend on them: sqrt(sum of mu^2 of each phase)."""
    return math.sqrt(sum(shifted([phase], eta, lam, sigma) ** 2 for phase in phases))


def composition(phases: Sequence[tuple[int, float]], eta: float, sigma: float) -> float:
    """mu of all iterates together: sqrt(sum K d^2 / (2 eta sigma^2)). Needs neither convexity nor a small step."""
    return math.sqrt(sum(K * d**2 for K, d in phases) / (2 * eta * sigma**2))


def delta_of(epsilon: float, mu: float) -> float:
    """delta of N(mu, 1) against N(0, 1): Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu). Balle, Wang 2018.

    >>> round(delta_of(1.0, 1.0), 6)
    0.126937
    """
    if mu == 0:
        return 0.0
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(min(0.0, epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))))


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon with delta_of(epsilon, mu) <= delta, rounded up."""
    if delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu with epsilon_of(mu, delta) <= epsilon, rounded down.

    >>> round(epsilon_of(mu_of(0.5, 1e-5), 1e-5), 9)
    0.5
    """
    low, high = 0.0, 1.0
    while delta_of(epsilon, high) <= delta:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(epsilon, middle) <= delta else (low, middle)
    return low
