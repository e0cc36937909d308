"""The certificate of a head, the conditions without which there is none, and the choice of noise and steps.

Paper    Chourasia, Shah, Forget Unlearning: Towards True Data-Deletion in Machine Learning, ICML 2023, arXiv 2210.08911.
Differs  Only an epsilon that is proven in `guarantees.certified.renyi` is certified; the paper's stands beside it. Conditions are read off what a run
         did (`parts.updates.noisy.Run`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from expunge.core.errors import SettingError
from expunge.guarantees.certified import renyi
from expunge.parts.updates import noisy

COVERS = "the weights of this linear head"
EXCLUDES = (
    "the backbone that made the features, if it was trained on the records",
    "features, records and heads kept elsewhere: copies, backups, caches, releases made before the deletion",
    "what floating-point arithmetic adds to the proof over real numbers",
)
ORDERS = 30
"""Most requests for which the weak triangle inequality is evaluated: its Renyi order doubles with each."""


@dataclass(frozen=True)
class Settings:
    """What was fixed before learning. R is the largest norm of a row with its bias; M, beta, lam, eta, sigma as in `guarantees.certified.renyi`."""

    epsilon: float
    delta: float
    group: int
    adaptive: int
    classes: int
    radius: float
    bias: bool
    R: float
    M: float
    beta: float
    lam: float
    eta: float
    sigma: float
    steps: int
    deletion_steps: int


@dataclass(frozen=True)
class Phase:
    """K steps on n records, after `gone` were removed."""

    K: int
    n: int
    gone: int = 0


@dataclass(frozen=True)
class Certificate:
    """(epsilon, delta) of a published head, with all that it rests on.

    epsilon    deletion: bound against a head trained without any deleted record; 0 before the first deletion. Adaptive: the fixed bound of all heads together
    learning   epsilon of `group` records that are still there, over all heads published, at the same delta
    bounds     epsilon of the deletion by each bound of `guarantees.certified.renyi`; `renyi` is the paper's, for comparison; q is its order
    K          steps of each phase: learning, then each request
    noise      secure or seeded; a seeded certificate is for tests
    """

    epsilon: float
    delta: float
    learning: float
    bounds: Mapping[str, float]
    q: float
    settings: Settings
    history: tuple[Phase, ...]
    noise: str
    covers: str = COVERS
    excludes: tuple[str, ...] = EXCLUDES

    @property
    def K(self) -> tuple[int, ...]:
        return tuple(p.K for p in self.history)

    @property
    def n(self) -> int:
        """Records that are still there."""
        return self.history[-1].n

    @property
    def requests(self) -> int:
        return len(self.history) - 1

    @property
    def deleted(self) -> int:
        return sum(p.gone for p in self.history)

    @property
    def adaptive(self) -> bool:
        return self.settings.adaptive > 0


def certify(s: Settings, history: tuple[Phase, ...], runs: Iterable[noisy.Run] = (), noise: str = "seeded") -> Certificate:
    """The certificate of a head with these settings and this history, if each of `runs` met every condition.

    Raises SettingError for a run of mini-batches, one that stopped early, one whose gradients or rows go beyond what was stated, clipping with three classes
    or more, other constants than those stated, a step that is too large, or more adaptive requests than were provided for.
    """
    check(s, history)
    for r in runs:
        last = history[-1]
        for good, why in (
            (r.rows == r.n == last.n, f"a step took {r.rows} of {last.n} records: the bound needs all of them in every step"),
            (r.taken == r.asked == last.K, f"{r.taken} of {last.K} steps were taken: the bound forbids early stopping"),
            (r.radius <= s.R * (1 + 1e-9), f"a row has norm {r.radius:.6g}, beyond R = {s.R:.6g}: bound the rows first"),
            (r.norm <= s.M * (1 + 1e-9), f"a gradient can reach norm {r.norm:.6g}, beyond M = {s.M:.6g}: bounding is off"),
            (r.clip >= s.M or r.classes == 2, f"clipping at {r.clip:g} with {r.classes} classes may carry two heads apart: bound the rows instead"),
            ((r.eta, r.lam, r.sigma) == (s.eta, s.lam, s.sigma), "the run used another step size, penalty or noise than stated"),
            (noise == "seeded" or r.noise == "secure", f"the noise was {r.noise}, not secure as stated"),
        ):
            if not good:
                raise SettingError(f"no certificate: {why}")
    learning, (bounds, q) = renyi.epsilon_of(_mu(s, history), s.delta), _bounds(s, history)
    epsilon = s.epsilon if s.adaptive else min(bounds["shifted"], bounds["composition"])
    return Certificate(epsilon, s.delta, learning, bounds, q, s, history, noise)


def check(s: Settings, history: tuple[Phase, ...]) -> None:
    """Raises SettingError where settings and history cannot have a certificate."""
    n = history[0].n
    for good, why in (
        (0 < s.epsilon <= 100, f"epsilon must be above 0 and at most 100, not {s.epsilon}"),
        (1e-10 <= s.delta <= 1 / n, f"delta must be 1e-10 to 1/n = {1 / n:.3g}, not {s.delta}: beyond it, one record may be given away whole"),
        (1 <= s.group <= n / 2, f"group must be 1 to half of the {n} records, not {s.group}"),
        (s.classes >= 2, f"a softmax head needs two classes or more, not {s.classes}"),
        (0 < s.lam < math.inf, f"lam must be larger than 0, not {s.lam}: without the penalty nothing fades"),
        (0 < s.sigma < math.inf, f"sigma must be larger than 0, not {s.sigma}: without noise there is no bound"),
        (s.R > 0 and math.isclose(s.beta, noisy.constants(s.R)[1]) and 0 < s.M <= noisy.constants(s.R)[0] * (1 + 1e-12), "M and beta are not those of R"),
        (s.classes == 2 or math.isclose(s.M, noisy.constants(s.R)[0]), "M and beta are not those of R"),
        (0 < s.eta <= (1 + 1e-12) / (s.lam + s.beta), f"eta = {s.eta:g} is too large: at most 1/(lam + beta) = {1 / (s.lam + s.beta):g}"),
        (s.steps >= 1 and s.deletion_steps >= 1 and all(p.K >= 1 for p in history), "steps must be 1 or more"),
        (all(b.n == a.n - b.gone and b.gone >= 1 for a, b in itertools.pairwise(history)), "the history does not add up"),
    ):
        if not good:
            raise SettingError(f"no certificate: {why}")
    if not s.adaptive:
        return
    if len(history) - 1 > s.adaptive:
        raise SettingError(f"no certificate: this head provides for {s.adaptive} adaptive requests, which are used up; fit anew on what stays")
    if (most := max(p.gone for p in history)) > s.group:
        raise SettingError(f"no certificate: {most} records in one request, this head provides for groups of {s.group}")
    if _mu(s, history) > renyi.mu_of(s.epsilon, s.delta) * (1 + 1e-9):
        raise SettingError(f"no certificate: {len(history)} published heads exceed epsilon {s.epsilon:g}; fit with more noise (sigma = 0 chooses it)")


def _difference(s: Settings, records: int, n: int) -> float:
    """d: the most by which a step differs between worlds of which one lacks `records` of the n. (1/n) sum over n and the mean over the rest differ by
    (records/n) (mean gradient of these - mean gradient of the rest), of norm at most 2 M records / n."""
    return s.eta * 2 * s.M * records / n


def _mu(s: Settings, history: tuple[Phase, ...]) -> float:
    """mu of all heads published together, for `group` records that were there all the time."""
    return renyi.published([(p.K, _difference(s, s.group, p.n)) for p in history], s.eta, s.lam, s.sigma)


def _deletion(s: Settings, history: tuple[Phase, ...]) -> list[tuple[int, float]]:
    """(K, d) of every phase against a world that never had any record that is gone at the end."""
    return [(p.K, _difference(s, p.n - history[-1].n, p.n)) for p in history]


def _bounds(s: Settings, history: tuple[Phase, ...]) -> tuple[dict[str, float], float]:
    """epsilon of the deletion of all that went (adaptive: of all published heads) by each bound, and the order of the paper's; 0 where there is none."""
    requests = history[1:]
    if not requests:
        return {"shifted": 0.0, "composition": 0.0}, 0.0
    most = max(p.gone for p in requests)
    curve = lambda q: renyi.eps0(q, s.M, s.lam, s.sigma, history[-2].n, s.group if s.adaptive else most)  # noqa: E731
    if s.adaptive:
        last = lambda q: renyi.decay(curve(q), q, requests[-1].K, s.eta, s.lam)  # noqa: E731
        paper, q = renyi.best(lambda q: renyi.adaptive(last(q), curve(q), len(requests)), s.delta)
        return {"published": renyi.epsilon_of(_mu(s, history), s.delta), "renyi": paper}, q
    phases = _deletion(s, history)
    mus = {"shifted": renyi.shifted(phases, s.eta, s.lam, s.sigma), "composition": renyi.composition(phases, s.eta, s.sigma)}
    found = {name: renyi.epsilon_of(mu, s.delta) for name, mu in mus.items()}
    if len(requests) > ORDERS:
        return found, 0.0
    paper, q = renyi.best(lambda q: renyi.sequential(q, curve, [p.K for p in requests], s.eta, s.lam), s.delta)
    return {**found, "renyi": paper}, q


