"""Many models of one architecture trained in one pass: shadow models, retrained references, sweeps over seeds.

The weights of K models are stacked to (K, ...) tensors and one vectorised forward serves them all (`torch.func`), so that what a step costs
besides arithmetic is paid once. Every model sees the batches it would see alone, and ends where it would end alone, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from expunge import guard
from expunge.errors import SettingError
from expunge.session import Bound
from expunge.types import Examples, Task
from expunge.updates.descend import SCHEDULES, clear, optimiser

CHUNK = 64
"""Most models in one stack; more are trained in turns."""


def train(
    models: Sequence[nn.Module], task: Task, parts: Sequence[Examples], *, epochs: float, batch_size: int, seeds: Sequence[int], lr: float,
    schedule: str = "constant", chunk: int = CHUNK, **options: Any,
) -> None:  # fmt: skip
    """Train `models` in place, model k on parts[k] with seeds[k], as `training.train` would one by one; leaves them in eval mode.

    options as for `updates.descend.alternate` without clip. All parts must be equally long, so that batches can be stacked. Raises
    SettingError when they are not, or when a module draws random numbers in training (dropout), which a stack would draw differently.
    """
    if len({len(p) for p in parts}) > 1 or not len(models) == len(parts) == len(seeds):
        raise SettingError("stacked training needs as many parts and seeds as models, and parts of one length")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) for m in models[0].modules()):
        raise SettingError("a model with dropout cannot be trained in a stack: its masks would differ from those it draws alone")
    for k in range(0, len(models), chunk):
        batches = [task.batches(part, batch_size, epochs=epochs, seed=seed) for part, seed in zip(parts[k : k + chunk], seeds[k : k + chunk], strict=True)]
        _train(models[k : k + chunk], task, batches, lr, schedule, dict(options), (k, len(models)))


def _train(models: Sequence[nn.Module], task: Task, batches: Sequence, lr: float, schedule: str, options: dict[str, Any], where: tuple[int, int]) -> None:
    params, buffers = stack(models)
    base = copy.deepcopy(models[0]).train()
    watch = guard.current()
    step = optimiser(list(params.values()), options.pop("optimizer", "sgd"), lr, options.pop("momentum", 0.0), options.pop("weight_decay", 0.0))
    if options:
        raise SettingError(f"stacked training has no option '{next(iter(options))}'")

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return task.forward(Bound(base, {**p, **b}), batch).mean.mean()

    each = vmap(loss)
    for k in range(len(batches[0])):
        rows = [b[k] for b in batches]
        for group in step.param_groups:
            group["lr"] = lr * SCHEDULES[schedule](k / len(batches[0]))
        with watch.meter.pause():
            total = each(params, buffers, {name: torch.stack([r[name] for r in rows]) for name in rows[0]}).sum()
        watch.check_loss(float(total.detach()) / len(models), k, lr)
        clear(list(params.values()))
        total.backward()
        step.step()
        seen = sum(len(r["i"]) for r in rows)
        watch.meter.add(forward=seen, backward=seen)
        if watch.progress:
            watch.progress(f"{watch.label} {where[0] + len(models)} of {where[1]} models", k + 1, len(batches[0]))
    unstack(models, params, buffers)


def stack(models: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters as (K, ...) leaves that require grad, and buffers as (K, ...)."""
    params = {n: torch.stack([dict(m.named_parameters())[n].detach() for m in models]).requires_grad_(True) for n, _ in models[0].named_parameters()}
    return params, {n: torch.stack([dict(m.named_buffers())[n] for m in models]) for n, _ in models[0].named_buffers()}


def unstack(models: Sequence[nn.Module], params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Write slice k of every stack into model k, and put it into eval mode."""
    with torch.no_grad():
        for k, model in enumerate(models):
            for n, p in model.named_parameters():
                p.copy_(params[n][k])
            for n, b in model.named_buffers():
                b.copy_(buffers[n][k])
            model.eval()


def logits(models: Sequence[nn.Module], task: Task, data: Examples, size: int = 500) -> Tensor:
    """(K, N, C) logits of all models in eval mode, in one pass per batch."""
    params, buffers = stack(models)
    base = copy.deepcopy(models[0]).eval()
    each = vmap(lambda p, b, batch: task.forward(Bound(base, {**p, **b}), batch).logits, in_dims=(0, 0, None))
    batches = task.batches(data, size)
    with torch.no_grad():
        return torch.cat([each(params, buffers, batches[k]).detach() for k in range(len(batches))], 1)
