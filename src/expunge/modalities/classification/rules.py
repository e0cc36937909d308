"""The default gate of classifiers."""

from __future__ import annotations

import math
from typing import Any


def rules(p: Any) -> dict[str, str]:
    """Chosen from the power tables (docs/how-to-read-the-evidence.md). KLOM refuses answers that are unlike a retrained model's, in either direction;
    relearning refuses a suppression whose answers look right: both are needed for a class, KLOM alone for records. Repairs refuse what
    comes back without training."""
    kept = {"repair.free": "<= 0.5", "drop.test": "<= 0.03", "drop.retain": "<= 0.03"}
    if p.removed():
        limit = _limit(p)
        inside = {"gap_closed.klom": ">= 0.5", "gap_closed.relearning": ">= 0.55"} if len(p.references) >= 2 else {}
        answers = {"accuracy.forget": f"<= {limit:.6f}", "accuracy.forget_test": f"<= {max(limit, 0.1):.6f}"}
        return {**answers, **inside, **kept}
    goes = _records(p) if len(p.references) >= 2 else {"membership.loss_auc": "0.4..0.6"}
    return {**goes, **kept}


def _records(p: Any) -> dict[str, str]:
    """klom_ratio.forget at most half way from 1 to what doing nothing reads, and at most 4 floors; the gap, unusable, where doing nothing is not apart."""
    rows = {r.name: r for r in p.rows(["klom"], after=p.before)}
    if not math.isfinite(rows["gap_closed.klom"].value):
        return {"gap_closed.klom": ">= 0.5"}
    return {"klom_ratio.forget": f"<= {min(4.0, (1 + rows['klom_ratio.forget'].value) / 2):.3g}"}


def _limit(p: Any) -> float:
    """Highest accuracy on the forget set that retrained models allow (largest upper bound of one), 0.05 without them."""
    rows = [row for model in p.references for row in p.rows(["accuracy"], after=model, references=())]
    return max((row.high for row in rows if row.name == "accuracy.forget"), default=0.05) + 1e-6
