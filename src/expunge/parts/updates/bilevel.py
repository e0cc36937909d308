"""`bilevel`: descend on a loss at what an inner search has found against the weights as they are. Sources: cards advunlearn, unlearn-diff-atk.

    inner   delta <- delta - Adam( d L_att(theta, delta) / d delta )     `seek`: theta does not move, and its gradients are not touched
    outer   theta <- theta - Adam( d L(theta, delta) / d theta )         delta does not move

The published inner loop never clears its gradients, so that they add up over its steps, and hands out what stood there before the last step. Here the
gradient of a step is its own, and the last step counts.

Check (card advunlearn: U(s) = s, E(delta) = w (c + delta), w = c = 1; L_att = (output - 1)^2, L_u = (output + 1)^2)
    >>> w = torch.tensor(1.0)
    >>> seek(lambda d, k: (w * (1 + d) - 1) ** 2, torch.tensor(-0.5), steps=1, lr=1e-3)
    tensor(-0.4990)
    >>> (w.requires_grad_() * (1 + 0.0) + 1).square().backward(); w.grad
    tensor(4.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.session import Session, edit, remembering
from expunge.core.types import Scope
from expunge.parts.updates.descend import descend

NAME = "expunge_delta"


def seek(
    objective: Callable[[Tensor, int], Tensor], start: Tensor, *, steps: int, lr: float, sign: bool = False, weight_decay: float = 0.0,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Where `steps` steps of Adam on objective(delta, step) -> one number lead from `start`; no other tensor gets a gradient.

    sign      Adam follows the sign of the gradient (fast_at)
    project   is applied to delta after each step
    """
    if steps < 0 or not lr >= 0:
        raise SettingError(f"a search needs steps and lr of 0 or larger; found {steps} and {lr:g}")
    delta = start.detach().clone().requires_grad_()
    stepper = torch.optim.Adam([delta], lr, weight_decay=weight_decay)
    for k in range(steps):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(objective(delta, k), delta)
        delta.grad = slope.sign() if sign else slope
        stepper.step()
        if project is not None:
            with torch.no_grad():
                delta.copy_(project(delta))
    return delta.detach()


def bilevel(
    session: Session, attack: Callable[[Tensor, int], Tensor], loss: Callable[[Any, Tensor | None], Tensor], batches: Sequence, delta: Tensor, *,
    idle: int = 0, every: int = 1, **options: Any,
) -> list[float]:  # fmt: skip
    """Minimise loss(batch, delta) over the session's weights; before every `every`-th step, delta <- attack(delta, number of the attack).

    delta     is written in place; in a session of `attacked` checkpoints hold it
    idle      steps at the start without attack: the loss is called with None
    options   of `descend`, and its result
    """
    if every < 1 or idle < 0:
        raise SettingError(f"every must be at least 1 and idle at least 0; found {every} and {idle}")

    def at(numbered: tuple[int, Any]) -> Tensor:
        k, batch = numbered
        if k < idle:
            return loss(batch, None)
        if (k - idle) % every == 0:
            delta.copy_(attack(delta.clone(), (k - idle) // every))
        return loss(batch, delta)

    return descend(session, at, Numbered(batches), **options)


def attacks(steps: int, idle: int, every: int) -> int:
    """How often `bilevel` attacks in so many steps.

    >>> attacks(10, 2, 1), attacks(10, 2, 3), attacks(2, 4, 1)
    (8, 3, 0)
    """
    return -(-max(0, steps - idle) // every)


class Numbered(Sequence):
    """`Numbered(a)[k] = (k, a[k])`."""

    def __init__(self, batches: Sequence) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k):
        return k, self.batches[k]


def attacked(model: nn.Module, scope: Scope, delta: Tensor) -> AbstractContextManager[Session]:
    """A session on `scope` with `delta` among the model's buffers while it is open, so that checkpoints hold it and the patch does not."""
    return remembering(edit(model, scope), model, {NAME: delta})
