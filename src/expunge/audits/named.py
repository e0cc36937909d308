"""The named checks A1 to D9, each PASS, FAIL or UNKNOWN, by section, Holm-corrected inside a section. Source: card open-problems.

A named check reads rows that the audit has measured. PASS: the worse end of the interval is inside the limit. FAIL: the value is outside, and
significantly so after Holm's correction over its section. UNKNOWN: a row is missing, or there are too few records to tell. Limits without a
retrained reference would be arbitrary, so checks that need one say UNKNOWN without it. Some statements have another form for texts, with other rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import norm

from expunge.audits.core import Probe, Row
from expunge.audits.verdict import checks_for
from expunge.core.modality import of
from expunge.core.registry import CHECKS
from expunge.core.stats import Z
from expunge.core.types import Task, held

ALPHA = 0.05
ORDER = ("FAIL", "UNKNOWN", "PASS")
"""Verdicts, the weakest first."""

SECTIONS = {"A": "Removal", "B": "Robustness of removal", "C": "Preservation and side effects", "D": "Process"}


@dataclass(frozen=True)
class Named:
    """One check: its id, what it states, PASS, FAIL or UNKNOWN, why, the p-value of "the statement holds" and the row behind it. `absent`: nothing measures
    this on models of the kind."""

    id: str
    statement: str
    verdict: str
    why: str
    p: float = math.nan
    row: str = ""
    absent: bool = False


@dataclass(frozen=True)
class Rule:
    """A statement about rows: each must lie in low..high.

    models   retrained references that the rows need            parts   of the split, beside those that the rows' check needs
    missing  what else the rows need                            alone   True: the form for modalities whose kept data is read alone (`Modality.alone`), as
             texts are; False: for the others
    """

    id: str
    statement: str
    rows: tuple[str, ...]
    low: float
    high: float
    models: int = 1
    parts: tuple[str, ...] = ()
    missing: str = ""
    alone: bool | None = None

    def made_for(self, task: Task) -> bool:
        """Whether this is the form of the statement for that task."""
        return self.alone is None or self.alone == of(task).alone


RULES = (
    Rule("A1", "forgotten records behave as if never trained on", ("gap_closed.klom",), 0.5, math.inf, 2),
    Rule("A2", "forgotten texts are not said word for word", ("memorised.extraction_strength.excess",), -math.inf, 0.1, alone=True),
    Rule("A3", "membership of forgotten records is hidden, both ways", ("lira.excess", "membership.excess"), -0.05, 0.05),
    Rule("A4", "what is gone is gone on unseen records of the class", ("accuracy.forget_test",), -math.inf, 0.1, 0, ("retain", "test"),
         "needs a removed class", False),
    Rule("A4", "what is gone is gone however it is asked for", ("probes.excess", "knowundo.rephrased.excess"), -math.inf, 0.1,
         missing="needs a paraphrased_question in every forgotten record, or author, fact and cloze", alone=True),
    Rule("A8", "inner layers hold no more than those of retrained models", ("probe.excess",), -math.inf, 0.05,
         missing="needs 8 forgotten and 8 unseen records of their labels, or of a removed class and of the others"),
    Rule("B2", "training on kept records does not bring it back", ("restore.retain",), -math.inf, 0.1),
    Rule("B3", "relearning one half does not bring the other back", ("relearning.area",), -math.inf, 0.1, missing="needs at least 4 forgotten records"),
    Rule("B4", "rounding, pruning and averaging do not bring it back", ("restore.int8", "restore.int4", "restore.prune", "restore.average"), -math.inf, 0.1),
    Rule("C1", "test accuracy is kept", ("drop.test",), -math.inf, 0.03, 0, ("retain", "test"), alone=False),
    Rule("C1", "kept texts are known as before", ("drop.retain", "drop.general"), -math.inf, 0.05, 0, ("retain",), alone=True),
    Rule("C4", "kept questions are still answered", ("wording.retain.lost", "wording.retain.broken"), -math.inf, 0.1, 0, ("retain",), alone=True),
    Rule("C5", "no group loses much more than the mean", ("drop.worst",), -math.inf, 0.1, 0, ("retain", "test"), "needs classes: targets have none", False),
    Rule("C5", "no group loses much more than the mean", ("drop.worst",), -math.inf, 0.1, 0, ("retain",),
         "needs records that say their author, subject or set: a group is 5 that agree in one", True),
    Rule("C7", "outputs before and after do not point at the forgotten records", ("delta.excess",), -math.inf, 0.1),
)  # fmt: skip


def p_value(row: Row, low: float, high: float) -> float:
    """One-sided p of "the true value lies in low..high", by the normal whose 5 % and 95 % ends are the row's; 1 inside."""
    if not all(map(math.isfinite, (row.value, row.low, row.high))):
        return math.nan
    if row.value > high:
        gap, reach = row.value - high, row.value - row.low
    elif row.value < low:
        gap, reach = low - row.value, row.high - row.value
    else:
        return 1.0
    return float(norm.sf(Z * gap / max(reach, 1e-12)))


