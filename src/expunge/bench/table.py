"""JSON lines of a benchmark -> Markdown: per scenario one line per method, mean over seeds with the smallest and largest.

Records and classes are ranked by the gap closed (KLOM), where the world is valid; texts by D over its critical value, what is not told apart from a gold
model (largest D of its seeds at most critical) and keeps 95 % of the utility first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOTHING = "nothing"
"""The baseline that leaves the model as it is."""

TOLD, UTILITY = "tofu.d_over_critical", "tofu.model_utility"

COLUMNS: tuple[tuple[str, str, float], ...] = (
    ("gap closed, KLOM", "gap_closed.klom", 1),
    ("gap closed, KL", "gap_closed.kl", 1),
    ("KLOM forget / floor", "klom_ratio.forget", 1),
    ("KLOM retain / floor", "klom_ratio.retain", 1),
    ("KLOM test / floor", "klom_ratio.test", 1),
    ("UA", "accuracy.forget", -100),
    ("RA", "accuracy.retain", 100),
    ("TA", "accuracy.test", 100),
    ("loss AUC", "membership.loss_auc", 1),
    ("average gap", "average_gap", 1),
    ("KS D / critical", "tofu.d_over_critical", 1),
    ("p", "tofu.forget_quality", 1),
    ("shift", "tofu.shift", 1),
    ("model utility", "tofu.model_utility", 1),
    ("extraction forget", "memorised.extraction_strength.forget", 1),
    ("extraction retain", "memorised.extraction_strength.retain", 1),
    ("drop retain", "drop.retain", 1),
    ("drop general", "drop.general", 1),
    ("UA", "canvas.ua", 100),
    ("IRA", "canvas.ira", 100),
    ("CRA", "canvas.cra", 100),
    ("drawn under other names", "canvas.alias", 100),
    ("feature distance", "canvas.distance", 1),
    ("drawn under a soft prompt", "prompt_attack.soft", 100),
    ("under words found by gradients", "prompt_attack.words", 100),
    ("by search", "prompt_attack.search", 100),
    ("matched forget", "zero_shot.forget", 100),
    ("other words", "zero_shot.forget_other", 100),
    ("matched retain", "zero_shot.retain", 100),
    ("matched test", "zero_shot.test", 100),
    ("class drawn", "gan.erased", 100),
    ("rarest kept class", "gan.rarest", 100),
    ("feature distance", "gan.distance", 1),
    ("PSNR forget", "reconstruction.psnr.forget", 1),
    ("PSNR retain", "reconstruction.psnr.retain", 1),
    ("recognised forget", "reconstruction.recognised.forget", 100),
    ("gap closed, PSNR", "oracle_gap.closed", 1),
    ("error forget", "error.forget", 1),
    ("error test", "error.test", 1),
)
"""Heading, row, factor (-100: 100 minus 100 times the value)."""


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """All scenarios of one world. Methods are ranked by gap closed only where doing nothing is apart from the floor; else the text says so."""
    out = []
    for scenario in dict.fromkeys(c["scenario"] for c in cells):
        mine = [c for c in cells if c["scenario"] == scenario]
        first = mine[0]
        seeds = len({c["seed"] for c in mine})
        out.append(f"### {first['world']}, {scenario}: {seeds} seed(s), {first['references']} retrained models, {first['date']}, {first['machine']}\n")
        out.append(apart(mine) + "\n")
        gap = () if valid(mine) else ("gap_closed.klom",)
        columns = [c for c in COLUMNS if c[1] not in gap and any(c[1] in by_name(cell) for cell in mine)]
        timed = any(c.get("cpu_seconds") for c in mine)
        out.append("| method | " + " | ".join(h for h, _, _ in columns) + (" | CPU s" if timed else "") + " | share of retraining's passes | outcome |")
        out.append("|---" * (len(columns) + 3 + timed) + "|")
        for method in ranked(mine):
            group = [c for c in mine if c["method"] == method]
            values = [_spread([_value(c, row, factor) for c in group]) for _, row, factor in columns]
            values += [_spread([c.get("cpu_seconds") for c in group])] if timed else []
            outcomes = ", ".join(sorted({c["outcome"] for c in group}))
            out.append(f"| {method} | " + " | ".join(values) + f" | {_spread([c['share'] for c in group])} | {outcomes} |")
        out.append("")
    return "\n".join(out)


def reaches(cells: Sequence[Mapping[str, Any]], method: str) -> bool:
    """Whether a language method is, on all seeds that it ran, not told apart from the gold model and keeps 95 % of the utility of the model before."""
    before = {c["seed"]: _value(c, UTILITY, 1) for c in cells if c["method"] == NOTHING}
    mine = [(_value(c, TOLD, 1), _value(c, UTILITY, 1), before.get(c["seed"])) for c in cells if c["method"] == method]
    return bool(mine) and all(d is not None and d <= 1 and u is not None and b is not None and u >= 0.95 * b for d, u, b in mine)


def apart(cells: Sequence[Mapping[str, Any]]) -> str:
    """How far doing nothing is from the floor on the forget set, and on retain: the world is valid only where doing nothing fails."""
    if any(TOLD in by_name(c) for c in cells):
        far = [_value(c, TOLD, 1) for c in cells if c["method"] == NOTHING]
        good = [m for m in dict.fromkeys(c["method"] for c in cells) if m not in (NOTHING, "retrain") and reaches(cells, m)]
        reached = ", ".join(good) or "no method"
        return f"D over its critical value: doing nothing {_spread(far)}. At most 1, with 95 % of the utility before, on every seed: {reached}."
    if drawn := next((rows for c in cells if "canvas.ua" in (rows := by_name(c))), None):
        counted = (
            ("of the concept", "canvas.ua"),
            ("of its neighbours", "canvas.ira"),
            ("under other names", "canvas.alias"),
            ("under each attack", "prompt_attack.soft"),
        )
        numbers = ", ".join(f"{drawn[row]['n']} {what}" for what, row in counted if row in drawn)
        return f"What a judge sees in the drawings, in %; alphabetical. Drawings per seed: {numbers}."
    rows = [by_name(c) for c in cells if c["method"] == NOTHING]
    far = [r["klom_before.forget"]["value"] for r in rows if "klom_before.forget" in r]
    floor = [r["klom_floor.forget"]["value"] for r in rows if "klom_floor.forget" in r]
    kept = [r["klom_before.retain"]["value"] for r in rows if "klom_before.retain" in r]
    if not far:
        return "No retrained models: methods cannot be ranked." if not cells[0]["references"] else "Models of this kind have no KLOM: alphabetical."
    end = "Ranked by gap closed." if valid(cells) else "Doing nothing does not fail: this world is not valid for ranking, the order is alphabetical."
    return f"KLOM on forget: doing nothing {_spread(far)} (on retain {_spread(kept)}), floor {_spread(floor)}. {end}"


def valid(cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether doing nothing is, on every seed, more than 1.5 times as far on forget as the floor, and as it is on retain: two trainings differ
    on records that both saw, and that difference is no memory of the forget set."""
    rows = [r for c in cells if c["method"] == NOTHING and "klom_before.forget" in (r := by_name(c))]
    near = [max(r[k]["value"] for k in ("klom_floor.forget", "klom_before.retain") if k in r) for r in rows]
    return bool(rows) and all(r["klom_before.forget"]["value"] > 1.5 * n for r, n in zip(rows, near, strict=True))


