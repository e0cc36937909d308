"""report.html: one self-contained file. Page one for a reader of law, the tables and pictures below for an engineer.

It fails closed: a document without a verdict, or with one that is not exactly true, is shown as not passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from expunge.core.errors import GateError
from expunge.core.files import write as write_file
from expunge.report import glance, images, plots, table
from expunge.report.cells import finite, interval, items, mapping, number, plain, texts
from expunge.report.words import FAMILIES, WORDS

ASSURANCE = {
    "exact": "Exact. The model was trained again without the records.",
    "certified": "Certified. A proven bound limits what can be learned about the records from the model; its conditions were checked.",
    "approximate": "Approximate. The weights were changed. That the records are gone is supported by the audit below only, not by proof.",
    "suppression": "Suppression. The weights are unchanged and still hold what was learned; answers are filtered. This is not a deletion.",
}
UNSTATED = "Not stated. Nothing is claimed beyond the measurements below."

PARTS = {
    "forget": "to be forgotten",
    "retain": "kept",
    "test": "for testing, never trained on",
    "validation": "for tuning, never trained on",
    "anchor": "that show what to answer instead",
    "general": "that the model knows besides, given to no method",
}

LIMITS = (
    "It does not prove that no trace is left. It says what the listed measurements found, and how uncertain they are; other attacks may find more.",
    "It covers one model and one change to it. Backups, earlier versions, models derived from it, logs and the training data are outside it.",
    "It covers the records that were asked for. The same facts may stand in other records, which were kept.",
    "Bounds are one-sided at 95 %: about one in twenty is wrong by chance alone.",
    "Rows marked indicative measure a group of records, not each one; they do not show that every single record is safe.",
    "It does not decide whether a legal duty is met.",
)

UNREFERENCED = (
    "that the model behaves like one that never saw the records;",
    "that what the measurements still find is no more than any model shows that was trained on similar records;",
    "that a model properly trained without the records would pass the rules used here.",
)
"""Claims that are not made without a retrained reference."""

_PLOTS = (
    (
        "loss",
        "Loss of forgotten, kept and unseen records",
        "A model that never saw the records has on them about the loss it has on unseen records of the same kind.",
        plots.losses,
    ),
    (
        "roc",
        "Membership attack",
        "Attack: low loss means the record was trained on. The diagonal is guessing. Bounds stand in the rows named membership.",
        plots.roc,
    ),
    (
        "scatter",
        "All runs: forgetting against utility",
        "Forgetting is the gap closed towards a retrained model where that is measurable, else one minus accuracy on the forget set. Area grows with cost.",
        plots.scatter,
    ),
    ("confusion", "Confusion before and after", "Counts on test, where there is a test part; colour is the share of each true class.", plots.confusion),
    (
        "grid",
        "Drawings before and after",
        "Both models start from the same noise. First what was erased, then what is nearest to it, then the rest. They show, they do not prove.",
        images.grid,
    ),
    (
        "named",
        "What the judge names the drawings",
        "Per cent of the drawings asked for as each concept. The row of what was erased should leave the diagonal, and no other.",
        images.named,
    ),
    (
        "retainability",
        "Retainability",
        "Per cent of the drawings of each concept that the judge names rightly. What was erased is framed: it alone should be pale.",
        images.retainability,
    ),
)


def render(document: Mapping[str, Any]) -> str:
    """The page as text; everything from the document is escaped, and the same document gives the same bytes."""
    import jinja2

    source = resources.files("expunge.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    page = environment.from_string(source).render(**view(table.strict(document)))
    return page.encode("utf-8", "replace").decode("utf-8")


def write(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page whole or not at all. Raises PatchError when it cannot be written."""
    return write_file(path, render(document))


