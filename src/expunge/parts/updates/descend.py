"""The training loop: `descend` for one objective, `alternate` for several phases under one optimiser state.

One loop serves every trained method, so that the wall, the guard, checkpoints and resume are written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.session import Session
from expunge.parts.updates.combine import Combine, pulls

Loss = Callable[[Any], Any]
"""One batch (or tuple of batches) -> one number; with `combine`, a tuple of them."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "onecycle": lambda t: t / 0.2 if t < 0.2 else 0.5 * (1 + math.cos(math.pi * (t - 0.2) / 0.8)),
}
"""Share of lr at the share t in [0, 1) of all steps. `onecycle` rises over the first fifth and then falls as a half cosine."""

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
HALF = (torch.float16, torch.bfloat16)


def descend(session: Session, loss: Loss, batches: Sequence, **options: Any) -> list[float]:
    """Minimise the mean of `loss` over `batches`; options and result as for `alternate`."""
    return alternate(session, (loss, batches), **options)


def alternate(
    session: Session,
    *phases: tuple[Loss, Sequence],
    lr: float,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = math.inf,
    schedule: str = "constant",
    warmup: float = 0.0,
    decay: Callable[[int], float] | None = None,
    after: Callable[[int], None] | None = None,
    until: Callable[[int], bool] | None = None,
    combine: Combine | None = None,
) -> list[float]:
    """Run the phases one after another, one gradient step per batch, and return the loss of every step.

    A batch that is a list holds the parts of one step: the loss is called on each part, and the step follows the gradient of their sum. Only one
    part's graph is held at a time, so that many small parts make one large step.

    lr          step size; multiplied by SCHEDULES[schedule](share of steps done), and by decay(phase number) if given
    warmup      share of all steps over which lr rises linearly from 0
    clip        largest gradient norm over the scope
    after       called as after(step) once a step is taken: proximal steps, projections
    until       called as until(step) once a step is taken: True ends the loop there
    combine     for a loss that gives a tuple of K numbers: the step follows combine(their K gradients), as `combine.rule` makes it, in place of the
                gradient of their sum; what is reported is the sum

    Gradients outside the scope are zero before clipping; a loss that is not finite raises Diverged before any step is taken. Under a
    guard with a journal, a killed run resumes at its last checkpoint with the same optimiser state and RNG.
    """
    if not lr >= 0:
        raise SettingError(f"lr must be 0 or larger, not {lr}")
    if schedule not in SCHEDULES:
        raise SettingError(f"schedule must be one of {', '.join(SCHEDULES)}, not '{schedule}'")
    watch = guard.current()
    params = list(session.params.values())
    stepper = optimiser(params, optimizer, lr, momentum, weight_decay)
    plan = [(number, loss, batches, k) for number, (loss, batches) in enumerate(phases) for k in range(len(batches))]
    losses: list[float] = []
    journal = watch.journal
    start = journal.resume(session, stepper, losses, watch) if journal else 0
    for step in range(start, len(plan)):
        if watch.stopped:
            break
        number, loss, batches, k = plan[step]
        for group in stepper.param_groups:
            group["lr"] = lr * SCHEDULES[schedule](step / len(plan)) * (decay(number) if decay else 1.0) * min(1.0, (step + 1) / max(1.0, warmup * len(plan)))
        batch = batches[k]
        clear(params)
        losses.append(0.0)
        found: list[list[Tensor]] = []
        for part in batch if isinstance(batch, list) else [batch]:
            values = (loss(part),) if combine is None else loss(part)
            losses[-1] += sum(float(v.detach()) for v in values)
            watch.check_loss(losses[-1], step, lr)
            if combine is None and values[0].requires_grad:
                values[0].backward()
            elif combine is not None and any(v.requires_grad for v in values):
                more = pulls(values, params, list(session.masks.values()))
                found = [[a + b for a, b in zip(*both, strict=True)] for both in zip(found, more, strict=True)] if found else more
        if combine is not None and found:
            for p, g in zip(params, combine(found), strict=True):
                p.grad = g
        session.mask_gradients()
        if not watch.meter.gradient:
            watch.meter.gradient = any(p.grad is not None and bool(p.grad.any()) for p in params)
        if math.isfinite(clip):
            torch.nn.utils.clip_grad_norm_(params, clip)
        stepper.step()
        if after:
            after(step)
        stop = watch.tick(session, step + 1, len(plan)) or (until is not None and until(step))
        if journal:
            journal.step(session, stepper, losses, watch, step + 1)
        if stop:
            break
    clear(params)
    if journal:
        journal.close(session, losses, watch)
    return losses


def clear(params: list) -> None:
    """Drop the gradients of these tensors."""
    for p in params:
        p.grad = None


def optimiser(params: list, name: str, lr: float, momentum: float, weight_decay: float, fused: bool = True) -> torch.optim.Optimizer:
    """The optimiser of that name (OPTIMIZERS) over these tensors, in one fused pass or tensor by tensor. Raises SettingError for another name.

    A step of half-precision weights is taken on float32 masters and rounded: steps below half a unit in the last place would be lost otherwise.
    """
    masters = [p.detach().float() if p.dtype in HALF else p for p in params]
    if name in ("sgd", "nesterov"):
        stepper = torch.optim.SGD(masters, lr, momentum=momentum, weight_decay=weight_decay, nesterov=name == "nesterov", fused=fused)
    elif name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        stepper = kind(masters, lr, weight_decay=weight_decay, fused=fused)
    else:
        raise SettingError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not '{name}'")
    pairs = [(p, m) for p, m in zip(params, masters, strict=True) if p is not m]

    def take(*_) -> None:
        with torch.no_grad():
            for p, m in pairs:
                m.copy_(torch.where(m.to(p.dtype) == p, m, p.float()))  # what others wrote to the weight since stands
                m.grad = None if p.grad is None else p.grad.float()

    def give(*_) -> None:
        with torch.no_grad():
            for p, m in pairs:
                p.copy_(m)

    if pairs:
        stepper.register_step_pre_hook(take)
        stepper.register_step_post_hook(give)
    return stepper
