"""The l1 penalty, its decaying weight, and its exact proximal step. Source: card l1-sparse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def l1(params: Iterable[Tensor]) -> Tensor:
    """||theta||_1 over all tensors, one number; the subgradient at 0 is 0.

    >>> l1([torch.tensor([0.5]), torch.tensor([-2.0])])
    tensor(2.5000)
    """
    return torch.stack([p.abs().sum() for p in params]).sum()


def decaying(alpha: float, epoch: int, epochs: float, without: int = 0) -> float:
    """gamma_e = alpha * (1 - e / (T - T0)) for epoch e < T - T0, else 0; T epochs in all, the last T0 = `without` of them unpenalised.

    >>> [round(decaying(1.0, e, 4, 1), 2) for e in range(4)]
    [1.0, 0.67, 0.33, 0.0]
    """
    return alpha * (1 - epoch / (epochs - without)) if epoch < epochs - without else 0.0


def shrink(params: Iterable[Tensor], by: float) -> None:
    """Soft threshold in place, theta <- sign(theta) max(|theta| - by, 0): the proximal step of by * ||theta||_1, with exact zeros (+0).

    >>> p = torch.tensor([0.5, -2.0, 0.05]); shrink([p], 0.1); p
    tensor([ 0.4000, -1.9000,  0.0000])
    """
    with torch.no_grad():
        for p in params:
            p.copy_(F.softshrink(p, by) + 0.0)
