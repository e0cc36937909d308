"""What a diffusion model draws before and after, for the report: grids of drawings from the same noise, and heat maps of what a judge names them.

Data first (JSON-able, read from the drawings of the check `canvas`, so that nothing is drawn twice), then the plots that the page makes of them.
"""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.audits.pictures.drawn import SIDE, gap
from expunge.report.plots import COLOURS, INK, _label, render
from expunge.report.table import finite, items, mapping

MOST = 20
"""Concepts that are still named beside a heat map."""


def requests(documents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows for `retainability` of several reports on one model, one request each: the untouched model of the first, then what each has erased."""
    tables = [items(mapping(d.get("pictures")).get("retainability")) for d in documents]
    return [*(row for rows in tables[:1] for row in rows if not row.get("erased")), *(row for rows in tables for row in rows if row.get("erased"))]


def grid(data: Any) -> str:
    """Drawings before and after, one row per concept. Rows whose strips cannot be read are left out."""
    import numpy as np

    rows = []
    for row in items(data):
        pair = [_read(row.get(which)) for which in ("before", "after")]
        if all(strip is not None for strip in pair):
            rows.append((row, pair))
    if not rows:
        return ""
    columns = [[pair[k] for _, pair in rows] for k in (0, 1)]
    width = max(strip.shape[1] for column in columns for strip in column)
    heights = [max(strip.shape[0] for strip in pair) for _, pair in rows]
    gaps = [gap(h) for h in heights]
    tops = [sum(heights[:k]) + sum(gaps[:k]) for k in range(len(rows))]
    pages = []
    for column in columns:
        page = np.full((tops[-1] + heights[-1], width, 3), 255, np.uint8)
        for top, strip in zip(tops, column, strict=True):
            page[top : top + strip.shape[0], : strip.shape[1]] = strip
        pages.append(page)
    names = [textwrap.shorten(f"{_label(row.get('name'))} ({_label(row.get('side'))})", 40, placeholder=" ...") for row, _ in rows]

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        for axis, page, title in zip(axes, pages, ("before", "after"), strict=True):
            axis.imshow(page, interpolation="none", aspect="equal")
            axis.set_title(title)
            axis.set_xticks([])
            axis.set_yticks([t + h / 2 for t, h in zip(tops, heights, strict=True)], names if axis is axes[0] else [""] * len(names))
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)

    across = min(3.4, 3.4 * width / pages[0].shape[0] * 2)
    return render(2 * across + 2, min(11.0, across * pages[0].shape[0] / width + 0.4), 2, paint)


def _read(text: Any) -> Any:
    """(H, W, 3) bytes of a PNG in base64; None for what is none."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB")) if image.width <= 64 * SIDE and image.height <= 2 * SIDE else None
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None


def named(data: Any) -> str:
    """One pair of heat maps per domain: share of the drawings asked for as each concept (rows) that the judge names as each (columns), before and after."""
    return "".join(_pair(domain, mapping(one)) for domain, one in mapping(data).items())


def _pair(domain: Any, one: Mapping[str, Any]) -> str:
    import numpy as np

    names = [_label(n) for n in one.get("names") or ()]
    kept = {}
    for which in ("before", "after"):
        rows = [[v if finite(v) else 0 for v in row] for row in one.get(which) or () if isinstance(row, (list, tuple))]
        if names and [len(row) for row in rows] == [len(names)] * len(names):
            kept[which] = np.array(rows, float)
    if not kept:
        return ""

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        for axis, (which, found) in zip(axes, kept.items(), strict=True):
            heat(axis, found / np.maximum(found.sum(1, keepdims=True), 1), names if axis is axes[0] else [], names)
            axis.set_title(f"{which}: {_label(domain)}")
            axis.set_xlabel("the judge names it")
        axes[0].set_ylabel("asked for")

    side = min(4.2, 1.4 + 0.34 * len(names))
    return render(side * len(kept) + 0.6, side + 0.2, len(kept), paint)


def retainability(data: Any) -> str:
    """One heat map for any number of requests: what was erased (rows) against what was drawn (columns); share that the judge names rightly. The cell of what
    was erased has a frame: it should be pale, and all others dark. Concepts that were never drawn are blank."""
    import numpy as np

    rows = [row for row in items(data) if mapping(row.get("right"))]
    columns = list(dict.fromkeys((d, c) for row in rows for d, found in mapping(row["right"]).items() for c in mapping(found)))
    if not columns:
        return ""
    shares = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for j, (d, c) in enumerate(columns):
            cell = mapping(mapping(row["right"]).get(d)).get(c)
            if isinstance(cell, (list, tuple)) and len(cell) == 2 and all(finite(v) for v in cell) and cell[1] > 0:
                shares[i, j] = cell[0] / cell[1]
    frames = [(i, columns.index(at)) for i, row in enumerate(rows) if (at := (row.get("domain"), row.get("erased"))) in columns]
    names = [_label(row.get("erased")) or "nothing" for row in rows]

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        axis = axes[0]
        heat(axis, shares, names, [_label(c) for _, c in columns])
        for i, j in frames:
            axis.add_patch(_frame(j, i))
            if shares[i, j] < 0.005:
                axis.text(j, i, "0", ha="center", va="center", fontsize=6.5, color=INK)
        for j, (one, two) in enumerate(itertools.pairwise(columns)):
            if one[0] != two[0]:
                axis.axvline(j + 0.5, color=INK, linewidth=1)
        axis.set_ylabel("erased")
        axis.set_xlabel(f"drawn: {', '.join(dict.fromkeys(_label(d) for d, _ in columns))}")

    return render(min(9.0, 1.8 + 0.5 * len(columns)), min(11.0, 1.3 + 0.34 * len(rows)), 1, paint)


def _frame(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=COLOURS["retrained"], linewidth=1.8)


def heat(axis: Any, shares: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Shares (R, C) from 0 to 1 as colours, in per cent where there is room; nan is blank."""
    import numpy as np

    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest", aspect="auto")
    few = max(shares.shape) <= MOST
    axis.set_xticks(range(len(columns)) if few else [], columns if few else [], rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)) if few else [], rows if few else [])
    axis.tick_params(length=0)
    if few:
        for i, j in np.argwhere(shares >= 0.005):
            axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=6.5, color="white" if shares[i, j] > 0.6 else INK)