def view(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template names, complete for any document: texts are plain, numbers are printed."""
    pictures, good = mapping(document.get("pictures")), table.passed(document)
    tries, chosen = items(document.get("tries")), mapping(document.get("chosen"))
    trials = [_trial(t) for t in items(document.get("selftest"))]
    shown = _shown(tries, chosen)
    rows = items(shown[0].get("rows")) if shown else []
    reasons = texts(mapping(document.get("verdict")).get("reasons"))
    if not good and not reasons:
        reasons = ["no reason is recorded" if document.get("verdict") else "no verdict is recorded; without one nothing has passed"]
    return {
        **{key: plain(document.get(key)) for key in ("title", "asked", "created", "version", "machine", "task")},
        "passed": good, "grade": table.graded(document), "says": table.GRADES.get(table.graded(document), ""),
        "more": [] if good else texts(mapping(document.get("verdict")).get("more")), "claimed": plain(document.get("claimed")),
        "families": _families(mapping(mapping(document.get("verdict")).get("families"))), "reasons": reasons, "trials": trials,
        "usable": sum(t["usable"] == "yes" for t in trials),
        "parts": [(plain(n) if name in PARTS else "", PARTS.get(name, f"{plain(name)}: {plain(n)}")) for name, n in mapping(document.get("parts")).items()],
        "chosen": _try(chosen) if chosen else None, "patch": {k: plain(chosen.get(k)) for k in ("patch", "digest")}, "places": _count(chosen.get("places")),
        "meaning": ASSURANCE.get(str(document.get("assurance")), UNSTATED), "suppression": document.get("assurance") == "suppression",
        "references": _references(document.get("references")), "limits": LIMITS, "unclaimed": UNREFERENCED,
        "required": _required(mapping(document.get("rules")), rows if chosen else None, trials), "grouped": _grouped(trials, rows),
        "columns": table.figures(document), "lines": table.columns(document), "tries": [_try(t) for t in tries],
        "shown": [{**_try(t), "rows": [_row(r) for r in items(t.get("rows"))]} for t in shown],
        "plots": [(name, caption, svg) for key, name, caption, draw in _PLOTS if (svg := draw(pictures.get(key)))],
        "offenders": _offenders(items(pictures.get("offenders"))), "notes": texts(document.get("notes")),
        "sections": table.sections(document), "absent": glance.absent(document),
        "warnings": glance.warnings(document), "bands": plots.bands(glance.losses(document)), "weakest": glance.weakest(document),
        "levels": glance.levels(document), "unknown": [said.removeprefix("Not known: ") for said in glance.unknown(document)],
        "unseen": plain(mapping(document.get("front")).get("unseen")), "bars": glance.SAYS, "about": glance.about(document),
        "talk": [{k: plain(t.get(k)) for k in ("about", "question", "truth", "before", "after")} for t in items(document.get("talk"))],
        "identified": table.identified(document), "near": table.near(document),
        "gates": [_gate(name, mapping(g)) for name, g in mapping(document.get("gates")).items()],
    }  # fmt: skip


def _families(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(family, what it is, its rules as `name: state`)."""
    return [
        (plain(name), FAMILIES.get(name, ""), "; ".join(f"{plain(f.get('name'))}: {plain(f.get('state'))}" for f in items(rules)))
        for name, rules in found.items()
    ]


def _references(value: Any) -> int:
    return int(value) if finite(value) and value > 0 else 0


def _count(value: Any) -> str:
    return f"{value:,.0f}" if finite(value) else ""


def _shown(tries: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The chosen try, or all audited ones when none was chosen."""
    audited = [t for t in tries if items(t.get("rows"))]
    same = [t for t in audited if all(t.get(k) == chosen.get(k) for k in ("method", "seed"))]
    exact = [t for t in same if t.get("settings") == chosen.get("settings")]
    return (exact or same)[:1] if chosen else audited


def _trial(t: Mapping[str, Any]) -> dict[str, str]:
    texted = {k: plain(t.get(k)) for k in ("name", "rule", "original", "retrained")}
    return {**texted, "usable": "yes" if t.get("usable") is True else "unusable"}


def _try(t: Mapping[str, Any]) -> dict[str, Any]:
    cost = mapping(t.get("cost"))
    return {
        "method": plain(t.get("method")), "seed": plain(t.get("seed")), "outcome": table.outcome(t),
        "reasons": [*filter(None, [plain(t.get("reason"))]), *texts(t.get("reasons"))],
        "settings": ", ".join(f"{plain(k)} = {plain(v)}" for k, v in mapping(t.get("settings")).items()),
        "forward": _count(cost.get("forward")), "backward": _count(cost.get("backward")), "share": table.share(cost),
        "seconds": number(cost["seconds"]) if finite(cost.get("seconds")) else "",
    }  # fmt: skip


def _row(r: Mapping[str, Any]) -> dict[str, str]:
    at = f"at {number(r['at'])}" if finite(r.get("at")) else ""
    how = [*filter(None, [plain(r.get("note")), at, "indicative" if r.get("indicative") is True else ""])]
    return {"name": plain(r.get("name")), "value": interval(r), "how": "; ".join(how)}


def _required(rules: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None, trials: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Each rule with what the chosen try measured and whether it holds; `rows` None when no try was chosen."""
    usable = {t["name"]: t["usable"] for t in trials}
    out = []
    for name, rule in rules.items():
        row = next((r for r in rows or () if r.get("name") == name), None)
        state = "unusable" if usable.get(plain(name)) == "unusable" else "no try chosen" if rows is None else _holds(plain(rule), row)
        out.append({"name": plain(name), "words": WORDS.get(name, ""), "rule": plain(rule), "measured": interval(row), "state": state})
    return out


def _grouped(trials: Sequence[Mapping[str, str]], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every usable rule about forgetting reads an indicative row."""
    from expunge.audits.verdict import UTILITY

    names = [t["name"] for t in trials if t["usable"] == "yes" and not t["name"].startswith(UTILITY)]
    indicative = {plain(r.get("name")) for r in rows if r.get("indicative") is True}
    return bool(names) and set(names) <= indicative


def _holds(rule: str, row: Mapping[str, Any] | None) -> str:
    """`holds` or `broken` at the worse end of the interval, as `audits.core.gate` reads it; a bound that is not there is infinite."""
    from expunge.audits.core import bounds

    if row is None or not finite(row.get("value")):
        return "not measured" if row is None else "broken"
    try:
        lowest, highest = bounds(rule)
    except GateError:
        return "rule not readable"
    low, high = (row[k] if finite(row.get(k)) else away for k, away in (("low", -float("inf")), ("high", float("inf"))))
    return "holds" if low >= lowest and high <= highest else "broken"


def _offenders(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    named = {"id": plain, "label": plain, "before": number, "after": number, "retrained": number}
    return [{k: show(r[k]) if r.get(k) is not None else "-" for k, show in named.items()} for r in (dict.fromkeys(named) | dict(row) for row in rows)]


def _gate(name: Any, g: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": plain(name),
        "state": "passed" if g.get("passed") is True else "not passed",
        "chosen": plain(g.get("chosen")) or "none",
        "reasons": texts(g.get("reasons")),
    }
