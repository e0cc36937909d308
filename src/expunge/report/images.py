"""What a diffusion model draws before and after, for the report: grids of drawings from the same noise, and heat maps of what a judge names them.

Data first (JSON-able, read from the drawings of the check `canvas`, so that nothing is drawn twice), then the plots that the page makes of them.
"""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.audits.core import Probe
from expunge.audits.pictures.canvas import asked, named_rightly
from expunge.core.digest import model_digest
from expunge.core.errors import SettingError
from expunge.core.types import concat, spread
from expunge.modalities.diffusion.trajectory import distinct
from expunge.modalities.pictures import Pictures
from expunge.report.plots import COLOURS, INK, _label, render
from expunge.report.table import finite, items, mapping

COLUMNS, NEAR, FAR = 6, 9, 6
"""Drawings per concept and model in a grid; other concepts of the erased one's domain, and concepts of other domains, at most."""

PROMPTS, STEPS = 4, 15
"""Prompts drawn where there is no judge, and the steps of a drawing: a real pipeline takes seconds for each."""

SIDE = 128
"""Largest side of an image in the report, in pixels."""

MOST = 20
"""Concepts that are still named beside a heat map."""


def collect(p: Probe) -> dict[str, Any]:
    """Data of the plots below for a diffusion task, by name; nothing for other tasks, and heat maps only with a judge and one concept that is erased.

    grid            rows {"name", "side": erased, near, far or kept, "before", "after"}: PNG strips in base64
    named           domain -> {"names", "before", "after"}: counts [asked concept][what the judge named]
    retainability   rows {"erased", "domain", "right": domain -> concept -> [named rightly, of]}: the untouched model (erased ""), and this request
    """
    task: Any = p.task
    if task.name != "diffusion" or task.sample is None or not isinstance(p.split.forget, Pictures):
        return {}
    try:
        seen = None if p.split.retain is None else asked(p)
    except SettingError:  # several concepts, or none
        seen = None
    if seen is None:
        return {"grid": few(p)}
    names, rows = seen.judge.names, seen.prompts.rows
    shown = {"before": seen.drawn(p, p.before), "after": seen.drawn(p, drawn_by(p, p.after, "canvas"))}
    said = {which: {d: seen.judge.says(x, d) for d in names} for which, x in shown.items()}
    return {
        "grid": strips(concepts(rows, names, seen.domain, seen.concept), shown),
        "named": {d: {"names": list(own), **{which: counts(rows, words[d], d, own) for which, words in said.items()}} for d, own in names.items()},
        "retainability": [
            {"erased": "", "domain": "", "right": right(rows, said["before"], names)},
            {"erased": seen.concept, "domain": seen.domain, "right": right(rows, said["after"], names)},
        ],
    }


def drawn_by(p: Probe, model: nn.Module, what: str) -> nn.Module:
    """The model in the probe's cache that drew `what` and has the same weights (the audit's own copy), so that its drawings serve; else `model`."""
    found = [held for (name, *_), (_, held) in p.cache.items() if name == what]
    if any(held is model for held in found):
        return model
    mine = model_digest(model) if found else ""
    return next((held for held in found if model_digest(held) == mine), model)


