"""What a diffusion model draws before and after, as data for the report: grids of drawings from the same noise, and what a judge names them.

Read from the drawings of the check `canvas`, so that nothing is drawn twice.
"""

from __future__ import annotations

import base64
import io
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
from expunge.core.registry import picture
from expunge.core.types import concat, spread
from expunge.modalities.diffusion.trajectory import distinct
from expunge.modalities.pictures import Pictures

COLUMNS, NEAR, FAR = 6, 9, 6
"""Drawings per concept and model in a grid; other concepts of the erased one's domain, and concepts of other domains, at most."""


PROMPTS, STEPS = 4, 15
"""Prompts drawn where there is no judge, and the steps of a drawing: a real pipeline takes seconds for each."""


SIDE = 128
"""Largest side of an image in the report, in pixels."""


@picture("drawings", tasks=("diffusion",))
def collect(p: Probe) -> dict[str, Any]:
    """Data of the report's plots by name; heat maps only with a judge and one concept that is erased.

    grid            rows {"name", "side": erased, near, far or kept, "before", "after"}: PNG strips in base64
    named           domain -> {"names", "before", "after"}: counts [asked concept][what the judge named]
    retainability   rows {"erased", "domain", "right": domain -> concept -> [named rightly, of]}: the untouched model (erased ""), and this request
    """
    task: Any = p.task
    if task.sample is None or not isinstance(p.split.forget, Pictures):
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
