"""Distances between weights as clouds of rows. Source: card entity-level (Opt-Out, arXiv:2406.12329), step 6."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.core.errors import SettingError


def sliced_w2(theta: Tensor, theta0: Tensor, projections: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """SW2^2(theta, theta0): mean over random unit vectors u of the mean squared difference of sorted theta u and sorted theta0 u. A scalar.

    theta, theta0   (R,): sorted differences, no projection; (R, C) or (..., C): the rows are points of C features
    projections     number of u (C,), drawn by `generator` on its device (the CPU when None), in float32 or wider

    The order of rows does not matter, so it is at most the mean squared difference of matched rows, and 0 does not mean that theta = theta0.
    With theta0 = theta + c in one dimension it is c^2.

    >>> at = lambda *v: torch.tensor(v)
    >>> sliced_w2(at(1.0, 3.0), at(3.0, 1.0)), sliced_w2(at(2.0, 4.0), at(1.0, 3.0))
    (tensor(0.), tensor(1.))
    """
    if theta.shape != theta0.shape:
        raise SettingError(f"sliced_w2 compares tensors of one shape; found {tuple(theta.shape)} and {tuple(theta0.shape)}")
    if projections < 1:
        raise SettingError(f"projections must be 1 or larger, not {projections}")
    wide = torch.promote_types(theta.dtype, torch.float32)
    a, b = (t.to(wide).reshape(-1, t.shape[-1] if t.ndim > 1 else 1) for t in (theta, theta0))
    if theta.ndim > 1:
        u = torch.randn(a.shape[1], projections, generator=generator, device=generator.device if generator is not None else None, dtype=wide)
        u = (u / u.norm(dim=0)).to(a.device)
        a, b = a @ u, b @ u
    return (a.sort(0).values - b.sort(0).values).square().mean()