def ranked(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods by mean gap closed where the world is valid; the rest after them by name."""

    trusted = valid(cells)

    def key(method: str) -> tuple[float, str]:
        told = [v for c in cells if c["method"] == method and (v := _value(c, TOLD, 1)) is not None]
        if told:
            return (sum(told) / len(told) + 100 * (not reaches(cells, method)), method)
        values = [_value(c, "gap_closed.klom", 1) for c in cells if c["method"] == method]
        good = [v for v in values if v is not None and math.isfinite(v)] if trusted else []
        return (-sum(good) / len(good) if good else math.inf, method)

    return sorted({c["method"] for c in cells}, key=key)


def _value(cell: Mapping[str, Any], row: str, factor: float) -> float | None:
    found = by_name(cell).get(row)
    if found is None or found["value"] is None:
        return None
    return 100 - 100 * found["value"] if factor == -100 else factor * found["value"]


def _spread(values: Sequence[float | None]) -> str:
    """Mean (smallest to largest) of what was measured; the mean alone for one value."""
    good = [v for v in values if v is not None and math.isfinite(v)]
    if not good:
        return "-"
    show: Callable[[float], str] = lambda v: f"{v:.3g}" if abs(v) < 100 else f"{v:.0f}"  # noqa: E731
    mean = show(sum(good) / len(good))
    return mean if len(good) == 1 or min(good) == max(good) else f"{mean} ({show(min(good))} to {show(max(good))})"


def by_name(cell: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cell's rows by row name."""
    return {row["name"]: row for row in cell["rows"]}
