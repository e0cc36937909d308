"""Utility lost, example by example against the same reference answers: narrower intervals than two separate accuracies.

drop.<part> = mean over examples of (reference is right - candidate is right), the reference being the mean over retrained models, or
the model before where there are none. Removed classes are left out. For regression: mean of (candidate's absolute error - reference's),
in units of the reference's mean absolute error. For texts: the probability per target token that was lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row, Scores
from expunge.registry import check

Z = 1.6448536269514722
"""One-sided 95 % quantile of the normal distribution."""


@check(tasks=("classification", "regression", "causal_lm"), needs=("retain",))
def drop(p: Probe) -> list[Row]:
    """Rows drop.retain, drop.test and drop.general, of the parts that are there; positive means worse than the reference. drop.worst: the kept class
    that lost most on test."""
    names = [f"reference{k}" for k in range(len(p.references))] or ["before"]
    note = f"against the mean of {len(p.references)} retrained models" if p.references else "against the model before"
    removed = torch.tensor(p.removed())
    rows = []
    for part in ("retain", "test", "general"):
        if part not in p.split.parts():
            continue
        after = p.scores("after", part)
        keep = torch.ones(len(after.nll), dtype=torch.bool) if after.labels is None else ~torch.isin(after.labels, removed)
        reference = torch.stack([badness(p.scores(name, part))[keep] for name in names]).mean(0)
        mine = badness(after)[keep]
        scale = 1.0 if p.task.name != "regression" else float(reference.mean().clamp(min=1e-12))
        rows.append(paired(f"drop.{part}", (mine - reference) / scale, note))
        if part == "test" and after.labels is not None:
            labels = after.labels[keep]
            each = {k: paired("drop.worst", (mine - reference)[labels == k], f"class {k}; {note}") for k in labels.unique().tolist()}
            rows += [max(each.values(), key=lambda r: r.value)] if each else []
    return rows


def badness(s: Scores) -> Tensor:
    """(N,) 1 where a classifier is wrong; a regressor's mean absolute error; for texts 1 - exp(-loss per token), the probability that a token lacks."""
    if s.logits is not None:
        return 1.0 - s.correct.float()
    if s.pred is None:
        return 1.0 - (-s.nll).exp()
    return (s.pred - s.target).abs().reshape(len(s.pred), -1).mean(1)


def paired(name: str, differences: Tensor, note: str) -> Row:
    """Mean of (N,) differences with normal one-sided 95 % bounds, widened by 1.5 / n so that a spread of zero still has a width."""
    n = len(differences)
    mean, error = float(differences.mean()), Z * float(differences.std(correction=0)) / n**0.5 + 1.5 / n
    return Row(name, mean, mean - error, mean + error, n, note)
