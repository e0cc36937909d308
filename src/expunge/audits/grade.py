"""Grades: what a verdict may say, never greener than its evidence.

    refuted        evidence shows that it is not gone, or that the rest was harmed
    inconclusive   evidence is too thin; what would change that is said
    supported      everything at hand speaks for it, without a valid comparison with a model that never saw the records
    verified       the same, and a valid comparison: references that are believed, or an exact proof that was checked

Evidence comes in families: `output` (accuracy, loss, extraction), `closeness` (distance to models that never saw the records), `return` (what brings it
back) and `utility` (what must stay). `verified` needs a usable rule of every family that exists for the task, `supported` one of each but closeness. A rule
that is not usable counts against its family and is named; it is never dropped. The named checks of sections A and B are part of this: a FAIL refutes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expunge.audits.core import Row, bounds, enough
from expunge.audits.named import Named
from expunge.audits.verdict import UTILITY, Trial

GRADES = ("refuted", "inconclusive", "supported", "verified")
"""The weakest first."""

FAMILIES = ("output", "closeness", "return", "utility")

CLOSENESS = ("klom", "gap_closed.kl", "gap_closed.margin", "kl", "js", "tofu.", "oracle_gap.closed", "oracle_gap.recognised", "plants.margin")
RETURN = ("gap_closed.relearning", "relearn", "restore.", "repair.", "plants.relearn", "plants.repair")
"""Prefixes of rows by family; UTILITY are those of what must stay, and every other row is output."""

STATES = ("broken", "thin", "near", "missing", "unusable", "holds")


def family(name: str) -> str:
    """The family of a row.

    >>> family("accuracy.forget"), family("klom_ratio.forget"), family("klom_ratio.retain"), family("repair.free")
    ('output', 'closeness', 'utility', 'return')
    """
    if name.startswith(UTILITY):
        return "utility"
    return "return" if name.startswith(RETURN) else "closeness" if name.startswith(CLOSENESS) else "output"


@dataclass(frozen=True)
class Finding:
    """One rule read: its family, broken, thin (the value is outside, the interval reaches in), near (the value is inside, the interval reaches out), missing,
    unusable (failed its self-test) or holds, and in words why."""

    family: str
    name: str
    rule: str
    state: str
    why: str = ""


@dataclass(frozen=True)
class Grade:
    """What the evidence allows to say: the grade, every finding, what keeps it from the grade above, and what would change that."""

    grade: str
    findings: tuple[Finding, ...] = ()
    why: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def reaches(self, required: str) -> bool:
        """Whether it is at least the required grade."""
        return GRADES.index(self.grade) >= GRADES.index(required)


def found(rows: Sequence[Row], trials: Sequence[Trial]) -> tuple[Finding, ...]:
    """Each rule of a self-test read on the rows."""
    by_name = {r.name: r for r in rows}
    return tuple(Finding(family(t.name), t.name, t.rule, *_state(by_name.get(t.name), t)) for t in trials)


def _state(row: Row | None, trial: Trial) -> tuple[str, str]:
    if not trial.usable:
        return "unusable", f"it failed its self-test: the model that must fail reads {trial.original}, a retrained one {trial.retrained or 'none at hand'}"
    if row is None or math.isnan(row.value):
        return "missing", row.note if row else "it was not measured"
    low, high = bounds(trial.rule)
    said = f"{row.value:.4g} ({row.low:.4g} to {row.high:.4g}, n = {row.n})"
    if row.low >= low and row.high <= high:
        return "holds", said
    if (row.value > high and row.low > high) or (row.value < low and row.high < low):
        return ("thin", f"{said}, which is indicative and decides nothing alone") if row.indicative else ("broken", said)
    more = enough(row, low, high)
    return "near" if low <= row.value <= high else "thin", said + (f": too few records, about {more:,} would do" if more else "")


def grade(
    findings: Sequence[Finding], named: Sequence[Named], *, families: Sequence[str] = FAMILIES, comparison: str = "", doubts: Sequence[str] = ()
) -> Grade:
    """The grade that findings and named checks allow.

    families     those that exist for the task
    comparison   the valid comparison in words ("3 references"), or nothing
    doubts       what else keeps it from `verified`, as references that were refused
    """
    state = {s: [f for f in findings if f.state == s] for s in STATES}
    failed = [n for n in named if n.verdict == "FAIL" and n.id[0] in "AB"]
    against = [_said(f) for f in state["broken"]] + [f"{n.id} {n.statement}: {n.why}" for n in failed]
    if against:
        return Grade("refuted", tuple(findings), tuple(against))
    held = {f.family for f in state["holds"]}
    weak = [f for s in ("thin", "near", "missing", "unusable") for f in state[s]]
    lacking = [name for name in families if name not in held]
    more = [*_asked(weak), *([] if comparison else ["references that never saw the records: `expunge retrain` makes them"])]
    unclear = [f for s in ("thin", "missing", "near") for f in state[s] if s != "near" or f.family != "closeness"]
    if unclear or set(lacking) - {"closeness"}:
        why = [_said(f) for f in weak] + [f"no rule of {name} holds" for name in lacking if name != "closeness"]
        return Grade("inconclusive", tuple(findings), tuple(why), tuple(more))
    short = [_said(f) for s in ("near", "unusable") for f in state[s]] + [f"no usable rule of {name}" for name in lacking] + list(doubts)
    if not comparison:
        short.insert(0, "nothing here was compared with a model that never saw the records")
    if short:
        return Grade("supported", tuple(findings), tuple(short), tuple(more))
    return Grade("verified", tuple(findings))


def _said(f: Finding) -> str:
    near = "cannot be told from breaking"
    what = {"broken": "breaks", "thin": near, "near": near, "missing": "was asked to keep", "unusable": "cannot be read by"}[f.state]
    return f"{f.name} {what} {f.rule}: {f.why}"


def _asked(weak: Sequence[Finding]) -> list[str]:
    """What would change the grade."""
    out = ["more unseen records of the same form, in the test part" for f in weak if f.state in ("thin", "near")][:1]
    return out + ["more references, for rules that failed their self-test" for f in weak if f.state == "unusable"][:1]


def document(g: Grade | None) -> dict[str, Any] | None:
    """JSON-able form for reports."""
    if g is None:
        return None
    return {
        "grade": g.grade, "why": list(g.why), "more": list(g.more),
        "families": {name: [vars(f) for f in g.findings if f.family == name] for name in FAMILIES if any(f.family == name for f in g.findings)},
    }  # fmt: skip
