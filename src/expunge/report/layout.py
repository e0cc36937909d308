"""What fits into a terminal: a table of as many columns as can stand without a broken word, and quantiles as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expunge.report.cells import number
from expunge.report.glance import RECORDS, SAYS

GAP = 3
"""Characters between two columns; one stands at either side of a table."""
FLOOR = 1e-6
"""Losses below are drawn here."""
STYLES = {"before": "bright_black", "after": "blue", "retrained": "yellow"}


def broken(cell: str) -> str:
    """`0.97 (0.95 to 0.98, n = 500)` over three lines, anything else as it is."""
    value, bracket, rest = cell.partition(" (")
    return f"{value}\n" + rest.removesuffix(")").replace(", ", "\n") if bracket and rest.endswith(")") else cell


def least(heading: str, cells: Sequence[str]) -> int:
    """Fewest characters in which a column stands without a broken word: the longest word of headings and plain cells, the longest line of figures.

    >>> least("forget accuracy", ["0.97\\n0.95 to 0.98\\nn = 500", "not measurable"])
    12
    """
    lines = [part for cell in cells for part in (cell.split("\n") if "\n" in cell else cell.split())]
    return max(map(len, [*heading.split(), *lines]), default=1)


def fitting(widths: Sequence[int], width: int) -> list[int]:
    """Which columns are shown: always the first (the method) and the last (the outcome), then two figures, the cost (the last but one), further figures in
    their order, as long as they fit.

    >>> fitting([20, 10, 10, 10, 10, 8], 60), fitting([20, 10, 10, 10, 10, 8], 80), fitting([20, 70, 10, 8], 60)
    ([0, 1, 2, 5], [0, 1, 2, 4, 5], [0, 3])
    """
    last = len(widths) - 1
    order = [*range(1, min(3, last - 1)), *([last - 1] if last > 1 else []), *range(3, last - 1)]
    shown, used = {0, last}, 2 + widths[0] + GAP + widths[last]
    for k in order:
        if used + GAP + widths[k] > width:
            break
        shown.add(k)
        used += GAP + widths[k]
    return sorted(shown)


def spread(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths of columns: the least of each, and what is left of `room` to the last, then to the others in turn, up to the most of each.

    >>> spread([5, 5, 5], [9, 5, 8], 20), spread([5, 5, 5], [9, 5, 8], 40), spread([5, 5], [9, 9], 3)
    ([7, 5, 8], [9, 5, 8], [5, 5])
    """
    widths, left = list(least), room - sum(least)
    for k in (len(widths) - 1, *range(len(widths) - 1)):
        more = max(0, min(left, most[k] - widths[k]))
        widths[k], left = widths[k] + more, left - more
    return widths


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Any:
    """A `rich.table.Table` of the columns that fit: method, figures, cost, outcome."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[broken(cell) for cell in row] for row in rows]
    whole = [max(len(part) for text in (head, *(row[k] for row in cells)) for part in text.split("\n")) for k, head in enumerate(headings)]
    thin = [whole[0], *(least(head, [row[k] for row in cells]) for k, head in enumerate(headings) if k)]
    shown = fitting(thin, width)
    widths = spread([thin[k] for k in shown], [whole[k] for k in shown], width - 2 - GAP * (len(shown) - 1))
    more = f" {len(headings) - len(shown)} more columns are in the report." if len(shown) < len(headings) else ""
    found = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, caption=Text("Value (95 % bounds, n), or mean over seeds (smallest to largest)." + more), caption_justify="left",
    )  # fmt: skip
    for k, wide in zip(shown, widths, strict=True):
        found.add_column(Text(headings[k]), width=wide)
    for row in cells:
        found.add_row(*(Text(row[k]) for k in shown))
    return found


def bars(rows: Sequence[tuple[str, str, Sequence[float]]], width: int, about: str = "") -> list[Any]:
    """Quantiles (5, 25, 50, 75, 95 %) of losses as lines of text with one scale, logarithmic unless a loss is negative: records, model, bar, median.
    `about` says what they are of."""
    from rich.padding import Padding
    from rich.text import Text

    if not rows:
        return []
    logarithmic = min(at[0] for _, _, at in rows) >= 0

    def place(v: float) -> float:
        return math.log10(max(v, FLOOR)) if logarithmic else v

    low, high = (pick(place(v) for _, _, at in rows for v in at) for pick in (min, max))
    names = max(len(RECORDS.get(r, r)) for r, _, _ in rows), max(len(m) for _, m, _ in rows)
    start = 4 + sum(names)
    room = max(10, min(60, width - start - 11))
    scale = "losses" + (", on a logarithmic scale" if logarithmic else "")
    lines, seen = [Text(f"  {scale}{'median':>{max(7, start + room + 9 - len(scale))}}", style="bold")], ""
    for records, model, at in rows:
        spots = [round((place(v) - low) / ((high - low) or 1) * (room - 1)) for v in at]
        marks = (("┃", spots[2], spots[2]), ("█", spots[1], spots[3]), ("─", spots[0], spots[4]))
        bar = "".join(next((mark for mark, a, b in marks if a <= k <= b), " ") for k in range(room))
        line = Text(f"  {RECORDS.get(records, records) if records != seen else '':{names[0]}} {model:{names[1]}} ")
        lines.append(line.append(bar, style=STYLES.get(model, "")).append(f" {number(at[2]):>10}"))
        seen = records
    ends = [number(10**v if logarithmic else v) for v in (low, high)]
    return [
        *lines,
        Text(f"{' ' * start}{ends[0]}{ends[1]:>{max(1, room - len(ends[0]))}}"),
        Padding(Text(f"{about[:1].upper() + about[1:]}. {SAYS}" if about else SAYS, style="italic"), (0, 0, 0, 2)),
    ]
