"""The same cells for terminal, Markdown and HTML; strict JSON for files.

A document is the JSON-able dict of `outcome.Verdict.document`; every key but its title may be missing or empty.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.core.files import write as write_file
from expunge.parts.seal import strict
from expunge.report import glance, layout
from expunge.report.cells import MISSING, finite, interval, items, mapping, number, plain, texts

KEY = {
    "accuracy.forget": "forget accuracy",
    "accuracy.forget_test": "same classes, unseen",
    "accuracy.test": "test accuracy",
    "error.forget": "forget error",
    "error.test": "test error",
    "drop.test": "lost on test",
    "drop.retain": "lost on retain",
    "gap_closed.klom": "gap closed",
    "membership.excess": "membership excess",
    "membership.loss_auc": "membership AUC",
    "klom_ratio.retain": "retain KLOM / floor",
    "average_gap": "average gap",
    "tofu.d_over_critical": "KS D / critical",
    "tofu.model_utility": "model utility",
    "memorised.extraction_strength.forget": "extraction, forget",
    "drop.general": "lost on general",
}
"""Row name and heading of the key figures, in the order of columns. Rows that a rule reads come first, whatever they are."""

HEADINGS = {
    **KEY, "klom_ratio.forget": "KLOM / floor", "gap_closed.kl": "KL gap closed", "gap_closed.margin": "margin gap closed",
    "gap_closed.relearning": "gap closed, relearning", "known.excess": "known, excess", "restore.closed": "gap closed, restored", "repair.free": "repaired",
}  # fmt: skip
"""Headings of further rows that a rule may read."""

BASELINES = {
    "original": "original, untouched",
    "retrained": "retrained, held out",
    "fine_tune": "fine-tuned on retain",
    "reset_last": "last layer drawn anew",
}


@dataclass(frozen=True)
class Column:
    """One key figure: the row it shows, its heading, and the rule that reads it ("" for none)."""

    name: str
    heading: str
    rule: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table: a baseline or a method. `cells` has one text per column of `figures`."""

    method: str
    runs: str
    cells: tuple[str, ...]
    cost: str
    outcome: str

    @property
    def all(self) -> tuple[str, ...]:
        """The cells in the order of `headings`."""
        return (self.method, self.runs, *self.cells, self.cost, self.outcome)


def passed(document: Mapping[str, Any]) -> bool:
    """True only if the document holds a verdict that says so."""
    return mapping(document.get("verdict")).get("passed") is True


GRADES = {
    "verified": "everything speaks for it, a valid comparison with models that never saw the records included",
    "supported": "everything at hand speaks for it, but nothing valid was compared that never saw the records",
    "inconclusive": "the evidence is too thin to say either way",
    "refuted": "the evidence shows that it is not gone, or that the rest was harmed",
}
"""What a grade says, in words."""


def graded(document: Mapping[str, Any]) -> str:
    """The grade of a document, where it has one that is known."""
    grade = mapping(document.get("verdict")).get("grade")
    return grade if isinstance(grade, str) and grade in GRADES else ""


def share(cost: Any) -> str:
    """Cost as a percentage of retraining; "-" when it is not known."""
    value = mapping(cost).get("share")
    return f"{100 * value:.3g} %" if finite(value) else "-"


def figures(document: Mapping[str, Any], most: int = 6) -> list[Column]:
    """The columns this document has values for: rows that a rule reads first, then those of KEY, at most `most`."""
    groups = [*mapping(document.get("baselines")).values(), *(t.get("rows") for t in items(document.get("tries")))]
    have = {row.get("name") for rows in groups for row in items(rows)}
    rules = {plain(name): plain(rule) for name, rule in mapping(document.get("rules")).items()}
    names = [name for name in [*rules, *(k for k in KEY if k not in rules)] if name in have]
    return [Column(name, HEADINGS.get(name, name), rules.get(name, "")) for name in names[:most]]


def headings(document: Mapping[str, Any]) -> list[str]:
    """Headings of the table, one per cell of a line."""
    return ["method", "runs", *(c.heading for c in figures(document)), "share of retraining", "outcome"]


