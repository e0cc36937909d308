"""report.html: one self-contained file. Page one for a reader of law, the tables and pictures below for an engineer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from expunge.patch import write as write_file
from expunge.report import plots, table

ASSURANCE = {
    "exact": "Exact: the model was trained again without the records.",
    "certified": "Certified: a proven bound limits what can be learned about the records; its conditions were checked.",
    "approximate": "Approximate: the weights were changed; that the records are gone is supported by the audit below, not by proof.",
    "suppression": "Suppression: the weights are unchanged; answers are filtered. This is not a deletion.",
}


def render(document: Mapping[str, Any]) -> str:
    """The page as text; everything from the document is escaped."""
    import jinja2

    source = resources.files("expunge.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    clean = table.strict(document)
    pictures = clean.get("pictures") or {}
    drawn = {name: draw(pictures[key]) for name, (key, draw) in _PLOTS.items() if pictures.get(key)}
    chosen = clean.get("chosen")
    shown = next(
        (t for t in clean.get("tries", []) if chosen and (t["method"], t.get("seed")) == (chosen["method"], chosen.get("seed")) and t.get("rows")), None
    )
    facts = {k: clean.get(k, "") for k in ("title", "asked", "created", "version", "machine", "task", "assurance")}
    return environment.from_string(source).render(
        **facts, parts=clean.get("parts", {}), references=clean.get("references", 0), verdict=clean.get("verdict", {"passed": False, "reasons": []}),
        chosen=chosen, shown=shown, rules=clean.get("rules", {}), tries=clean.get("tries", []), selftest=clean.get("selftest", []),
        notes=clean.get("notes", []), offenders=pictures.get("offenders", []), headings=table.HEADINGS, lines=table.lines(clean), number=table.number,
        interval=table.interval, meaning=ASSURANCE.get(str(clean.get("assurance")), "Unknown assurance."), plots=drawn,
    )  # fmt: skip


_PLOTS = {
    "Loss of forgotten, kept and unseen records": ("loss", plots.losses),
    "Membership attack (low loss means member)": ("roc", plots.roc),
    "All tries: forgetting against utility (size: cost; filled: passed)": ("scatter", plots.scatter),
    "Confusion on test": ("confusion", plots.confusion),
}


def write(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page whole or not at all."""
    return write_file(path, render(document))
