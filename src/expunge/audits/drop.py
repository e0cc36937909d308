"""Utility lost, example by example against the same reference answers: narrower intervals than two separate accuracies.

drop.<part> = mean over examples of (reference is right - candidate is right), the reference being the mean over retrained models, or
the model before where there are none. Removed classes are left out. For regression: mean of (candidate's absolute error - reference's),
in units of the reference's mean absolute error. For texts: the probability per target token that was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.core.modality import of
from expunge.core.registry import check
from expunge.core.stats import Z
from expunge.parts.reading import Scores

GROUP = 5
"""Least records of a group of texts that is read on its own."""


@check(tasks=("classification", "regression", "causal_lm"), needs=("forget",))
def drop(p: Probe) -> list[Row]:
    """Rows drop.retain, drop.test and drop.general, of the parts that are there; positive means worse than the reference. drop.worst: the kept class
    that lost most on test; of texts, the author, subject or set that lost most of retain and general, with bounds that hold for all of them.

    Of records and classes there is nothing without retain, which says what classes are kept.
    """
    if p.split.retain is None and not of(p.task).alone:
        return []
    names = [f"reference{k}" for k in range(len(p.references))] or ["before"]
    note = f"against the mean of {len(p.references)} retrained models" if p.references else "against the model before"
    removed = torch.tensor(p.removed())
    rows, kept = [], []
    for part in ("retain", "test", "general"):
        data = getattr(p.split, part)
        if data is None:
            continue
        after = p.scores("after", part)
        keep = torch.ones(len(after.nll), dtype=torch.bool) if after.labels is None else ~torch.isin(after.labels, removed)
        reference = torch.stack([badness(p.scores(name, part))[keep] for name in names]).mean(0)
        mine = badness(after)[keep]
        scale = float(reference.mean().clamp(min=1e-12)) if of(p.task).relative else 1.0
        rows.append(paired(f"drop.{part}", (mine - reference) / scale, note))
        if part == "test" and after.labels is not None:
            labels = after.labels[keep]
            each = {k: paired("drop.worst", (mine - reference)[labels == k], f"class {k}; {note}") for k in labels.unique().tolist()}
            rows += [max(each.values(), key=lambda r: r.value)] if each else []
        if part != "test" and hasattr(data, "rows"):
            kept.append((data.rows, mine - reference))
    return rows + (worst([row for some, _ in kept for row in some], torch.cat([d for _, d in kept]), note) if kept else [])


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Positions of the records that share `author`, `subject` or `set`, by what they share: at least GROUP of them and not all.

    >>> groups([{"author": "A"}] * 5 + [{"author": "B"}] * 4 + [{"set": "facts"}])
    {'author A': [0, 1, 2, 3, 4]}
    """
    found: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        for field in ("author", "subject", "set"):
            if row.get(field):
                found.setdefault(f"{field} {row[field]}", []).append(k)
    return {label: index for label, index in found.items() if GROUP <= len(index) < len(rows)}


def worst(rows: Sequence[Mapping[str, Any]], lost: Tensor, note: str) -> list[Row]:
    """drop.worst of texts that lost so much probability (N,): the largest mean of a group, between the largest of the groups' lower and of their upper
    bounds, which hold for all groups at once (Bonferroni)."""
    found = groups(rows)
    z = NormalDist().inv_cdf(1 - 0.05 / max(1, len(found)))
    each = [paired("drop.worst", lost[index], f"{label}, the worst of {len(found)} groups; {note}", z) for label, index in found.items()]
    if not each:
        return []
    return [replace(max(each, key=lambda r: r.value), low=max(r.low for r in each), high=max(r.high for r in each))]


def badness(s: Scores) -> Tensor:
    """(N,) 1 where a classifier is wrong; a regressor's mean absolute error; for texts 1 - exp(-loss per token), the probability that a token lacks."""
    if s.logits is not None:
        return 1.0 - s.correct.float()
    if s.pred is None:
        return 1.0 - (-s.nll).exp()
    return (s.pred - s.target).abs().reshape(len(s.pred), -1).mean(1)


def paired(name: str, differences: Tensor, note: str, z: float = Z) -> Row:
    """Mean of (N,) differences with normal one-sided bounds (95 % at z = 1.645), widened by 1.5 / n so that a spread of zero still has a width."""
    n = len(differences)
    mean, error = float(differences.mean()), z * float(differences.std(correction=0)) / n**0.5 + 1.5 / n
    return Row(name, mean, mean - error, mean + error, n, note)
