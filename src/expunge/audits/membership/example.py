"""Per-example membership attacks on the candidate, calibrated on the pool's shadow models. Source: card audits-classification.

Members are the forgotten records, non-members are unseen ones of the same labels; both are in the pool's universe, so that every record is
judged against models that saw it and models that did not. These decide; population attacks are indicative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.audits.membership import attacks, epsilon
from expunge.core.registry import check
from expunge.core.stats import above, auc, matched, wilson
from expunge.parts.reading import features


@check(tasks=("classification",), needs=("forget", "test"), pool=True)
def lira(p: Probe) -> list[Row]:
    """lira.auc, lira.tpr.01, lira.tpr.001: how well a likelihood ratio per record tells forgotten from unseen; 0.5, 0.01, 0.001 by chance.

    lira.epsilon: a lower bound, its threshold chosen on one half of the records and read on the other. lira.excess: AUC minus that of the
    retrained models. A true-positive rate is given only where there are at least 1 / rate non-members.
    """
    members, others, drawn, note = _parts(p)
    if not len(drawn):
        return []
    shadows, inside = torch.cat([p.pool.margins(members), p.pool.margins(others)], 1), torch.cat([p.pool.sides(members), p.pool.sides(others)], 1)

    def scores(which: str) -> tuple[Tensor, Tensor]:
        phi = torch.cat([p.scores(which, "forget").margin, p.scores(which, "test").margin[drawn]])
        s = attacks.lira(phi, shadows, inside)
        return s[: len(members)], s[len(members) :]

    high, low = scores("after")
    rows = [Row("lira.auc", *auc(high, low), len(high) + len(low), note), *_rates(high, low, note), _bound(high, low, p.seed, note)]
    if p.references:
        rest = [auc(*scores(f"reference{k}")) for k in range(len(p.references))]
        rows.append(Row("lira.excess", *above((rows[0].value, rows[0].low, rows[0].high), rest), rows[0].n, note))
    return rows


@check(tasks=("classification",), needs=("forget", "test"), pool=True)
def ulira(p: Probe) -> list[Row]:
    """ulira.auc: records that were trained on and then forgotten against records never seen, by the likelihood ratio of shadow models that saw and
    forgot the record, and that never saw it; 0.5 when forgetting leaves nothing. Left out without such shadows (`Probe.forgotten`).

    Source: Hayes et al., "Inexact Unlearning Needs More Careful Evaluations", arXiv:2403.01218.
    """
    if p.forgotten is None:
        return []
    p.forgotten.fits(p.after)
    members, others, drawn, _ = _parts(p)
    if not len(drawn):
        return []
    shadows, inside = (torch.cat([f(members), f(others)], 1) for f in (p.forgotten.margins, p.forgotten.sides))
    phi = torch.cat([p.scores("after", "forget").margin, p.scores("after", "test").margin[drawn]])
    s = attacks.lira(phi, shadows, inside)
    note = f"{len(members)} forgotten, {len(drawn)} unseen; {len(p.forgotten.models)} shadow models that forgot"
    return [Row("ulira.auc", *auc(s[: len(members)], s[len(members) :]), len(s), note)]


@check(tasks=("classification",), needs=("forget", "test"), pool=True)
def rmia(p: Probe) -> list[Row]:
    """rmia.auc: the robust attack, each record's ratio against those of unseen records; works with few shadow models."""
    members, others, drawn, note = _parts(p)
    if len(drawn) < 4:
        return []
    half = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(p.seed))
    population, read = half[: len(half) // 2], half[len(half) // 2 :]
    own = {part: p.scores("after", part).nll.neg().exp() for part in ("forget", "test")}
    outside = lambda data: _out(p.pool.margins(data), p.pool.sides(data))  # noqa: E731
    forget_out, others_out = outside(members), outside(others)
    a = 0.3
    unseen = own["test"][drawn]
    args = (unseen[population], others_out[:, population])
    high, low = attacks.rmia(own["forget"], forget_out, *args, a=a), attacks.rmia(unseen[read], others_out[:, read], *args, a=a)
    return [Row("rmia.auc", *auc(high, low), len(high) + len(low), f"{note}; {len(population)} of them as population, a = {a}")]


@check(tasks=("classification",), needs=("forget", "test"))
def quantile(p: Probe) -> list[Row]:
    """quantile.auc, quantile.tpr: log-odds above what a quantile regression expects of an unseen record with these features; no shadow models.

    The regression is fitted on the inputs of the last layer of one half of the unseen records of the same labels, and read on the other half; 0.5
    and 0.05 by chance. Left out below 20 unseen records.
    """
    drawn, note = matched(p.split.forget.y, p.split.test.y, p.seed)
    if len(drawn) < 20:
        return []
    rows = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(p.seed))]
    fit, read = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    own = {part: p.scores("after", part).margin for part in ("forget", "test")}
    at = {part: features(p.after, p.task, getattr(p.split, part), "", 500).cpu().float() for part in own}
    known = own["test"][fit], at["test"][fit]
    high = attacks.quantile(own["forget"], at["forget"], *known, seed=p.seed)
    low = attacks.quantile(own["test"][read], at["test"][read], *known, seed=p.seed)
    note = f"{note}; {len(fit)} of them fitted"
    return [Row("quantile.auc", *auc(high, low), len(high) + len(low), note, indicative=True),
            Row("quantile.tpr", *wilson(int((high > 0).sum()), len(high)), len(high), note, indicative=True, at=0.05)]  # fmt: skip


