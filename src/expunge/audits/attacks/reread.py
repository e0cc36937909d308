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
from expunge.audits.known import few, probability
from expunge.audits.membership.losses import targets
from expunge.audits.unseen import Unseen, compared, neighbours, same_form
from expunge.core.stats import Z, matched
from expunge.core.types import concat, spread
from expunge.parts.forms import better
from expunge.parts.reading import Scores, score

MOST = 256
"""Most records of each kind that a repair is read on; of texts a quarter of them."""

OTHERS = 128
"""Most kept records on which a repair of a removed class must leave the answers right."""

BACK = 0.1
"""Share of what the original knew that a repair of few records must bring back to be tested."""

LEAST = 0.1
"""Smallest difference between the original and what is gone that a share can be taken of."""


@dataclass(frozen=True)
class Reading:
    """Records to read a repaired model on: the first n of `data`; the others are unseen ones that losses are compared with, or kept ones of a class request.

    how    class, answers, losses, tokens, whole or label: what is known of a record
    top    (n,) what the original knows
    gone   what stands for a model that never saw them where no retrained one is at hand: a number, or nan where the unseen records of `data` say it
    why    `gone` in words
    stays  share of the kept records of `data` that the original answers rightly: a repair that breaks those has brought back nothing
    tail   forms of the unseen records of `data`, for few records (`audits.known.few`), whose losses are then tested against theirs
    """

    data: Any
    n: int
    how: str
    top: Tensor | None = None
    gone: float = math.nan
    why: str = ""
    stays: float = 0.0
    tail: Unseen | None = None

    @property
    def texts(self) -> bool:
        """Whether the records are texts."""
        return self.how in ("tokens", "whole")

    @property
    def plain(self) -> bool:
        """Whether the unseen records of `data`, read like the others, stand for a model that never saw them."""
        return self.texts or self.how == "label"

    def noise(self, s: Scores, others: Sequence[Scores]) -> float:
        """Deviation from one record to the next of what a model knows that never saw them, less what the others know: what a few records are read against.

        Probabilities: root mean square of that difference on the unseen ones of `data`, infinite without any; losses: that of a rank,
        1 / sqrt(12); answers: that of a label drawn with the share `gone`, 0.05 at least.
        """
        if self.plain:
            mine, rest = self.told(s)[self.n :], [self.told(o)[self.n :] for o in others]
            if len(mine) < 2:
                return math.inf
            return float((mine - torch.stack(rest).mean(0)).square().mean().sqrt()) if rest else float(mine.std())
        chance = max(self.gone, 0.05)
        return 12**-0.5 if self.how == "losses" else (chance * (1 - chance)) ** 0.5

    def told(self, s: Scores) -> Tensor:
        """(N,) double: the probability of each label, per answer token of each text, or of the whole answer."""
        return probability(s.nll, self.data, self.how == "whole")

    def known(self, s: Scores) -> Tensor:
        """(n,) double in 0..1: what these scores of `data` say is known of each record."""
        if self.how == "class":
            others = s.correct[self.n :].double()
            return s.correct[: self.n].double() * (min(1.0, float(others.mean()) / self.stays) if self.stays else 1.0)
        if self.how == "answers":
            return s.correct[: self.n].double()
        if self.plain:
            return self.told(s)[: self.n]
        return better(s.nll[: self.n], s.nll[self.n :])

    def absent(self, s: Scores) -> float:
        """What scores of the repaired candidate itself say a model knows that never saw the records; for audits without retrained models."""
        return float(self.told(s)[self.n :].mean()) if math.isnan(self.gone) and len(s.nll) > self.n else self.gone


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
    if few(p.split) and (u := same_form(p)) is not None and first.logits is not None:
        why = "the probability of unseen records given as wrong a label after the same repair"
        rows = spread(len(u.data), MOST)
        tail = Unseen(u.data.take(rows), u.form[rows], u.mine)
        return _topped(p, Reading(concat(forget, tail.data), len(forget), "label", why=why, tail=tail))
    said = neighbours(p, forget) if first.logits is not None else None
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
    forget, u, small = some(p.split.forget, MOST // 4), same_form(p), few(p.split)
    if u is None:
        return _topped(p, Reading(forget, len(forget), "whole" if small else "tokens", gone=0.0, why="0: there are no unseen texts"))
    rows, why = spread(len(u.data), MOST // 4), "the probability of unseen texts after the same repair"
    tail = Unseen(u.data.take(rows), u.form[rows], u.mine)
    data = concat(forget, tail.data)
    return _topped(p, Reading(data, len(forget), "whole" if small else "tokens", why=why, tail=tail if small else None))


def _mean(known: Tensor | None) -> float:
    return math.nan if known is None else float(known.mean())


def _topped(p: Probe, r: Reading) -> Reading:
    return replace(r, top=r.known(score(p.before, p.task, r.data)))


def _gap(p: Probe, r: Reading) -> float:
    """What the original knows above models that never saw the records."""
    rest = [float(r.known(score(m, p.task, r.data)).mean()) for m in p.references]
    return _mean(r.top) - (sum(rest) / len(rest) if rest else r.gone)


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


def regained(p: Probe, r: Reading, name: str, read: Callable[[nn.Module], Scores | None], said: str, fair: bool = True) -> Row | None:
    """The row `name`: (repaired - gone) / (original - gone), where `read` gives the scores of `r.data` of a model after the repair, None where it has none.

    fair   chosen without a look at the forgotten records, so that `noticed` may compare them with unseen ones afterwards

    Retrained models are repaired likewise; nan where the original knows less than LEAST more than they do.
    """
    scores = read(p.after)
    if scores is None:
        return None
    mine = r.known(scores)
    others = [s for s in map(read, p.references) if s is not None]
    rest = [r.known(s) for s in others]
    other = f"{len(rest)} retrained models after the same" if rest else f"no retrained model at hand, in their place {r.why}"
    rest = rest or [torch.full_like(mine, r.absent(scores))]
    gone, top = float(torch.stack(rest).mean()), _mean(r.top)
    note = f"{said}: {float(mine.mean()):.3g} of {top:.3g}; {gone:.3g} by {other}"
    if r.tail is not None and fair:
        _losses(p)[said] = scores.nll, (float(mine.mean()) - gone) / (top - gone) if top - gone >= LEAST else math.inf
    if top - gone < LEAST:
        return Row(name, math.nan, -math.inf, math.inf, r.n, f"{note}: nothing to bring back")
    row = above(name, mine, rest, note, top - gone)
    if not few(p.split):
        return row
    half = Z * r.noise(scores, others) / r.n**0.5 / (top - gone)
    return replace(row, low=row.value - half, high=row.value + half, note=f"{note}; interval by the spread of unseen records")


def _losses(p: Probe) -> dict[str, tuple[Tensor, float]]:
    """Losses of the candidate on a reading's records after each repair that was read, and the share that it brought back (inf: there is none to tell)."""
    return p.once(("repaired losses", p.seed), p.after, dict)


def noticed(p: Probe, r: Reading, name: str) -> list[Row]:
    """The row `name` for few records: the smallest p of `audits.unseen` over the fair repairs that bring back BACK or more, of losses after the repair against
    those of unseen records after the same; 1 where none does. Nothing for other requests.

    Ranks alone would tell a retrained model whose repair makes forgotten texts a billionth as probable as they were, and unseen ones a trillionth."""
    found = {} if r.tail is None else _losses(p)
    read = {label: compared(p, r.tail, name, nll[: r.n], nll[r.n :])[1:] for label, (nll, share) in found.items() if r.tail is not None and share >= BACK}
    tested = [(rows[0], label) for label, rows in read.items() if rows]
    if tested:
        row, label = min(tested, key=lambda pair: pair[0].value)
        return [replace(row, name=name, note=f"smallest of {len(tested)} repairs: {label}; {row.note}")]
    none = f"none of {len(found)} repairs brings back {BACK:.0%} of what was known"
    return [Row(name, 1.0, 1.0, 1.0, r.n, none)] if found and not any(share >= BACK for _, share in found.values()) else []
