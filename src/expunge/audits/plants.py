"""Planted controls: evidence without retraining. Records that the model never saw (plants) are taught to a copy of it, the same method makes that copy forget
them together with the request (the twin), and each plant is read in the twin that was taught it and in models that went through the same method and never saw
it: the other twins, and the candidates. `planning.plants` makes the runs; here are the rows, functions of what the runs read.

Letters: T twins, C candidates (the audited first), M = T + C models, N plants, of which each twin was taught its own, n records to forget, S steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from scipy.stats import t as student
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.core.digest import model_digest
from expunge.core.registry import check
from expunge.core.stats import auc, bootstrap, bootstrap_mean, mean, wilson

ATTACKS = {"repair": "repair.free.", "memorised": "memorised.extraction_strength.excess"}
"""Checks that are read of each twin, where they apply -> the rows that are taken, by name or beginning."""

ADAPTERS = ("repair.free.rank",)
"""Rows that `repair` leaves out of its best: of an adapter of that rank it is all that was done."""

MOST = 5040
"""Most relabellings that are counted one by one; beyond, as many are drawn by seed."""

LEAST = 0.1
"""Smallest difference of losses in the planted models that a share can be taken of."""


@dataclass(frozen=True)
class View:
    """What M models say of N plants, the T twins first."""

    nll: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """(M, N) loss per unit."""
    margin: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """(M, N) as in `parts.reading.Scores`."""
    again: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    """(M, S, N) loss per unit after each of S numbers of steps on the records to forget."""
    forget: Tensor = field(default_factory=lambda: torch.empty(0))
    """(n,) losses of the records to forget in the model that is audited."""
    kin: Tensor = field(default_factory=lambda: torch.empty(0))
    """(U,) losses in it of all records of their kind that are at hand and that it never saw, the plants among them."""
    attacked: tuple[Mapping[str, tuple[float, float]], ...] = ()
    """Per twin, value and half-width of rows of ATTACKS on its plants: the planted model before, the twin after, the candidate for a model that
    never saw them."""


@dataclass(frozen=True)
class Plants:
    """The evidence of one candidate. An empty one stands for evidence that is still to come.

    taught     (N,) the twin that was taught the plant
    after      the T twins and C candidates
    before     the same without the method: the T planted models, and the original
    forgotten  (T, n) losses of the records to forget in the twins
    candidate  digest of the audited model, `kind` where the plants come from, in words
    planting   per twin: passes over the data, loss of its plants, loss that was to be reached
    why        what makes the evidence void; empty: valid
    doubts     what it cannot tell of so small a request
    cost       examples forward and backward, and seconds, of all runs together
    """

    taught: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    after: View = View()
    before: View = View()
    forgotten: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    candidate: str = ""
    kind: str = ""
    planting: tuple[tuple[int, float, float], ...] = ()
    why: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def twins(self) -> int:
        """How many."""
        return len(self.forgotten)

    @property
    def there(self) -> bool:
        """Whether it holds readings, and nothing makes them void."""
        return self.twins > 0 and not self.why

    @property
    def told(self) -> str:
        """In words, for a verdict: 10 twins, 50 plants."""
        return f"{self.twins} twins, {len(self.taught)} plants"


EXPECTED = Plants()
"""Evidence that is still to come: gates that read it are known before it is there."""


def standing(nll: Tensor, taught: Tensor, twins: int) -> Tensor:
    """(M, T) B_mt = mean over plants i of twin t and over models m' other than m of 1(L_mi < L_m'i) + 1(L_mi = L_m'i) / 2, for losses L (M, N).

    >>> standing(torch.tensor([[0.0, 2.0], [2.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]), 2).tolist()
    [[1.0, 0.0], [0.5, 0.75], [0.0, 0.75]]
    """
    lower = (nll[:, None] < nll[None]).double() + (nll[:, None] == nll[None]).double() / 2
    wins = (lower.sum(1) - 0.5) / (len(nll) - 1)  # a model is equal to itself
    return torch.stack([wins[:, taught == t].mean(1) for t in range(twins)], 1)


def relabelled(b: Tensor, seed: int, most: int = MOST) -> tuple[Tensor, bool]:
    """(mean_t B_{g(t), t} for relabellings g, whether all are there): g gives each of the T sets of plants a model of its own among M, as if that had been
    taught it. The first is the true one. All M! / (M - T)! if these are at most `most`, else `most` drawn by seed.

    >>> relabelled(torch.tensor([[1.0, 0.0], [0.5, 0.75]]), 0)[0].tolist()
    [0.875, 0.25]
    """
    m, t = b.shape
    if math.perm(m, t) <= most:
        ways = torch.tensor(list(itertools.permutations(range(m), t)))
    else:
        g = torch.Generator().manual_seed(seed)
        ways = torch.stack([torch.arange(t), *(torch.randperm(m, generator=g)[:t] for _ in range(most - 1))])
    return b[ways, torch.arange(t)].mean(1), math.perm(m, t) <= most


def traces(e: Plants, view: View, seed: int) -> list[Row]:
    """plants.auc = mean_t B_tt: the probability that a plant's loss is lower in the twin that was taught it than in a model that never saw it. 0.5: no trace;
    0: more forgotten than never seen. Half of its interval is the larger of the 90 % range of |A - 1/2| over relabellings, and of a bootstrap over plants.
    plants.floor: what relabelled models read, with the 5 % and 95 % quantiles. plants.p: share of relabellings with |A - 1/2| at least as large."""
    b, n = standing(view.nll, e.taught, e.twins), len(e.taught)
    found, whole = relabelled(b, seed)
    value = float(found[0])
    lower = standing(view.nll, torch.arange(n), n)[e.taught, torch.arange(n)]  # of each plant
    low, high = bootstrap_mean(lower, seed)
    ends = found.quantile(torch.tensor([0.05, 0.95], dtype=found.dtype))
    half = max((high - low) / 2, float((found - 0.5).abs().quantile(0.9)))
    note = f"{e.told}, each against {len(view.nll) - 1} models that never saw it"
    hits = int(((found - 0.5).abs() >= abs(value - 0.5) - 1e-9).sum())
    share = hits / len(found)
    p, p_low, p_high = (share, share, share) if whole else wilson(hits, len(found))
    ways = f"{'all' if whole else 'drawn'} {len(found):,} relabellings of {len(view.nll)} models"
    return [
        Row("plants.auc", value, max(0.0, value - half), min(1.0, value + half), n, note),
        Row("plants.floor", float(found.mean()), float(ends[0]), float(ends[1]), len(found), ways, indicative=True),
        Row("plants.p", p, p_low, p_high, n, ways, indicative=True),
    ]


def own(values: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
    """((N, ...) of the twin that was taught the plant, (M - 1, N, ...) of the others), for values (M, N, ...)."""
    m, rows = len(values), torch.arange(len(taught))
    others = torch.tensor([[k for k in range(m) if k != t] for t in taught.tolist()], dtype=torch.long).reshape(-1, m - 1)
    return values[taught, rows], values[others, rows[:, None]].transpose(0, 1)


def away(values: Tensor, taught: Tensor) -> Tensor:
    """(N,) (m - mean_k m_k)^2 - s^2 (1 + 1 / K), s^2 the variance of m_k over the K = M - 1 others: how much farther a plant's margin lies from where it would
    be unseen than one more model that never saw it would; nothing is taken off for K = 1. For margins (M, N).

    >>> away(torch.tensor([[5.0], [0.0], [2.0]]), torch.tensor([0]))
    tensor([13.])
    """
    mine, rest = own(values, taught)
    k = len(rest)
    return (mine - rest.mean(0)).square() - (rest.var(0) * (1 + 1 / k) if k > 1 else 0.0)


def shares(name: str, after: Tensor, before: Tensor, least: float, seed: int, note: str) -> Row:
    """1 - mean(after) / mean(before) over plants (N,), with a bootstrap over them: 0 for doing nothing, 1 for no trace; nan for a mean(before) below least.

    >>> shares("x", torch.ones(9), torch.full((9,), 4.0), 0.1, 0, "").value
    0.75
    """
    n, whole = len(before), float(before.mean())
    if not whole >= least:
        return Row(name, math.nan, -math.inf, math.inf, n, f"planting moved it by {whole:.3g} alone: nothing to close")
    share = lambda r: float(1 - after[r].mean() / before[r].mean().clamp(min=1e-12))  # noqa: E731
    return Row(name, share(torch.arange(n)), *bootstrap(share, n, seed), n, note)


def excess(values: Tensor, taught: Tensor) -> Tensor:
    """(N,) the twin's value minus the mean of the others', for values (M, N)."""
    mine, rest = own(values, taught)
    return mine - rest.mean(0)


def ranked(e: Plants) -> list[Row]:
    """plants.rank = P(loss of a record to forget < loss of a plant) + P(equal) / 2, each record read in one twin in which it was forgotten: plant i in its own,
    the j-th record to forget in twin j mod T. plants.rank.p: exact p of Mann and Whitney's U that both are alike, two-sided; plants.rank.deeper: one-sided,
    that the records to forget lie no lower (`p_value`)."""
    n = e.forgotten.shape[1]
    forget = e.forgotten[torch.arange(n) % e.twins, torch.arange(n)]
    plants = own(e.after.nll, e.taught)[0]
    (two, how), (deeper, _) = (p_value(forget, plants, way) for way in ("two-sided", "less"))
    note = f"{n} records to forget among {len(plants)} plants, each in one twin; {how}"
    return [
        Row("plants.rank", *auc(plants, forget), n, note, indicative=True),
        Row("plants.rank.p", two, two, two, n, note, indicative=True),
        Row("plants.rank.deeper", deeper, deeper, deeper, n, note, indicative=True),
    ]


def over(name: str, view: View, beginning: str, note: str) -> Row | None:
    """The largest, among attacks whose row's name begins so, of sum_t w_t v_t / sum_t w_t over twins, w_t = 1 / h_t^2 for values v_t with half-widths h_t;
    bounds by their weighted spread and Student's t. None where fewer than half of the twins have a value (a single plant may not be known by heart).

    >>> r = over("x", View(attacked=({"x.a": (0.0, 0.1)}, {"x.a": (0.4, 0.1)}, {"x.a": (1.0, 10.0)})), "x", "")
    >>> round(r.value, 3), r.n
    (0.2, 3)
    """
    found = []
    for attack in dict.fromkeys(k for reading in view.attacked for k in reading if k.startswith(beginning) and k not in ADAPTERS):
        pairs = [(v, 1 / max(h, 1e-3) ** 2) for v, h in (reading.get(attack, (math.nan, 1.0)) for reading in view.attacked) if math.isfinite(v)]
        if len(pairs) >= max(2, len(view.attacked) / 2):
            whole, k = sum(w for _, w in pairs), len(pairs)
            value = sum(w * v for v, w in pairs) / whole
            error = math.sqrt(sum((w * (v - value)) ** 2 for v, w in pairs) * k / (k - 1)) / whole
            half = float(student.ppf(0.95, k - 1)) * error
            found.append(Row(name, value, value - half, value + half, k, f"{attack}; {note}"))
    return max(found, key=lambda row: row.value, default=None)


def unseen(view: View) -> list[Row]:
    """plants.unseen = P(loss of a record to forget < loss of an unseen record of its kind) + P(equal) / 2, both in the model that is audited; plants.unseen.p:
    exact p that both are alike, two-sided (`p_value`). This reads the records to forget themselves, which may lie deeper than plants, learnt last."""
    n, u = len(view.forget), len(view.kin)
    note = f"{n} records to forget among {u} of their kind that the model never saw"
    p, how = p_value(view.forget, view.kin)
    return [Row("plants.unseen", *auc(view.kin, view.forget), n, note), Row("plants.unseen.p", p, p, p, n, f"{note}; two-sided, {how}")]


def p_value(a: Tensor, b: Tensor, alternative: str = "two-sided") -> tuple[float, str]:
    """(p of Mann and Whitney's U that the values (n,) and (m,) are alike, how): exact, 1 of m + 1 at least for one value among m; the normal form where values
    are equal, or beyond 20,000 pairs. "less": that those of a are no smaller.

    >>> p_value(torch.tensor([0.0]), torch.tensor([1.0, 2.0, 3.0]), "less")
    (0.25, 'exact')
    """
    a, b = a.double(), b.double()
    how = "asymptotic" if len(torch.cat([a, b]).unique()) < len(a) + len(b) or len(a) * len(b) > 20_000 else "exact"
    return float(mannwhitneyu(a, b, alternative=alternative, method=how).pvalue), how


def rows(e: Plants, view: View, seed: int) -> list[Row]:
    """All rows of a view of the evidence: its `after`, or its `before`, which is what doing nothing reads."""
    note = f"{e.told}, against {len(view.nll) - 1} models that never saw them"
    found = traces(e, view, seed)
    found.append(shares("plants.margin", away(view.margin, e.taught), away(e.before.margin, e.taught), 1e-6, seed, f"margins; {note}"))
    found.append(
        Row("plants.known", *mean(excess((-view.nll).exp(), e.taught)), len(e.taught), f"probability above that in models that never saw them; {note}")
    )
    if view.again.numel():
        after, before = (-excess(v.again.mean(1), e.taught) for v in (view, e.before))
        found.append(shares("plants.relearn", after, before, LEAST, seed, f"loss below that of the others while the records to forget are relearnt; {note}"))
    attacks = [over("plants.repair", view, ATTACKS["repair"], note), over("plants.extraction", view, ATTACKS["memorised"], note)]
    return [*found, *unseen(view), *(row for row in attacks if row)]


@check(tasks=("classification", "causal_lm"), needs=("forget",))
def plants(p: Probe) -> list[Row]:
    """Planted controls: plants.auc, .floor, .p, .margin (share of the gap closed), .known, .relearn, .rank, .unseen, .repair, of texts .extraction.

    Twin against models that never saw the plant. Evidence is about one candidate: for another model there are no rows; for the original those of doing nothing;
    for a retrained model that stands in for the candidate, what a twin reads when the sets of plants are dealt to the wrong ones.
    """
    e: Any = p.plants
    if e is None or not e.there:
        return []
    if p.after is p.before:
        return rows(e, e.before, p.seed)
    if p.spread:
        return rows(e, sham(e), p.seed)
    if p.once(("digest",), p.after, lambda: model_digest(p.after)) != e.candidate:
        return []
    return [*rows(e, e.after, p.seed), *ranked(e)]


def sham(e: Plants) -> View:
    """What the twins would read had nothing been left: of each set of plants the twin that was taught it is given the readings of the model after it; and some
    unseen records stand for those to forget. Nothing comes back of what never was there."""

    def moved(values: Tensor) -> Tensor:
        out = values.clone()
        for t in range(e.twins):
            out[t, ..., e.taught == t] = values[(t + 1) % len(values), ..., e.taught == t]
        return out

    n = len(e.after.forget)
    return View(
        moved(e.after.nll),
        moved(e.after.margin),
        moved(e.after.again),
        e.after.kin[:n],
        e.after.kin[n:],
        tuple(dict.fromkeys(a, (0.0, 1.0)) for a in e.after.attacked),
    )
