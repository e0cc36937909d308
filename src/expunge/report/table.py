"""The same cells for terminal, Markdown and HTML; strict JSON for files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.patch import write as write_file

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("forget accuracy", ("accuracy.forget", "error.forget")),
    ("test accuracy", ("accuracy.test", "error.test")),
    ("gap closed", ("gap_closed.klom",)),
    ("retain / floor", ("klom_ratio.retain",)),
    ("loss AUC", ("membership.loss_auc",)),
    ("average gap", ("average_gap",)),
)
"""Heading and the first row found among the named ones (regression reads errors)."""

HEADINGS = ("method", "seed", *(name for name, _ in COLUMNS), "share of retraining", "outcome")


def number(value: float | None) -> str:
    """Three figures; "not measurable" for what is not a number."""
    return "not measurable" if value is None or not math.isfinite(value) else f"{value:.3g}"


def interval(row: Mapping[str, Any] | None) -> str:
    """Value with its bounds: 0.97 (0.95 to 0.98); "-" for a row that is not there."""
    if row is None:
        return "-"
    low, high = row.get("low"), row.get("high")
    if row.get("value") is None or not math.isfinite(row["value"]):
        return "not measurable"
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return number(row["value"])
    return f"{number(row['value'])} ({number(low)} to {number(high)})"


def lines(document: Mapping[str, Any]) -> list[list[str]]:
    """One line of cells per baseline and per try, in the order of HEADINGS."""
    out = [_line(name, "-", rows, "-", "baseline") for name, rows in document.get("baselines", {}).items()]
    for t in document.get("tries", []):
        share = t.get("cost", {}).get("share")
        outcome = "pass" if t.get("passed") else ("not passed" if t.get("outcome") == "ok" else t.get("outcome", ""))
        out.append(_line(t["method"], str(t.get("seed", "")), t.get("rows", []), "-" if share is None else f"{100 * share:.3g} %", outcome))
    return out


def _line(name: str, seed: str, rows: list[Mapping[str, Any]], share: str, outcome: str) -> list[str]:
    found = {r["name"]: r for r in rows}
    cells = [interval(next((found[n] for n in names if n in found), None)) for _, names in COLUMNS]
    return [name, seed, *cells, share, outcome]


def markdown(document: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    rows = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join(rows + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines(document)])


def show(document: Mapping[str, Any]) -> Any:
    """The table for a terminal: a `rich` group of verdict, reasons and table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=str(document.get("title", "")))
    for heading in HEADINGS:
        table.add_column(heading)
    for line in lines(document):
        table.add_row(*[Text(cell) for cell in line])
    verdict = document.get("verdict", {})
    head = Text("PASS" if verdict.get("passed") else "NOT PASSED", style="bold green" if verdict.get("passed") else "bold red")
    return Group(table, head, *[Text(f"  {reason}") for reason in [*verdict.get("reasons", []), *document.get("notes", [])]])


def strict(value: Any) -> Any:
    """The same structure with nan and infinities as None, tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    return [strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def dump(document: Mapping[str, Any]) -> str:
    """Strict JSON, readable by any tool.

    >>> dump({"a": float("nan")})
    '{\\n  "a": null\\n}'
    """
    return json.dumps(strict(document), indent=2, allow_nan=False, default=str)


def write(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write report.json whole or not at all."""
    return write_file(path, dump(document))
