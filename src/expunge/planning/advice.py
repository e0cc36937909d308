"""What a verdict that did not pass says to whoever must go on: which rule stopped the best tries, by how much, and what is most likely to help."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from expunge.audits.core import Row, bounds
from expunge.audits.grade import GRADES, Finding
from expunge.core.registry import METHODS
from expunge.engine.run import GRADED
from expunge.planning.outcome import Try

SHOWN = 3
"""Tries that are told in full."""

STATES = ("broken", "missing", "unusable", "thin", "near")
"""States of a rule that stop a try, the most telling first."""

HARM, REMAINS = "utility", ("output", "return", "closeness")
"""Families of evidence, by what more strength does to them."""


def stopped(t: Try) -> list[Finding]:
    """The rules that stop a try, the most telling first: broken ones, and by how much of their limit."""
    found = [f for f in (t.grade.findings if t.grade else ()) if f.state in STATES]
    rows = {r.name: r for r in t.rows}
    return sorted(found, key=lambda f: (STATES.index(f.state), -beyond(rows[f.name], f.rule) if f.name in rows else 0.0))


def beyond(row: Row, rule: str) -> float:
    """How far the worse end of a row lies outside its rule, in units of the limit (of 1 where that is 0); 0 within, 1 where there is no number.

    >>> beyond(Row("drop.test", 0.04, 0.03, 0.045, 100), "<= 0.03"), beyond(Row("auc", 0.5, 0.45, 0.55, 100), "0.3..0.7")
    (0.5, 0.0)
    """
    low, high = bounds(rule)
    if math.isnan(row.value):
        return 1.0
    over, limit = max((row.high - high, high), (low - row.low, low))
    return max(0.0, over) / (abs(limit) or 1.0) if math.isfinite(limit) else 0.0


def nearest(tries: Sequence[Try], most: int = SHOWN) -> list[Try]:
    """The best audited tries: by outcome, by grade, by how few rules stop them, by the score on validation."""

    def rank(t: Try) -> tuple:
        rows, broken = {r.name: r for r in t.rows}, [f for f in stopped(t) if f.state == "broken"]
        far = sum(min(1.0, beyond(rows[f.name], f.rule)) for f in broken if f.name in rows)
        return t.attempt.outcome == "ok", GRADES.index(t.grade.grade), -len(broken), -far, t.score if t.score is not None else -math.inf

    return sorted((t for t in tries if t.grade is not None and t.attempt.outcome in GRADED), key=rank, reverse=True)[:most]


def explained(tries: Sequence[Try], *, general: bool = True, retain: bool = True) -> list[str]:
    """Sentences for a verdict that did not pass: what stopped the best tries, and the changes most likely to help."""
    best = nearest(tries)
    if not best:
        return []
    said = [f"{t.attempt.method} ({strength(t)}) was stopped by {_by(t)}" for t in best]
    return [*said, *(f"Most likely to help: {change}." for change in changes(best, general=general, retain=retain))]


def _by(t: Try) -> str:
    mine = stopped(t)
    if not mine:
        return "no rule, but " + (t.grade.why[0] if t.grade and t.grade.why else t.attempt.reason or "its outcome")
    first = mine[0]
    what = f"{first.name} {first.rule}: {first.why or first.state}" if first.state != "unusable" else f"{first.name}, which is unusable here: {first.why}"
    return what + (f" ({first.state}" + (f", and {len(mine) - 1} rules more)" if len(mine) > 2 else ", and one rule more)" if len(mine) == 2 else ")"))


def strength(t: Try) -> str:
    """The settings that differ most from run to run, in words."""
    shown = {k: v for k, v in t.attempt.settings.items() if k in ("lr", "epochs", "scale", "alpha", "kappa") and METHODS[t.attempt.method].defaults.get(k) != v}
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()) or "as published"


def changes(best: Sequence[Try], *, general: bool = True, retain: bool = True, most: int = 2) -> list[str]:
    """The changes that the evidence speaks for, most of it first: of what stops the best tries, what each cause asks for."""
    causes = Counter(cause for t in best for cause in _causes(t))
    told: Mapping[str, str] = {
        "harm": "push less hard (a smaller step, a larger weight of retain), or train longer with more of what must stay"
        + ("" if retain else ": retain data are missing") + ("" if general else "; give general texts of what the model knows besides (general)"),
        "remains": "push harder: a larger step or more epochs, or a method of another family, since what must go is still there",
        "suppressed": "choose a method that moves more than the last layers: what was forgotten comes back",
        "thin": "more records to read: in the request, in test, or in the part whose interval is too wide",
        "unusable": "references that never saw the records (`expunge retrain` makes them), since rules could not be tried on this model and data",
        "compared": "references that never saw the records (`expunge retrain` makes them), or a lower grade (require=supported)",
    }  # fmt: skip
    return [told[cause] for cause, _ in causes.most_common(most)]


def _causes(t: Try) -> list[str]:
    found = []
    if t.attempt.outcome == "harmed":
        found.append("harm")
    for f in stopped(t):
        if f.state == "broken":
            found.append("harm" if f.family == HARM else "suppressed" if f.family == "return" else "remains")
        else:
            found.append("thin" if f.state in ("thin", "near") else "unusable")
    if not found and t.grade is not None and t.grade.grade == "supported":
        found.append("compared")
    return list(dict.fromkeys(found))
