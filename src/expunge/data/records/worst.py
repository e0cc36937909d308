"""Worst-case forget sets: the m records whose removal is hardest, because the model without them still predicts them well.

Source: Fan et al., "Challenging Forgets", ECCV 2024, arXiv:2403.07362; card worst-case. It builds test sets: an unlearner that is tuned on random
records should be audited on these, and never tuned on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.session import scratch
from expunge.core.types import Task
from expunge.modalities.examples import Examples
from expunge.parts.reading import score


def project(a: Tensor, m: float) -> Tensor:
    """clip(a - mu, 0, 1) with mu such that the sum is m: the nearest point of {0 <= w <= 1, sum w = m}. By bisection, to 1e-7.

    >>> project(torch.tensor([0.9, 0.5, 0.2, -0.1]), 1).round(decimals=6)
    tensor([0.7000, 0.3000, 0.0000, 0.0000])
    """
    given, a = a, a.double()
    low, high = float(a.min()) - 1, float(a.max())
    for _ in range(100):
        mu = (low + high) / 2
        low, high = (mu, high) if float((a - mu).clamp(0, 1).sum()) > m else (low, mu)
    return (a - (low + high) / 2).clamp(0, 1).to(given)


def upper(w: Tensor, losses: Tensor, m: float, *, lr: float, gamma: float = 0.0) -> Tensor:
    """One upper step: project(w - lr * (l + 2 * gamma * w)). Weight moves to records of low loss, which are the hardest to forget.

    >>> upper(torch.full((4,), 0.25), torch.tensor([0.1, 2.0, 0.5, 3.0]), 1, lr=0.1)
    tensor([0.3800, 0.1900, 0.3400, 0.0900])
    """
    return project(w - lr * (losses + 2 * gamma * w), m)


def select(
    model: nn.Module, task: Task, train: Examples, m: int, *, easiest: bool = False, rounds: int = 10, epochs: float = 1.0, lr: float = 1e-3,
    upper_lr: float = 0.05, gamma: float = 1e-4, batch_size: int = 128, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """(m,) positions in `train` of the hardest (or easiest) forget set of m records, in order. The model is not changed.

    Each round starts from the model: `epochs` of signSGD on sum (1 - w_i) CE_i, theta <- theta - lr * sign(grad), then one `upper` step on the
    losses that are left, in units of their mean (with `easiest`, up instead of down), read in eval mode without augmentation. The published code
    starts from a random choice, which decides the order where all losses are near 0; reads losses in train mode with augmentation, which is
    noisier; and does not scale them. Raises SettingError unless 0 < m < len(train).
    """
    if not 0 < m < len(train):
        raise SettingError(f"m must be 1 to {len(train) - 1} of {len(train)} records, not {m}")
    n = len(train)
    w = torch.full((n,), m / n)
    for t in range(rounds):
        if progress:
            progress("worst-case forget set", t, rounds)
        losses = score(_lower(model, task, train, w, epochs, lr, batch_size, seed + t), task, train).nll
        losses = losses / losses.mean().clamp(min=1e-12)
        w = upper(w, -losses if easiest else losses, m, lr=upper_lr, gamma=gamma)
    return w.topk(m).indices.sort().values


def _lower(model: nn.Module, task: Task, train: Examples, w: Tensor, epochs: float, lr: float, batch_size: int, seed: int) -> nn.Module:
    """A copy after weighted signSGD; only parameters move."""
    twin = copy.deepcopy(model).requires_grad_(True)
    s = scratch(twin)
    s.train()
    batches = task.batches(train, batch_size, epochs=epochs, seed=seed)
    with guard.watching(guard.Guard()):
        for k in range(len(batches)):
            batch = batches[k]
            out = task.forward(twin, batch)
            grads = torch.autograd.grad(((1 - w[batch["i"]]).to(out.nll) * out.mean).sum(), list(twin.parameters()), allow_unused=True)
            with torch.no_grad():
                for p, g in zip(twin.parameters(), grads, strict=True):
                    if g is not None:
                        p.sub_(lr * g.sign())
    return twin.eval()


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a and b| / |a or b| of two selections: how far two runs agree. Without agreement "worst" is unproven.

    >>> jaccard(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]))
    0.5
    """
    both = int(torch.isin(a, b).sum())
    return both / (len(a) + len(b) - both)
