"""Inverse-Fisher products: Woodbury on stored per-example gradients, and the published recursion. Card l1-sparse, IU."""

from __future__ import annotations

import torch
from torch import Tensor


def woodbury(grads: Tensor, v: Tensor, damp: float) -> Tensor:
    """damp * (damp I + G^T G / N)^{-1} v for gradients G (N, P) and v (P,): tends to v for large damp.

    = v - G^T (N damp I + G G^T)^{-1} G v. Solved in float64.

    >>> woodbury(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0]), 1.0)
    tensor([0.5000])
    """
    g, w = grads.double(), v.double()
    n = len(g)
    system = n * damp * torch.eye(n, dtype=torch.double, device=g.device) + g @ g.T
    return (w - g.T @ torch.linalg.solve(system, g @ w)).to(v.dtype)


def published(grads: Tensor, v: Tensor, n: int = 1000) -> Tensor:
    """The recursion of the published code: t = o.g; k -= (k.g / (N + t)) o; o -= (t / (N + t)) o, with o the first gradient.

    `o` stays parallel to the first gradient, so this is a rank-one correction of v, not an inverse Fisher.

    >>> published(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0]))
    tensor([0.9990])
    """
    k, o = v.clone(), grads[0].clone()
    for g in grads[1:]:
        t = o @ g
        k = k - (k @ g) / (n + t) * o
        o = o - t / (n + t) * o
    return k
