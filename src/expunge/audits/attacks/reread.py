"""What a model knows of what must go, record by record, and what a repair brings back of it: the readings that `repair` is made of.

known of a record    a removed class: it is answered, times the share of right answers that kept records have left: a foreign last layer names any class
                     by luck, and breaks the rest; records: it is answered with the label it was given, or the share of matched unseen records with a larger
                     loss; texts: the probability per answer token
regained             (repaired - gone) / (original - gone), means over records; gone: retrained models after the same repair
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.membership.losses import targets
from expunge.core.stats import Z, matched
from expunge.core.types import concat, spread
from expunge.parts.reading import Scores, score

MOST = 256
"""Most records of each kind that a repair is read on; of texts a quarter of them."""

OTHERS = 128
"""Most kept records on which a repair of a removed class must leave the answers right."""

LEAST = 0.1
"""Smallest difference between the original and what is gone that a share can be taken of."""


@dataclass(frozen=True)
class Reading:
    """Records to read a repaired model on: the first n of `data`; the others are unseen ones that losses are compared with, or kept ones of a class request.

    how    class, answers, losses or tokens: what is known of a record
    top    (n,) what the original knows
    gone   what stands for a model that never saw them where no retrained one is at hand: a number, or nan where the unseen records of `data` say it
    why    `gone` in words
    stays  share of the kept records of `data` that the original answers rightly: a repair that breaks those has brought back nothing
    """

    data: Any
    n: int
    how: str
    top: Tensor | None = None
    gone: float = math.nan
    why: str = ""
    stays: float = 0.0

    def known(self, s: Scores) -> Tensor:
        """(n,) double in 0..1: what these scores of `data` say is known of each record."""
        if self.how == "class":
            others = s.correct[self.n :].double()
            return s.correct[: self.n].double() * (min(1.0, float(others.mean()) / self.stays) if self.stays else 1.0)
        if self.how == "answers":
            return s.correct[: self.n].double()
        if self.how == "tokens":
            return (-s.nll[: self.n]).exp().double()
        losses = s.nll[self.n :].sort().values
        below, above = (torch.searchsorted(losses, s.nll[: self.n], right=side) for side in (False, True))
        return 1 - (below + above).double() / (2 * max(1, len(losses)))

    def absent(self, s: Scores) -> float:
        """What scores of the repaired candidate itself say a model knows that never saw the records; for audits without retrained models."""
        return float((-s.nll[self.n :]).exp().mean()) if math.isnan(self.gone) and len(s.nll) > self.n else self.gone


def some(data: Any, most: int) -> Any:
    """At most `most` records, evenly apart."""
    return data.take(spread(len(data), most))


def reading(p: Probe) -> Reading | None:
    """How this request is read, or None where nothing can be compared; computed once per audit."""
    return p.once(("reading", p.seed, tuple(map(id, p.references))), p.before, lambda: _reading(p))


def _reading(p: Probe) -> Reading | None:
    first, test = p.scores("before", "forget"), p.split.test
    if first.logits is None and first.pred is None:
        return _texts(p)
    classes = torch.tensor(p.removed())
    if len(classes) and first.logits is not None:
        there = [] if test is None else [test.take(torch.isin(test.y, classes).nonzero().squeeze(1))]
        data = concat(some(p.split.forget, MOST), *(some(d, MOST) for d in there if len(d)))
        others = p.split.retain if test is None else test.take((~torch.isin(test.y, classes)).nonzero().squeeze(1))
        whole = concat(data, some(others, OTHERS)) if others is not None and len(others) else data
        chance, right = 1 / first.logits.shape[1], score(p.before, p.task, whole).correct[len(data) :].double()
        stays = float(right.mean()) if len(right) else 0.0
        return _topped(p, Reading(whole, len(data), "class", gone=chance, why=f"chance, {chance:.3g}", stays=stays))
    forget, unseen = some(p.split.forget, MOST), None
    said = _neighbours(p, forget) if first.logits is not None else None
    if test is not None and said is not None:
        unseen = _like(p, forget, said)
    elif test is not None:
        mine, other = targets(first)[spread(len(p.split.forget), MOST)], targets(p.scores("before", "test"))
        drawn, _ = matched(mine, other, p.seed)
        unseen = some(test.take(drawn), MOST) if len(drawn) else None
    found = []
    if unseen is not None:
        found.append(_topped(p, Reading(concat(forget, unseen), len(forget), "losses", gone=0.5, why="0.5, losses like those of unseen records")))
    if first.logits is not None:
        share = 1.0 if said is None else float((said == forget.y).float().mean())
        found.append(_topped(p, Reading(forget, len(forget), "answers", gone=share, why=f"{share:.3g}, what the nearest kept records say of them")))
    return max(found, key=lambda r: _gap(p, r), default=None)


def _texts(p: Probe) -> Reading:
    forget = some(p.split.forget, MOST // 4)
    unseen = [] if p.split.test is None else [some(p.split.test, MOST // 4)]
    why = "the probability of unseen texts after the same repair" if unseen else "0: there are no unseen texts"
    return _topped(p, Reading(concat(forget, *unseen), len(forget), "tokens", gone=math.nan if unseen else 0.0, why=why))


def _mean(known: Tensor | None) -> float:
    return math.nan if known is None else float(known.mean())


def _topped(p: Probe, r: Reading) -> Reading:
    return replace(r, top=r.known(score(p.before, p.task, r.data)))


def _gap(p: Probe, r: Reading) -> float:
    """What the original knows above models that never saw the records."""
    rest = [float(r.known(score(m, p.task, r.data)).mean()) for m in p.references]
    return _mean(r.top) - (sum(rest) / len(rest) if rest else r.gone)


def _neighbours(p: Probe, forget: Any) -> Tensor | None:
    """(n,) the label that most of the 5 nearest kept records have, by distance between inputs: what can be said of a record without having seen it."""
    kept = p.split.retain if p.split.retain is not None else p.split.test
    if kept is None or not isinstance(forget.x, Tensor) or not forget.x.is_floating_point():
        return None
    kept = some(kept, 8 * MOST)
    near = torch.cdist(forget.x.flatten(1).float(), kept.x.flatten(1).float()).topk(min(5, len(kept)), largest=False).indices
    return kept.y[near].mode(1).values


def _like(p: Probe, forget: Any, said: Tensor) -> Any:
    """Unseen records for the forgotten ones, one each where the test part has as many: of the label that its neighbours have, given the label that it has.

    So a wrong label is compared with wrong labels that no model was taught.
    """
    g, test = torch.Generator().manual_seed(p.seed), p.split.test
    pools = {k: (test.y == k).nonzero().squeeze(1) for k in said.unique().tolist()}
    order = {k: rows[torch.randperm(len(rows), generator=g)].tolist() for k, rows in pools.items()}
    pairs = [(order[k].pop(), y) for k, y in zip(said.tolist(), forget.y.tolist(), strict=True) if order[k]]
    if not pairs:
        return None
    data = test.take([k for k, _ in pairs])
    return replace(data, y=torch.tensor([y for _, y in pairs], dtype=data.y.dtype))


def above(name: str, mine: Tensor, rest: Sequence[Tensor], note: str, scale: float = 1.0) -> Row:
    """Mean over records of (mine - mean of the rest) / scale, of tensors (n,), with the spread between models of the rest added in squares."""
    centre = torch.stack(list(rest)).mean(0)
    row = paired(name, (mine - centre) / scale, note)
    between = torch.tensor([float(r.mean()) for r in rest]).var(correction=1).item() / scale**2 if len(rest) > 1 else 0.0
    half = math.hypot(row.value - row.low, Z * (between * (1 + 1 / len(rest))) ** 0.5)
    return replace(row, low=row.value - half, high=row.value + half)


def regained(p: Probe, r: Reading, name: str, read: Callable[[nn.Module], Scores | None], said: str) -> Row | None:
    """The row `name`: (repaired - gone) / (original - gone), where `read` gives the scores of `r.data` of a model after the repair, None where it has none.

    Retrained models are repaired likewise; nan where the original knows less than LEAST more than they do.
    """
    scores = read(p.after)
    if scores is None:
        return None
    mine = r.known(scores)
    rest = [r.known(s) for s in map(read, p.references) if s is not None]
    other = f"{len(rest)} retrained models after the same" if rest else f"no retrained model at hand, in their place {r.why}"
    rest = rest or [torch.full_like(mine, r.absent(scores))]
    gone, top = float(torch.stack(rest).mean()), _mean(r.top)
    note = f"{said}: {float(mine.mean()):.3g} of {top:.3g}; {gone:.3g} by {other}"
    if top - gone < LEAST:
        return Row(name, math.nan, -math.inf, math.inf, r.n, f"{note}: nothing to bring back")
    return above(name, mine, rest, note, top - gone)