def holm(values: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Which hypotheses are rejected: the k-th smallest p against alpha / (m - k), until one is not; nan is never rejected.

    >>> holm([0.001, 0.02, 0.04]), holm([0.001, 0.03, 0.04])
    ([True, True, True], [True, False, False])
    """
    order = sorted((k for k, v in enumerate(values) if not math.isnan(v)), key=lambda k: values[k])
    out = [False] * len(values)
    for rank, k in enumerate(order):
        if values[k] >= alpha / (len(order) - rank):
            break
        out[k] = True
    return out


def read(rule: Rule, rows: Mapping[str, Row]) -> tuple[Row | None, float]:
    """The row that is farthest from the rule (the first that is there, where rows are alternatives by preference), and its p-value."""
    there = [rows[n] for n in rule.rows if n in rows]
    if rule.id == "A3":
        there = there[:1]
    graded = [(p_value(r, rule.low, rule.high), r) for r in there]
    worst = min(graded, key=lambda g: (g[0] if not math.isnan(g[0]) else 2.0, -_outside(g[1], rule)), default=None)
    return (None, math.nan) if worst is None else (worst[1], worst[0])


def _outside(row: Row, rule: Rule) -> float:
    """How far the worse end lies outside the rule; negative inside."""
    return max(row.high - rule.high, rule.low - row.low)


def named(p: Probe, rows: Sequence[Row], facts: Mapping[str, bool | None] = {}) -> list[Named]:
    """All named checks in the form made for the task, weakest first inside each section (FAIL, UNKNOWN, PASS).

    facts   of the process: `seeds` (at least 3), `baselines` (in the table), `reversible` (the patch was applied and undone bit for bit)
    """
    by_name = {r.name: r for r in rows}
    found = []
    for section in "ABC":
        rules = [r for r in RULES if r.id[0] == section and r.made_for(p.task)]
        read_all = [read(r, by_name) for r in rules]
        rejected = holm([p_ for _, p_ in read_all])
        found += [_judged(p, rule, by_name, row, p_, out) for rule, (row, p_), out in zip(rules, read_all, rejected, strict=True)]
    found += _process(p, by_name, facts)
    return sorted(found, key=lambda n: (n.id[0], ORDER.index(n.verdict), n.id))


def grouped(found: Sequence[Named]) -> list[dict[str, Any]]:
    """JSON-able sections, the weakest first: its id, title, verdict (that of its weakest check), counts, and checks, weakest first; apart from these
    the ids of those that do not exist for the kind of model (`absent`)."""
    out = []
    for id_, title in SECTIONS.items():
        mine = [n for n in found if n.id[0] == id_ and not n.absent]
        away = [n.id for n in found if n.id[0] == id_ and n.absent]
        count = {v: sum(n.verdict == v for n in mine) for v in ORDER}
        verdict = next((v for v in ORDER if count[v]), "UNKNOWN")
        out.append({"id": id_, "title": title, "verdict": verdict, "count": count, "checks": [asdict(n) for n in mine], "absent": away})
    return sorted(out, key=lambda section: (ORDER.index(section["verdict"]), -section["count"]["FAIL"], section["id"]))


def _behind(rule: Rule) -> Any:
    """The check that the last of the rule's rows, the least demanding, comes from."""
    return CHECKS[checks_for(rule.rows[-1:])[0]]


def lacking(p: Probe, rule: Rule, rows: Mapping[str, Row]) -> str:
    """Why an audit with these rows has none of the rule's, by what the check of the last of them (the least demanding) needs."""
    check = _behind(rule)
    if not check.suits(p.task):
        return f"nothing measures this on {of(p.task).what}"
    if check.name in rows and math.isnan(rows[check.name].value):
        return rows[check.name].note
    have = p.split.parts()
    parts = [name for name in dict.fromkeys((*check.needs, *rule.parts)) if name not in have]
    models = max(rule.models, int(check.reference))
    wants = [f"{' and '.join(parts)} data"] if parts else []
    if len(p.references) < models:
        wants.append("retrained references" if models == 1 else f"at least {models} retrained references ({len(p.references)} at hand)")
    if wants:
        return f"needs {' and '.join(wants)}"
    if rule.missing and any(checks_for([name]) == [check.name] for name in rows):
        return rule.missing
    left = f"the check {check.name} was left out{' as it trains' if check.slow else ''}"
    return f"{left}, or it {rule.missing}" if rule.missing else left


def _judged(p: Probe, rule: Rule, rows: Mapping[str, Row], row: Row | None, p_: float, rejected: bool) -> Named:
    if row is None:
        return Named(rule.id, rule.statement, "UNKNOWN", lacking(p, rule, rows), absent=not _behind(rule).suits(p.task))
    seen = f"{row.name} {row.value:.3g} ({row.low:.3g} to {row.high:.3g}, n = {row.n}), allowed {_range(rule)}"
    if math.isnan(p_):
        return Named(rule.id, rule.statement, "UNKNOWN", f"{row.name} could not be measured: {row.note}", p_, row.name)
    if row.low >= rule.low and row.high <= rule.high:
        return Named(rule.id, rule.statement, "PASS", seen, p_, row.name)
    if rejected:
        return Named(rule.id, rule.statement, "FAIL", seen, p_, row.name)
    return Named(rule.id, rule.statement, "UNKNOWN", f"{seen}: too few records to tell", p_, row.name)


def _range(rule: Rule) -> str:
    return f">= {rule.low:g}" if math.isinf(rule.high) else f"<= {rule.high:g}" if math.isinf(rule.low) else f"{rule.low:g}..{rule.high:g}"


def _process(p: Probe, rows: Mapping[str, Row], facts: Mapping[str, bool | None]) -> list[Named]:
    """Section D: facts, not statistics."""

    def fact(id_: str, statement: str, value: bool | None, yes: str, no: str, unknown: str) -> Named:
        verdict = "UNKNOWN" if value is None else "PASS" if value else "FAIL"
        return Named(id_, statement, verdict, unknown if value is None else yes if value else no)

    keys = {name: set(part.keys) for name, part in p.split.parts().items() if held(part)}
    absent = [name for name in ("test", "validation") if name not in keys]
    apart = None if absent else not (keys["test"] & keys["validation"])
    table, alone = facts.get("baselines"), "one run alone was audited"
    wants = ([] if len(p.references) >= 2 else [f"at least 2 retrained references, of which one is a line ({len(p.references)} at hand)"]) + (
        [] if "retain" in keys else ["retain data, on which the others are trained"]
    )
    if table is False and wants:
        table, alone = None, f"needs {' and '.join(wants)}"
    return [
        fact("D1", "the request says what is meant to go", bool(p.split.asked), p.split.asked, "the split has no `asked`", ""),
        fact("D3", "at least three seeds", facts.get("seeds"), "yes", "fewer than three", "one run alone was audited"),
        fact("D4", "retrained references are at hand", bool(p.references) or None, f"{len(p.references)}", "", "no reference was given"),
        fact("D5", "trivial baselines stand in the table", table, "yes", "they do not: what trains was left out, or ended without a change", alone),
        fact("D6", "audit data is apart from tuning data", apart, "no record is shared", "test and validation share records",
             f"no {' and no '.join(absent)} part was given"),
        fact("D7", "cost is reported", "cost.forward" in rows, "yes", "no cost row", ""),
        fact("D9", "the patch can be undone bit for bit", facts.get("reversible"), "yes", "no", "it was not tried"),
    ]  # fmt: skip
