"""General ability before and after, from two result files of lm-evaluation-harness (`lm_eval`), which runs on its own: nothing of it is imported.

    lm_eval --model hf --model_args pretrained=MODEL --tasks ... --output_path before       the same of out/released into after
    rows = ability.read("before", "after")                                                  ability.<task>.<metric>, after minus before
    verdict = ability.added(verdict, rows, {"ability.hellaswag.acc": ">= -0.02"})           verdict.save(...) writes them into the report

A file holds {"results": {task: {"acc,none": v, "acc_stderr,none": s, ...}}}; the part behind the comma is the filter, named in the row where it is not
`none`. Both models answer the same questions, so sqrt(s1^2 + s2^2), which takes them for independent, is rather too wide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge.audits.core import Row, gate
from expunge.core.errors import DataError, SettingError
from expunge.core.stats import Z

MAX_BYTES = 64 << 20
"""Largest file that is read."""

SAME = {"versions": "version", "n-shot": "number of shots", "n-samples": "number of samples"}
"""Fields of a file that must agree, task by task, where both files have them."""


def read(before: Path | str, after: Path | str) -> list[Row]:
    """One row for each task and metric, after minus before with one-sided 95 % bounds; infinitely wide where a standard error is missing.

    before, after   a results_*.json of lm_eval each, or a folder that holds just one
    Raises DataError for files that are no such thing, that differ in tasks or metrics, or whose tasks were run in different ways.
    """
    (first, a), (second, b) = load(before), load(after)
    old, new = metrics(first, a), metrics(second, b)
    for where, lost in ((second, old.keys() - new.keys()), (first, new.keys() - old.keys())):
        if lost:
            task, metric = sorted(lost)[0]
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise DataError(f"{where} lacks {metric!r} of task {task!r}{more}, which the other file has: run both on the same tasks")
    for task in sorted({task for task, _ in old}):
        for field, what in SAME.items():
            x, y = (part(found, field).get(task) for found in (a, b))
            x, y = (v.get("effective") if isinstance(v, Mapping) else v for v in (x, y))
            if x is not None and y is not None and x != y:
                raise DataError(f"task {task!r} has another {what} in {first} ({x!r:.40}) than in {second} ({y!r:.40}): these are not comparable")
    rows = []
    for (task, metric), (x, s) in old.items():
        y, t = new[task, metric]
        width = Z * math.hypot(s, t)
        low, high = (y - x - width, y - x + width) if math.isfinite(y - x) and math.isfinite(width) else (-math.inf, math.inf)
        name = f"ability.{task}.{metric.removesuffix(',none').replace(',', '.')}"
        best = part(a, "higher_is_better").get(task)
        worse = "; lower is better" if isinstance(best, Mapping) and best.get(metric.split(",")[0]) is False else ""
        note = f"{y:.4g} after, {x:.4g} before{worse}{'' if math.isfinite(width) else '; a standard error is missing'}"
        rows.append(Row(printable(name), y - x, low, high, samples(a, task), note))
    return rows


def load(path: Path | str) -> tuple[str, dict[str, Any]]:
    """Name and content of a result file, or of the only one in a folder."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(path.rglob("results_*.json"))
        if len(inside) != 1:
            raise DataError(f"{path} holds {len(inside) or 'no'} files results_*.json: name the one that is meant")
        path = inside[0]
    where = printable(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise DataError(f"{where} is larger than {MAX_BYTES} bytes")
        found = json.loads(content.decode())
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except DataError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or a number of too many digits
        raise DataError(f"{where} is not JSON: {printable(str(error))}") from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise DataError(f"{where} holds no 'results': is it a results_*.json of lm_eval?")
    return where, found


def metrics(where: str, found: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """(task, "metric,filter") -> (value, standard error, inf where there is none), in the order of the file."""
    out = {}
    for task, values in found["results"].items():
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: the results of task {task!r:.80} are no object")
        for metric, value in values.items():
            name, comma, filter_ = metric.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr,{filter_}")
            if not number(value):
                raise DataError(f"{where}: {metric!r:.80} of task {task!r:.80} is {value!r:.40}, not a number")
            if error not in (None, "N/A") and (not number(error) or error < 0):
                raise DataError(f"{where}: the standard error of {metric!r:.80} of task {task!r:.80} is {error!r:.40}, not a number of at least 0")
            out[task, metric] = (float(value), float(error) if number(error) and math.isfinite(error) else math.inf)
    if not out:
        raise DataError(f"{where} holds no metric such as 'acc,none': is it a results_*.json of lm_eval 0.4 or later?")
    return out


def number(value: Any) -> bool:
    """A float (nan and infinities included) or an integer that fits one; no truth value."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


def part(found: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """An object of the file, empty where it is not there."""
    return value if isinstance(value := found.get(field), Mapping) else {}


def samples(found: Mapping[str, Any], task: str) -> int:
    """Questions of a task that were asked, 0 where the file does not say."""
    n = part(part(found, "n-samples"), task).get("effective")
    return n if isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**62 else 0


def printable(text: str) -> str:
    """At most 200 characters, those that do not print as spaces."""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def added(verdict: Any, rows: Sequence[Row], rules: Mapping[str, str] | None = None) -> Any:
    """The verdict with further rows on the try that it shows (the chosen one, else the last that was audited), and refused where these break `rules`.

    Such rules have no self-test: the rows come from outside. Raises SettingError where no try was audited or a rule names none of the rows.
    """
    shown = verdict.chosen or next((t for t in reversed(verdict.tries) if t.rows), None)
    if shown is None:
        raise SettingError("no try was audited, so there is none to add rows to")
    if unknown := sorted(set(rules or {}) - {r.name for r in rows}):
        raise SettingError(f"the rule on {unknown[0]} reads no row; there are: {', '.join(r.name for r in rows[:8]) or 'none'}")
    broken = gate(rows, rules or {})
    new = replace(shown, rows=(*shown.rows, *rows), reasons=(*shown.reasons, *broken))
    passed = verdict.passed and not broken
    return replace(
        verdict, passed=passed, reasons=[*verdict.reasons, *broken], chosen=new if passed else None, rules={**verdict.rules, **(rules or {})},
        tries=tuple(new if t is shown else t for t in verdict.tries),
        notes=(*verdict.notes, *((f"No self-test: {', '.join(rules)} read rows that were measured elsewhere.",) if rules else ())),
    )  # fmt: skip
