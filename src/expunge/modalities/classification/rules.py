"""The default gate of classifiers."""

from __future__ import annotations

import math
from typing import Any

from expunge.modalities.records import FEWER, mended, planted, unnoticed

KEPT = {"drop.test": "<= 0.03", "drop.retain": "<= 0.03"}


def rules(p: Any) -> dict[str, str]:
    """Chosen from the power tables (docs/how-to-read-the-evidence.md), one of every family where references are at hand.

    KLOM (three references or more; in floors) or KL (one or two) refuses answers that are unlike a retrained model's, in either direction; relearning, and for
    records training on what is kept, refuse a suppression whose answers look right.
    """
    return {**(_class(p) if p.removed() else _records(p)), **mended(p), **KEPT}


def _class(p: Any) -> dict[str, str]:
    limit, k = _limit(p), len(p.references)
    answers = {"accuracy.forget": f"<= {limit:.6f}", "accuracy.forget_test": f"<= {max(limit, 0.1):.6f}"}
    close = {"klom_ratio.forget": "<= 8"} if k >= 3 else {"gap_closed.kl": ">= 0.8"} if k else {}
    return {**answers, **close, **({"gap_closed.relearning": ">= 0.55"} if k else {})}


def _records(p: Any) -> dict[str, str]:
    """With any retrained model, what is known. With three or more klom_ratio.forget at most half way from 1 to what doing nothing reads, at most 4 floors
    (the gap, unusable, where doing nothing is not apart), with fewer the gap of margins, with both what training on kept records leaves. Few records are
    tested against unseen ones besides, and have the gap of margins. Planted controls count with these, and without a retrained model stand alone; where
    there are neither, unseen records do."""
    k, small, on_plants = len(p.references), len(p.split.forget) < FEWER, planted(p)
    if not k:
        return on_plants or unnoticed(p)
    if small:
        return {**unnoticed(p), "known.excess": "<= 0.1", "gap_closed.margin": ">= 0.5", **on_plants}
    rest = {"known.excess": "<= 0.1", "restore.closed": ">= 0.5", **on_plants}
    if k < 3:
        return {"gap_closed.margin": ">= 0.5", **rest}
    rows = {r.name: r for r in p.rows(["klom"], after=p.before)}
    if not math.isfinite(rows["gap_closed.klom"].value):
        return {"gap_closed.klom": ">= 0.5", **rest}
    return {"klom_ratio.forget": f"<= {min(4.0, (1 + rows['klom_ratio.forget'].value) / 2):.3g}", **rest}


def _limit(p: Any) -> float:
    """Highest accuracy on the forget set that retrained models allow (largest upper bound of one), 0.05 without them."""
    rows = [row for model in p.references for row in p.rows(["accuracy"], after=model, references=())]
    return max((row.high for row in rows if row.name == "accuracy.forget"), default=0.05) + 1e-6
