"""Inverse-Fisher products: Woodbury on stored per-example gradients, and the published recursion. Card l1-sparse, IU."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 1 << 16
"""Columns of the gradients that are widened to float64 at once."""


def woodbury(grads: Tensor, v: Tensor, damp: float, n: int = 0) -> Tensor:
    """damp * (damp I + G^T G / n)^{-1} v for gradients G (N, P) and v (P,), n = N when 0: tends to v for large damp.

    = v - G^T (n damp I + G G^T)^{-1} G v, solved in float64: what the Sherman-Morrison recursion u_i = F_{i-1}^{-1} g_i gives when every u_i
    is stored, without its loop.

    >>> woodbury(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0]), 1.0)
    tensor([0.5000])
    """
    parts, slices = grads.split(COLUMNS, 1), v.double().split(COLUMNS)
    system = (n or len(grads)) * damp * torch.eye(len(grads), dtype=torch.double, device=grads.device)
    right = torch.zeros(len(grads), dtype=torch.double, device=grads.device)
    for g, w in zip(parts, slices, strict=True):
        wide = g.double()
        system += wide @ wide.T
        right += wide @ w
    solved = torch.linalg.solve(system, right)
    return torch.cat([w - g.double().T @ solved for g, w in zip(parts, slices, strict=True)]).to(v.dtype)


def published(grads: Tensor, v: Tensor, n: int = 1000) -> Tensor:
    """The recursion of the published code: t = o.g; k -= (k.g / (n + t)) o; o -= (t / (n + t)) o, with o the first gradient.

    `o` stays parallel to the first gradient, so this is a rank-one correction of v, not an inverse Fisher. When all gradients are the
    same it equals `woodbury(grads[1:], v, 1, n)`.

    >>> published(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0]))
    tensor([0.9990])
    """
    k, o = v.clone(), grads[0].clone()
    for g in grads[1:]:
        t = o @ g
        k = k - (k @ g) / (n + t) * o
        o = o - t / (n + t) * o
    return k
