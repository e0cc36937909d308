"""Near copies among inputs: kept records that are almost those to forget. What a model knows of such a record it may know from the one that stays.

    thumbnail   means over at most SIDE x SIDE fields of each channel, less their mean, at length 1
    likeness    cosine of two thumbnails: 1 for images that differ in brightness and contrast alone

Two images are near when their thumbnails of side 8 are LIKE[8] alike and those of side 16 LIKE[16] alike: the small ones sort out, the large ones decide. Noise
of 5 % of the range, half the resolution or fewer grey levels mostly pass; a shift of an eighth of the side, a mirror or a stamp do not.

Rows of a table (N, D) of at least LEAST columns are compared with each column in units of its spread over retain: likeness 1 - (mean squared difference) / 2.
How the thresholds were chosen: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.core.types import Split
from expunge.modalities.stored import Stored

LIKE = {8: 0.95, 16: 0.98}
LEAST = 8
"""Fewest columns of a table whose rows are compared: in fewer, rows of different people are alike."""
READ = 256
"""Inputs that are read at once where they are not held in memory."""
BLOCK = 1 << 22
"""Most likenesses that are held at once."""


def inputs(split: Split) -> list[tuple[int, int, float]] | None:
    """(forget id, kept id, likeness) of each kept record that is a near copy of one to forget, with the one that it is most like; the most alike first.

    None where inputs cannot be compared: no retain, several tensors by name, other shapes, tables of few columns.
    """
    gone, kept = (getattr(part, "x", None) for part in (split.forget, split.retain))
    if not all(isinstance(x, (Tensor, Stored)) for x in (gone, kept)) or gone.shape[1:] != kept.shape[1:]:
        return None
    if gone.ndim == 2 and not (isinstance(gone, Tensor) and isinstance(kept, Tensor)):
        return None
    if gone.ndim < 2 or (gone.ndim == 2 and gone.shape[1] < LEAST):
        return None
    coarse, fine, first = _tabled(kept) if gone.ndim == 2 else _pictured()
    small, large, step = in_blocks(gone, coarse), in_blocks(gone, fine), max(1, BLOCK // len(gone))
    step = min(step, READ) if isinstance(kept, Stored) else step
    found: list[tuple[int, int, float]] = []
    for start in range(0, len(kept), step):
        block = kept[start : start + step]
        alike = coarse(block, True) @ small.T >= first
        rows = alike.any(1).nonzero().squeeze(1)
        if len(rows):
            likeness, which = (fine(block[rows], True) @ large.T).where(alike[rows], -torch.inf).max(1)
            pairs = zip(split.forget.ids[which].tolist(), split.retain.ids[start + rows].tolist(), likeness.clamp_max(1.0).tolist(), strict=True)
            found += [pair for pair in pairs if pair[2] >= LIKE[16]]
    return sorted(found, key=lambda pair: (-pair[2], pair[1]))


def in_blocks(x: Tensor | Stored, vectors: Vectors) -> Tensor:
    """The vectors of all records to forget."""
    return vectors(x, False) if isinstance(x, Tensor) else torch.cat([vectors(x[k : k + READ], False) for k in range(0, len(x), READ)])


Vectors = Callable[[Tensor, bool], Tensor]


def _pictured() -> tuple[Vectors, Vectors, float]:
    """(what gives the small vectors of inputs, what gives the large ones, least product of two small ones)."""
    return lambda x, other: thumbnails(x, 8), lambda x, other: thumbnails(x, 16), LIKE[8]


def _tabled(kept: Tensor) -> tuple[Vectors, Vectors, float]:
    """The same for rows of a table. 1 - |u - v|^2 / 2 is the product (u, 1 - |u|^2 / 2, 1) . (v, 1, -|v|^2 / 2)."""
    mean, spread = kept.double().mean(0), kept.double().std(0, correction=0).clamp_min(1e-12)

    def vectors(x: Tensor, other: bool) -> Tensor:
        u = (x.double() - mean) / spread / x.shape[1] ** 0.5
        half, one = u.square().sum(1, keepdim=True) / 2, u.new_ones(len(u), 1)
        return torch.cat([u, one, -half] if other else [u, 1 - half, one], 1)

    return vectors, vectors, LIKE[16]


def thumbnails(x: Tensor, side: int) -> Tensor:
    """(N, D) thumbnails of images (N, C, H, W), or of anything else (N, ...) as one line of at most side * side means; 0 for what is constant."""
    line = x.ndim != 4
    x = x.flatten(1)[:, None, None].float() if line else x.float()
    shape = (1, min(side * side, x.shape[-1])) if line else (min(side, x.shape[-2]), min(side, x.shape[-1]))
    small = F.adaptive_avg_pool2d(x, shape).flatten(1)
    centred = small - small.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-5 * small.norm(dim=1, keepdim=True), centred / length.clamp_min(1e-12), 0.0)
