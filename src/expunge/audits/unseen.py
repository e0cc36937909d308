"""Unseen records of the same form, and whether the forgotten ones are better known than they: an exact test for requests of any size, one record included.

form     of a classifier's record: (the label that its nearest kept records have, the label that it has), so that a wrong label is compared with wrong
         labels that no model was taught; the label alone where inputs have no distance; of texts and all others, one form for all
unit     a record, or all records of one `cluster` (a field of texts: several wordings of one fact), whose losses are averaged; where all texts have a
         `paraphrased_question`, a record's loss is the mean of both ways to ask
u_i      share of the unseen units of the form of unit i with a larger loss, equal ones half
auc      mean of u_i: 0.5 where forgotten records look like unseen ones, 1 where all are better known
p        share of the ways to name as many of the pooled units of each form the forgotten ones whose mean of u is at least as large
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.core.registry import check
from expunge.core.stats import Z
from expunge.modalities.language.texts import GENERAL
from expunge.parts import forms
from expunge.parts.reading import Scores, score

DRAWS = 4999
"""Ways to name units forgotten that a p-value is read on."""


def neighbours(p: Probe, forget: Any) -> Tensor | None:
    """`parts.forms.neighbours` among kept records: those of retain, else of test."""
    return forms.neighbours(forget, p.split.retain if p.split.retain is not None else p.split.test)


@dataclass(frozen=True)
class Unseen:
    """Unseen records in the forms of the forgotten ones.

    data        M records of test, a classifier's with the label that the forgotten ones of the form have; one may stand there in several forms
    form        (M,) number of each one's form
    mine        (N,) number of each forgotten record's form, -1 where no unseen record has it
    """

    data: Any
    form: Tensor
    mine: Tensor


def strangers(data: Any) -> Tensor:
    """(M,) positions of the records that no model here was trained on: of texts those that ask for no general knowledge (`texts.GENERAL`)."""
    rows = getattr(data, "rows", None)
    return torch.arange(len(data)) if rows is None else torch.tensor([k for k, row in enumerate(rows) if row.get("set") not in GENERAL], dtype=torch.long)


def same_form(p: Probe) -> Unseen | None:
    """Those of the test part, once per audit; None where there is no test part, the request removes classes, or no unseen record has the form."""
    return p.once(("unseen",), p.before, lambda: _unseen(p))


def _unseen(p: Probe) -> Unseen | None:
    forget, test = p.split.forget, p.split.test
    if test is None or p.removed() or not len(rows := strangers(test)):
        return None
    test = test.take(rows)
    if p.scores("before", "forget").labels is None or not hasattr(test, "y") or test.y.dim() != 1:
        return Unseen(test, torch.zeros(len(test), dtype=torch.long), torch.zeros(len(forget), dtype=torch.long))
    said = neighbours(p, forget)
    rows, labels, form, mine = forms.paired(forget.y, forget.y if said is None else said, test.y)
    return Unseen(replace(test.take(rows), y=labels), form, mine) if len(rows) else None


def read(p: Probe, u: Unseen, model: nn.Module) -> Scores:
    """Scores of a model on these records, once per audit."""
    return p.once(("unseen scores",), model, lambda: score(model, p.task, u.data))


def clusters(data: Any) -> Tensor:
    """(N,) number of the unit of each record: those that share a `cluster` are one.

    >>> from types import SimpleNamespace as Data
    >>> clusters(Data(rows=({"cluster": "a"}, {}, {"cluster": "a"}))).tolist()
    [0, 1, 0]
    """
    rows = getattr(data, "rows", None) or [{}] * len(data)
    names = [("cluster", row["cluster"]) if isinstance(row.get("cluster"), (str, int)) else ("row", k) for k, row in enumerate(rows)]
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names], dtype=torch.long)


def means(values: Tensor, unit: Tensor) -> Tensor:
    """(U,) double means of (N,) over units 0..U-1."""
    count = unit.bincount().double()
    return torch.zeros(len(count), dtype=torch.double).index_add_(0, unit, values.double()) / count


def tested(mine: Tensor, form: Tensor, others: Tensor, other: Tensor, seed: int = 0, draws: int = DRAWS) -> tuple[float, float, float]:
    """(auc, its half-width under exchange, one-sided p) of losses (n,) in forms (n,) against those of unseen units `others` (m,) in forms `other` (m,).

    p = share of all ways to name as many of each form with a mean of u at least as large, where there are at most `draws`; else (1 + draws of a way with such a
    mean) / (1 + draws). One unit against m unseen ones reads at least 1 / (1 + m).

    >>> auc, _, p = tested(torch.tensor([0.0]), torch.zeros(1), torch.arange(1.0, 20.0), torch.zeros(19))
    >>> auc, round(p, 9)
    (1.0, 0.05)
    """
    g = torch.Generator().manual_seed(seed)
    whole = math.prod(math.comb(int((form == k).sum() + (other == k).sum()), int((form == k).sum())) for k in form.unique().tolist()) <= draws
    total, null, n = 0.0, torch.zeros(1 if whole else draws, dtype=torch.double), len(mine)
    for k in form.unique().tolist():
        a, b = mine[form == k].double(), others[other == k].double()
        total += float(forms.better(a, b).sum())
        pooled = torch.cat([a, b])
        ranks = (torch.searchsorted(pooled.sort().values, pooled) + torch.searchsorted(pooled.sort().values, pooled, right=True) + 1).double() / 2
        if whole:
            drawn = torch.tensor(list(itertools.combinations(range(len(pooled)), len(a))))
        else:
            drawn = torch.rand(draws, len(pooled), generator=g).topk(len(a), 1).indices
        wins = len(a) - (ranks[drawn].sum(1) - len(a) * (len(a) + 1) / 2) / len(b)
        null = (null[:, None] + wins).flatten() if whole else null + wins
    p = float((null >= total - 1e-9).double().mean()) if whole else (1 + int((null >= total - 1e-9).sum())) / (1 + draws)
    return total / n, Z * float((null / n).std()), p


@check(tasks=("classification", "causal_lm"), needs=("forget", "test"))
def unseen(p: Probe) -> list[Row]:
    """unseen.auc: mean share of unseen units of the same form with a larger loss; unseen.p: one-sided p of "forgotten ones are no better known"."""
    u = same_form(p)
    if u is None:
        return []
    mine, theirs = p.scores("after", "forget").nll, read(p, u, p.after).nll
    other = [getattr(data, "reworded", None) for data in (p.split.forget, u.data)]
    if all(data is not None for data in other):
        more = p.once(("reworded",), p.after, lambda: [score(p.after, p.task, data).nll for data in other])
        mine, theirs = (mine + more[0]) / 2, (theirs + more[1]) / 2
    return compared(p, u, "unseen", mine, theirs)


def compared(p: Probe, u: Unseen, name: str, mine: Tensor, theirs: Tensor) -> list[Row]:
    """The rows NAME.auc and NAME.p of a loss of each forgotten record (N,) and of each unseen one (M,)."""
    unit, other, form = clusters(p.split.forget), clusters(u.data), u.mine
    there = form >= 0
    if not there.any():
        return []
    left, right = unit[there].unique(return_inverse=True)[1], other
    kinds = means(form[there].double(), left).round().long()
    value, half, chance = tested(means(mine[there], left), kinds, means(theirs, right), means(u.form.double(), right).round().long(), p.seed)
    n, lost = len(kinds), int((~there).sum())
    note = f"{n} units against {int(right.max()) + 1} unseen of the same form{f'; {lost} have no unseen record of their form' if lost else ''}"
    return [
        Row(f"{name}.auc", value, max(0.0, value - half), min(1.0, value + half), n, note),
        Row(f"{name}.p", chance, chance, chance, n, f"{note}; one-sided, exact or {DRAWS:,} exchanges"),
    ]
