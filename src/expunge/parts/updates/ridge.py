"""`ridge`: edits of linear maps in closed form, one factorisation for all layers that read the same inputs.

Minimise over W'      sum_i w_i ||W' c_i - v_i||^2 + lam ||W' - W||_F^2
with                  A = lam W + sum_i w_i v_i c_i^T,   B = lam I + sum_i w_i c_i c_i^T
solved by             W' = A B^-1

B (I, I) depends on the inputs c_i alone, so it is factored once and serves every layer that reads them. Source: card uce; RECE, TRCE (first stage) and MACE
are the same problem with other pairs.

Check (card uce)
    >>> c, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 4.0]])
    >>> Ridge([(c, 1.0)], lam=0.5).edit(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [v]).round(decimals=4)
    tensor([[1.6667, 2.0000],
            [3.6667, 4.0000]])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from expunge.core.errors import SettingError


class Ridge:
    """The factored B of groups of inputs, each (C (N, I), weight): `edit` then solves for one layer at a time, in float64.

    Raises SettingError when B is singular to float64, which only happens at lam = 0 with too few inputs.
    """

    def __init__(self, groups: Sequence[tuple[Tensor, float]], lam: float) -> None:
        if lam < 0:
            raise SettingError(f"lam must be 0 or larger, not {lam}")
        self.lam, self.groups = lam, [(c.double(), w) for c, w in groups]
        width = self.groups[0][0].shape[1]
        B = lam * torch.eye(width, dtype=torch.double, device=self.groups[0][0].device)
        for c, w in self.groups:
            B = B + w * c.T @ c
        factor, info = torch.linalg.cholesky_ex(B)
        diagonal = factor.diagonal()
        if int(info) or float(diagonal.min()) <= 1e-7 * float(diagonal.max()):
            raise SettingError(f"the inputs do not determine a map of width {width}: set lam above 0, or give more texts to preserve")
        self.factor = factor

    def edit(self, weight: Tensor, values: Sequence[Tensor]) -> Tensor:
        """W' (O, I) in the type of `weight` (O, I), for values (N, O) of each group."""
        W = weight.double()
        A = self.lam * W
        for (c, w), v in zip(self.groups, values, strict=True):
            A = A + w * v.double().T @ c
        return torch.cholesky_solve(A.T, self.factor).T.to(weight.dtype)


def redirect(weights: Iterable[Tensor], pairs: Sequence[tuple[Tensor, Tensor, float]], lam: float) -> None:
    """Writes W' (O, I) over each W: W' makes of inputs c (N, I) what W made of g (N, I), for pairs (c, g, weight); a pair (r, r, weight) preserves.

    >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> redirect([W], [(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 1.0)], lam=0.5)
    >>> W.round(decimals=4)
    tensor([[1.6667, 2.0000],
            [3.6667, 4.0000]])
    """
    ridge = Ridge([(c, w) for c, _, w in pairs], lam)
    with torch.no_grad():
        for W in weights:
            W.copy_(ridge.edit(W, [g.double() @ W.double().T for _, g, _ in pairs]))


def residual(weight: Tensor, c: Tensor, v: Tensor) -> float:
    """||W c - v|| / ||v|| over all rows: how far an edit is from what it asked for."""
    found = c.double() @ weight.double().T
    return float((found - v.double()).norm() / v.double().norm().clamp(min=1e-12))
