"""Augmentations of whole batches: tensors in, tensors out, all randomness from the generator that is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.core.errors import SettingError


def crop_flip(padding: int = 4) -> Callable[[Tensor, torch.Generator], Tensor]:
    """A function (x, generator) -> x that shifts each image by up to `padding` pixels and mirrors half of them.

    x is (B, C, H, W); each image is padded with zeros by `padding` on all sides, a window of H x W is cut at a place drawn
    uniformly, and the window is mirrored left to right with probability 1/2. The generator is read three times per batch: rows,
    columns, mirrors, each (B,). Raises SettingError for a negative padding.

    >>> x = torch.arange(4.0).view(1, 1, 1, 4)
    >>> crop_flip(0)(x, torch.Generator().manual_seed(0)).sum() == x.sum()
    tensor(True)
    """
    if padding < 0:
        raise SettingError(f"padding must be 0 or larger, not {padding}")

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        b, c, h, w = x.shape
        top, left, mirror = draw(b, padding, generator)
        rows = top[:, None] + torch.arange(h)
        across = torch.arange(w).expand(b, w)
        columns = left[:, None] + torch.where(mirror[:, None], across.flip(1), across)
        padded = F.pad(x, (padding, padding, padding, padding))
        wide = w + 2 * padding
        places = (rows[:, :, None] * wide + columns[:, None, :]).view(b, 1, h * w).expand(b, c, h * w)
        return padded.flatten(2).gather(2, places.to(x.device)).view(b, c, h, w)

    return augment


def draw(b: int, padding: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Top rows (B,) and left columns (B,) in 0..2 * padding, and mirrors (B,) bool, in the order `crop_flip` draws them."""
    top = torch.randint(2 * padding + 1, (b,), generator=generator)
    left = torch.randint(2 * padding + 1, (b,), generator=generator)
    return top, left, torch.rand(b, generator=generator) < 0.5