def columns(document: Mapping[str, Any]) -> list[Line]:
    """One line per baseline and per method.

    One audited run: value (low to high, n). Several (seeds): mean (smallest to largest, how many runs); runs in which a figure could not
    be measured are left out of its mean and counted, as `2 of 3 runs`.
    """
    shown = figures(document)
    lines = []
    for name, rows in mapping(document.get("baselines")).items():
        lines.append(Line(BASELINES.get(name, plain(name)), "-", tuple(interval(_row(items(rows), c.name)) for c in shown), "-", "baseline"))
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for t in items(document.get("tries")):
        methods.setdefault(plain(t.get("method")), []).append(t)
    for name, tries in methods.items():
        audited = [t for t in tries if items(t.get("rows"))]
        cells = tuple(_cell([_row(items(t.get("rows")), c.name) for t in audited]) for c in shown)
        costs = [v for t in audited or tries if finite(v := mapping(t.get("cost")).get("share"))]
        cost = share({"share": sum(costs) / len(costs)}) if costs else "-"
        lines.append(Line(name, str(len(audited)) if audited else "-", cells, cost, _outcomes(tries)))
    return lines


def _row(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    return next((r for r in rows if r.get("name") == name), None)


def _cell(rows: Sequence[Mapping[str, Any] | None]) -> str:
    there = [r for r in rows if r is not None]
    if len(there) < 2:
        return interval(there[0] if there else None)
    values = [r["value"] for r in there if finite(r.get("value"))]
    if not values:
        return MISSING
    count = f"{len(values)} runs" if len(values) == len(rows) else f"{len(values)} of {len(rows)} runs"
    return f"{number(sum(values) / len(values))} ({number(min(values))} to {number(max(values))}, {count})"


def _outcomes(tries: Sequence[Mapping[str, Any]]) -> str:
    """What became of all tries of one method: `passed`, or counts as `2 passed, 1 diverged`."""
    counts = Counter(outcome(t) for t in tries)
    return (
        next(iter(counts))
        if len(tries) == 1
        else ", ".join(f"{counts[what]} {what}" for what in sorted(counts, key=lambda w: (w != "passed", w != "not passed", w)))
    )


def outcome(t: Mapping[str, Any]) -> str:
    """`passed`, `not passed`, `not audited` or the run's own outcome (partial, harmed, no_op, diverged, refused, failed) in words."""
    if t.get("outcome", "ok") != "ok":
        return plain(t.get("outcome")).replace("_", " ")
    return "passed" if t.get("passed") is True else "not passed" if items(t.get("rows")) else "not audited"


def markdown(document: Mapping[str, Any]) -> str:
    """The table as Markdown; marks in names are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"

    heads = headings(document)
    return "\n".join([line(heads), "|" + "---|" * len(heads), *(line(each.all) for each in columns(document))])


def _escaped(text: str) -> str:
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(mark, safe)
    return "".join(f"\\{c}" if c in "\\|[]`*" else c for c in text)


def terminal(document: Mapping[str, Any], width: int = 200) -> Any:
    """The table as a `rich.table.Table`: the cells of `columns`, as many figures as fit into `width` characters, intervals on a line of their own."""
    heads, lines = headings(document), columns(document)
    return layout.table([head for head in heads if head != "runs"], [(line.method, *line.cells, line.cost, line.outcome) for line in lines], width)


def sections(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(verdict, text, row) lines of the named checks, weakest section and weakest check first; `row` is "" on the line of a section. A
    section whose checks do not exist for the kind of model (`glance.absent`) has no line."""
    out = []
    for section in items(document.get("sections")):
        checks = items(section.get("checks"))
        if section.get("absent") and not checks:
            continue
        count = ", ".join(f"{n} {plain(v)}" for v, n in mapping(section.get("count")).items() if n)
        out.append((plain(section.get("verdict")), f"{plain(section.get('id'))} {plain(section.get('title'))}: {count}", ""))
        out += [(plain(c.get("verdict")), f"{plain(c.get('id'))} {plain(c.get('statement'))}: {plain(c.get('why'))}", plain(c.get("id"))) for c in checks]
    return out


def near(document: Mapping[str, Any], most: int = 10) -> str:
    """A sentence on kept records that are near copies of records to forget, with at most `most` of them by id; "" where there are none.

    >>> near({"near": {"n": 2, "pairs": [[17, 42, 0.994], [18, 43, 0.98]]}})
    '2 records that you keep are near copies of records to forget (forget 17 and keep 42, 0.994 alike; forget 18 and keep 43, 0.98 alike). What ... keep.'
    """
    found = mapping(document.get("near"))
    n, listed = found.get("n"), found.get("pairs")
    if not finite(n) or n < 1:
        return ""
    pairs = [p for p in listed if isinstance(p, (list, tuple)) and len(p) == 3][:most] if isinstance(listed, (list, tuple)) else []
    said = [f"forget {plain(gone)} and keep {plain(kept)}, {number(alike)} alike" for gone, kept, alike in pairs]
    said += [f"and {n - len(pairs):,.0f} more"] if pairs and n > len(pairs) else []
    which = f" ({'; '.join(said)})" if said else ""
    compared, parts = mapping(found.get("compared")).get("forget"), mapping(document.get("parts")).get("forget")
    some = f" Only {plain(compared)} of {plain(parts)} records to forget were compared." if finite(compared) and finite(parts) and compared < parts else ""
    what = f"{n:,.0f} records that you keep are near copies" if n > 1 else "1 record that you keep is a near copy"
    return f"{what} of records to forget{which}. What the model still knows of these it may know from what you keep.{some}"


def identified(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, digest and what stands beside it) of everything that the document is about, its seal last; empty for a document without identity."""
    known = mapping(document.get("identity"))
    out = [(name, plain(known.get(k)) or "none") for k, name in (("patch", "patch"), ("before", "model before"), ("after", "model after")) if k in known]
    for name, part in mapping(known.get("parts")).items():
        out.append((plain(name), f"{plain(mapping(part).get('digest')) or 'not held in memory'} ({plain(mapping(part).get('n'))} records)"))
    out += [(f"reference {k}", digest) for k, digest in enumerate(texts(known.get("references")), 1)]
    out += [("rules", "; ".join(f"{plain(n)} {plain(r)}" for n, r in mapping(known.get("rules")).items()) or "none")] if "rules" in known else []
    out += [("seed", plain(known.get("seed")))] if "seed" in known else []
    out += [("code", ", ".join(f"{plain(n)} {plain(v)}" for n, v in mapping(known.get("code")).items()))] if "code" in known else []
    return out + [(name, plain(document[k])) for k, name in (("sha256", "seal"), ("hmac", "signature")) if known and document.get(k)]


COLOURS = {"PASS": "green", "FAIL": "red", "UNKNOWN": "yellow"}


def first(document: Mapping[str, Any], width: int = 200) -> Any:
    """Page one for a terminal of that width, a `rich` group: verdict, what to beware of, losses, weakest link, levels, near copies, what is not known."""
    from rich.console import Group
    from rich.text import Text

    good, grade = passed(document), graded(document)
    head = Text("PASS" if good else "NOT PASSED", style="bold green" if good else "bold red")
    if grade:
        head.append(f"  {grade.upper()}: {GRADES[grade]}", style="bold" if good else "bold yellow" if grade != "refuted" else "bold red")
    return Group(
        Text(plain(document.get("title")), style="bold"), head, *_indented(glance.warnings(document), "bold red"),
        *layout.bars(glance.losses(document), width, glance.about(document)),
        *_indented(filter(None, [glance.weakest(document)])), *_indented(glance.levels(document)), *_indented(filter(None, [near(document)])),
        *_indented(glance.unknown(document)),
    )  # fmt: skip


def _indented(said: Iterable[str], style: str = "") -> list[Any]:
    from rich.padding import Padding
    from rich.text import Text

    return [Padding(Text(text, style=style), (0, 0, 0, 2)) for text in said]


def show(document: Mapping[str, Any], width: int = 200) -> Any:
    """For a terminal of that width: a `rich` group of page one (`first`), the table, why tries did not pass, notes, and the named checks (what passed only as
    a count)."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    more = [f"would change that: {m}" for m in texts(mapping(document.get("verdict")).get("more")) if not passed(document)]
    rest = [terminal(document, width), *_indented([*glance.reasons(document), *more, *glance.notes(document)])]
    for state, text, row in sections(document):
        if not row or state != "PASS":
            mark = Text(f"{state:8}", style=COLOURS.get(state, ""))
            rest.append(Padding(mark.append(text, style="default" if row else "bold default"), (0, 0, 0, 4 if row else 2)))
    return Group(first(document, width), Text(""), *rest, *_indented(filter(None, [glance.absent(document)])))


def dump(document: Mapping[str, Any]) -> str:
    """Strict JSON, readable by any tool: no NaN, no Infinity.

    >>> dump({"a": float("nan")})
    '{\\n  "a": null\\n}'
    """
    return json.dumps(strict(document), indent=2, allow_nan=False, default=str)


def write(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write report.json whole or not at all. Raises PatchError when it cannot be written."""
    return write_file(path, dump(document))