def few(p: Probe) -> list[dict[str, str]]:
    """Grid rows of PROMPTS prompts, half of them to be forgotten, half kept, one drawing of each model; none where nothing says what shape is drawn."""
    data, _ = distinct(p.split.forget)
    data = data.take(range(min(PROMPTS if p.split.retain is None else PROMPTS // 2, len(data))))
    sides = ["erased"] * len(data)
    if p.split.retain is not None:
        kept, _ = distinct(p.split.retain)
        kept = kept.take(spread(len(kept), PROMPTS - len(data)))
        data, sides = concat(data, kept), [*sides, *["kept"] * len(kept)]
    data, task = replace(data, ids=torch.arange(len(data))), cast(Any, p.task)
    if data.x is None and not task.shape:
        return []
    guidance = {} if task.null is not None else {"guidance": 1.0}
    shown = {
        which: p.once(("grid", p.seed), model, lambda model=model: task.sample(model, data, seed=p.seed, steps=STEPS, **guidance))
        for which, model in (("before", p.before), ("after", drawn_by(p, p.after, "grid")))
    }
    return strips([(prompt, side, [k]) for k, (prompt, side) in enumerate(zip(data.prompts, sides, strict=True))], shown)


def concepts(rows: Sequence[Mapping[str, Any]], names: Mapping[str, Sequence[str]], domain: str, concept: str) -> list[tuple[str, str, list[int]]]:
    """(name, side, positions of COLUMNS drawings) of the erased concept, then of the others of its domain, then of those of other domains.

    >>> rows = [{"style": s, "object": o} for s in "ab" for o in "xy"]
    >>> concepts(rows, {"style": "ab", "object": "xy"}, "style", "a")
    [('a', 'erased', [0, 1]), ('b', 'near', [2, 3]), ('x', 'far', [2]), ('y', 'far', [3])]
    """
    near, far = [(domain, c) for c in names[domain] if c != concept], [(d, c) for d in names if d != domain for c in names[d]]
    chosen = [("erased", domain, concept), *(("near", *pair) for pair in near[:NEAR]), *(("far", *pair) for pair in far[:FAR])]
    found = []
    for side, d, c in chosen:
        at = [k for k, row in enumerate(rows) if row[d] == c and (side == "erased" or row[domain] != concept)]
        if at:
            found.append((c, side, [at[j] for j in spread(len(at), COLUMNS)]))
    return found


def strips(rows: Sequence[tuple[str, str, Sequence[int]]], shown: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Rows of a grid: name, side, and per model a PNG strip of the drawings at these positions; none for drawings that are no images of 1 or 3 channels."""
    if any(x.shape[1] not in (1, 3) for x in shown.values()):
        return []
    return [{"name": name, "side": side, **{which: png(x[list(at)]) for which, x in shown.items()}} for name, side, at in rows]


def png(x: Tensor) -> str:
    """Images (N, C, H, W) in [-1, 1] side by side with a white gap, as a PNG in base64. What is not finite is grey."""
    from PIL import Image

    x = x.detach().float().cpu().nan_to_num(0.0, 1.0, -1.0).clamp(-1, 1).expand(-1, 3, -1, -1)
    if max(x.shape[-2:]) > SIDE:
        scale = SIDE / max(x.shape[-2:])
        x = F.interpolate(x, size=[max(1, round(s * scale)) for s in x.shape[-2:]], mode="area")
    x = F.pad(x, (0, gap(x.shape[-2]), 0, 0), value=1.0)
    strip = ((x + 1) * 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
    buffer = io.BytesIO()
    Image.fromarray(strip.contiguous().numpy()).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def gap(side: int) -> int:
    """White pixels between images of that height."""
    return max(1, side // 16)


def counts(rows: Sequence[Mapping[str, Any]], said: Sequence[str], domain: str, names: Sequence[str]) -> list[list[int]]:
    """Counts [asked concept][named concept].

    >>> counts([{"style": "a"}, {"style": "a"}, {"style": "b"}], ["a", "b", "b"], "style", "ab")
    [[1, 1], [0, 1]]
    """
    return [[sum(row[domain] == a and word == b for row, word in zip(rows, said, strict=True)) for b in names] for a in names]


def right(rows: Sequence[Mapping[str, Any]], said: Mapping[str, Sequence[str]], names: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[int]]]:
    """domain -> concept -> [drawings named rightly in that domain, drawings asked for]."""
    good = {d: found.tolist() for d, found in named_rightly(rows, said).items()}
    out: dict[str, dict[str, list[int]]] = {}
    for d, concepts in names.items():
        hits = {c: [ok for row, ok in zip(rows, good[d], strict=True) if row[d] == c] for c in concepts}
        out[d] = {c: [sum(h), len(h)] for c, h in hits.items() if h}
    return out


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