def _out(phi: Tensor, inside: Tensor) -> Tensor:
    """(1, n) mean probability of the true label by the shadows that did not see the record, from log-odds phi (K, n)."""
    return (phi.sigmoid() * ~inside).sum(0, keepdim=True) / (~inside).sum(0, keepdim=True)


def _parts(p: Probe):
    """Forgotten records, unseen ones of the same labels, the positions of these in test, and how they were drawn."""
    p.pool.fits(p.after)
    drawn, note = matched(p.split.forget.y, p.split.test.y, p.seed)
    return p.split.forget, p.split.test.take(drawn), drawn, f"{note}; {len(p.pool.models)} shadow models"


def _rates(high: Tensor, low: Tensor, note: str) -> list[Row]:
    score, member = torch.cat([high, low]), torch.arange(len(high) + len(low)) < len(high)
    rows = []
    for rate in (0.01, 0.001):
        name = f"lira.tpr.{str(rate)[2:]}"
        if len(low) < 1 / rate:
            rows.append(Row(name, math.nan, -math.inf, math.inf, len(high), f"needs at least {1 / rate:,.0f} non-members, there are {len(low)}", at=rate))
        else:
            hits, n, _, m = attacks.rates(score, member, rate)
            rows.append(Row(name, *wilson(hits, n), n, f"{note}; threshold from {m} non-members", at=rate))
    return rows


def _bound(high: Tensor, low: Tensor, seed: int, note: str) -> Row:
    """epsilon from one half of the records with the threshold that is best on the other."""
    g = torch.Generator().manual_seed(seed)
    a, b = high[torch.randperm(len(high), generator=g)], low[torch.randperm(len(low), generator=g)]
    (a0, a1), (b0, b1) = (a[: len(a) // 2], a[len(a) // 2 :]), (b[: len(b) // 2], b[len(b) // 2 :])
    if not (len(a0) and len(b0)):
        return Row("lira.epsilon", math.nan, 0.0, math.inf, len(a), "too few records to choose a threshold and read it")
    cuts = torch.cat([a0, b0]).unique()
    best = max(cuts.tolist(), key=lambda c: epsilon.lower_bound(int((a0 <= c).sum()), len(a0), int((b0 > c).sum()), len(b0), form="jeffreys"))
    value = epsilon.lower_bound(int((a1 <= best).sum()), len(a1), int((b1 > best).sum()), len(b1))
    return Row("lira.epsilon", value, value, math.inf, len(a1) + len(b1), f"{note}; threshold chosen on the other half; a lower bound (joint beta, 95 %)")
