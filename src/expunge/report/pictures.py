"""The numbers behind the report's pictures: loss histograms, membership ROC, confusion, worst offenders, trade-off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from expunge.audits.core import Probe
from expunge.audits.pictures import drawn
from expunge.core.registry import PICTURES

LIMIT = 2000
"""Most losses kept per histogram."""


def pictures(p: Probe, tries: Sequence[Any]) -> dict[str, Any]:
    """JSON-able data for the plots of the report's schema; `p.after` is the model shown, `tries` are `outcome.Try`."""
    which = {"before": "before", "after": "after", **({"retrained": "reference0"} if p.references else {})}
    have = {n: part for n, part in p.split.parts().items() if not getattr(part, "bare", False)}  # prompts alone have no loss
    if "forget" not in have:
        return {"loss": {}, "scatter": [point for t in tries if (point := _point(t))], "offenders": [], **drawn.collect(p)}
    parts = [n for n in ("forget", "retain", "test") if n in have]
    loss = {part: {label: p.scores(name, part).nll[:LIMIT].tolist() for label, name in which.items()} for part in parts}
    out: dict[str, Any] = {"loss": loss, "scatter": [point for t in tries if (point := _point(t))]}
    if "test" in have:
        out["roc"] = {label: roc(p.scores(name, "forget").nll, _unseen(p, name)) for label, name in which.items()}
    out["offenders"] = offenders(p, which)
    return {**out, **drawn.collect(p)}


def _further(p: Probe) -> dict[str, Any]:
    """What the task's own pictures show."""
    return {name: data for shown in PICTURES.values() if shown.suits(p.task) for name, data in shown.function(p).items()}


def _unseen(p: Probe, name: str) -> torch.Tensor:
    seen, s = p.scores(name, "forget"), p.scores(name, "test")
    return s.nll if s.labels is None else s.nll[torch.isin(s.labels, seen.labels.unique())]


def roc(members: torch.Tensor, others: torch.Tensor, points: int = 101) -> dict[str, Any]:
    """Curve of the attack "low loss means member" on losses (N,) and (M,): fpr, tpr at `points` thresholds, and the area."""
    if not len(others):
        return {"fpr": [], "tpr": [], "auc": None}
    pooled = torch.cat([members, others])
    cuts = torch.cat([torch.tensor([-torch.inf]), pooled.quantile(torch.linspace(0, 1, points))])
    tpr = (members[None] <= cuts[:, None]).float().mean(1)
    fpr = (others[None] <= cuts[:, None]).float().mean(1)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist(), "auc": float(torch.trapezoid(tpr, fpr))}


def offenders(p: Probe, which: dict[str, str], most: int = 12) -> list[dict[str, Any]]:
    """The forget examples that still look most like training members: lowest loss against what a retrained model (or the mean unseen loss) has."""
    after = p.scores("after", "forget").nll
    reference = p.scores("reference0", "forget").nll if p.references else torch.zeros_like(after)
    worst = (after - reference).argsort()[:most]
    ids = getattr(p.split.forget, "ids", torch.arange(len(after)))
    losses = {label: p.scores(name, "forget").nll for label, name in which.items()}
    labels = p.scores("after", "forget").labels
    rows = []
    for i in worst.tolist():
        row: dict[str, Any] = {"id": int(ids[i]), "label": None if labels is None else int(labels[i])}
        rows.append({**row, **{label: float(values[i]) for label, values in losses.items()}})
    return rows


def _point(t: Any) -> dict[str, Any] | None:
    rows = {r.name: r.value for r in t.rows}
    forgetting = rows.get("gap_closed.klom", rows.get("gap_closed.kl"))
    if forgetting is None or forgetting != forgetting:
        forgetting = 1 - rows["accuracy.forget"] if "accuracy.forget" in rows else None
    utility = rows.get("accuracy.test", 1 - rows["drop.test"] if "drop.test" in rows else None)
    if forgetting is None or utility is None:
        return None
    return {
        "method": t.attempt.method,
        "seed": t.attempt.seed,
        "forgetting": forgetting,
        "utility": utility,
        "cost": t.attempt.meter.passes,
        "passed": t.passed,
    }