def least_sigma(s: Settings, n: int) -> float:
    """The least sigma with which `group` records are deleted in `deletion_steps` steps, or all adaptive requests fit. mu is proportional to 1 / sigma."""
    if s.adaptive:
        left = [n - k * s.group for k in range(s.adaptive + 1)]
        if left[-1] <= s.group:
            raise SettingError(f"{s.adaptive} adaptive requests of {s.group} records would use up the {n} records there are")
        mu = _mu(s, (Phase(s.steps, n), *(Phase(s.deletion_steps, m, s.group) for m in left[1:])))
    else:
        mu = renyi.shifted(_deletion(s, (Phase(s.steps, n), Phase(s.deletion_steps, n - s.group, s.group))), s.eta, s.lam, s.sigma)
    return mu / renyi.mu_of(s.epsilon, s.delta) * s.sigma * (1 + 1e-12)


def deletion_epsilon(s: Settings, history: tuple[Phase, ...]) -> float:
    return renyi.epsilon_of(renyi.shifted(_deletion(s, history), s.eta, s.lam, s.sigma), s.delta)


def least_steps(s: Settings, after: Callable[[int], tuple[Phase, ...]]) -> int:
    """The least K after which the deletion is within epsilon: mu falls with K, at last by 1 - eta lam a step."""
    goal = renyi.mu_of(s.epsilon, s.delta)
    within = lambda K: renyi.shifted(_deletion(s, after(K)), s.eta, s.lam, s.sigma) <= goal  # noqa: E731
    high = 1
    while not within(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high
