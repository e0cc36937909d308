"""Gradients of whole data sets: per-example squares (the diagonal Fisher), batch-mean squares, and per-example gradients as rows.

All run in eval mode under `torch.func`, in chunks, and change nothing about the model. What they cost is added to the meter by hand, since
a forward pass under a transform cannot be watched. Sources: cards corrective (SSD importance) and l1-sparse (FF, IU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.session import Bound
from expunge.core.types import Out, Task, device_of, each

CHUNK = 64
"""Per-example gradients held at once, at most; fewer where they would take more bytes than the guard has room for (`Guard.memory`)."""


def sensitivity(out: Out) -> Tensor:
    """Mean over examples of ||logits||_2^2: what LFSSD differentiates in place of a loss, so that no label is read.

    >>> float(sensitivity(Out(torch.zeros(1), torch.ones(1), logits=torch.tensor([[3.0, 4.0]]))))
    25.0
    """
    return out.logits.square().sum(-1).mean()


def squares(
    model: nn.Module, task: Task, data, *, per_sample: bool = True, batch_size: int = CHUNK, loss: Callable[[Out], Tensor] | None = None, power: int = 2
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """Per trainable parameter the sum of |gradient|^power, and how many were summed. Half-precision gradients are summed in float32.

    loss   one forward pass -> one number; the mean training loss without it

    per_sample=True: sum over examples of (grad of the example's loss)^2, and their number. False, as published: sum over batches of
    (grad of the batch mean)^2, and the number of batches, which makes the mean depend on `batch_size`.
    """
    params, of = _bound(model, task, loss)
    total = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in params.items()}
    batches, meter, count = task.batches(data, held(params) if per_sample else batch_size), guard.current().meter, 0
    with guard.quiet(model), meter.pause():
        for k in range(len(batches)):
            batch = batches[k]
            n = len(batch["i"])
            grads = _each(grad(of), params, batch) if per_sample else grad(of)(params, batch)
            for name in total:
                g = grads.pop(name)
                _add(total[name], g if per_sample else g[None], power)
                del g
            count += n if per_sample else 1
            meter.add(forward=n, backward=n)
    return total, count


def fisher(model: nn.Module, task: Task, data, **options: Any) -> dict[str, Tensor]:
    """Mean of the squared gradients per trainable parameter: `squares` divided by its count. The labels are the data's own, so that F is
    near 0 everywhere on examples known by heart. Options are those of `squares`."""
    total, count = squares(model, task, data, **options)
    return {n: t / count for n, t in total.items()}


def rows(model: nn.Module, task: Task, data) -> Tensor:
    """(N, P) gradient of each example's loss over all trainable parameters, flattened in the model's order. Raises SettingError where they take more than the
    guard's `memory`."""
    params, loss = _bound(model, task)
    watch, sizes = guard.current(), [p.numel() for p in params.values()]
    kind = functools.reduce(torch.promote_types, [_wide(p) for p in params.values()])
    whole = len(data) * sum(sizes) * kind.itemsize
    if watch.memory and whole > watch.memory:
        raise SettingError(f"the gradients of {len(data)} examples for {sum(sizes):,} weights take {whole:,} bytes at once, more than memory={watch.memory:,}; "
                           "give more, or let fewer examples be read (rank, where the method has it)")  # fmt: skip
    batches, start = task.batches(data, held(params, whole if watch.memory else 0)), 0
    found = torch.empty(len(data), sum(sizes), dtype=kind, device=device_of(model))
    with guard.quiet(model), watch.meter.pause():
        for k in range(len(batches)):
            batch = batches[k]
            n = len(batch["i"])
            grads = _each(grad(loss), params, batch)
            for name, place in zip(params, found[start : start + n].split(sizes, 1), strict=True):
                place.copy_(grads.pop(name).reshape(n, -1))
            start += n
            watch.meter.add(forward=n, backward=n)
    return found


def _add(total: Tensor, g: Tensor, power: int) -> None:
    """total += the sum over examples of |g|^power, of g (n, ...), in slices of at most SLICE values."""
    flat, into = g.reshape(len(g), -1), total.view(-1)
    for place in range(0, max(1, flat.shape[1]), step := max(1, SLICE // len(g))):
        part = flat[:, place : place + step].to(total.dtype)
        into[place : place + step] += (part.abs() if power == 1 else part.square()).sum(0)


SLICE = 1 << 18
"""Values squared at once."""


MAPPING = ("vmap", "functorch", "BatchedTensor")
"""Words by which torch says that a pass cannot be mapped over examples; any other failure is the pass's own."""


def _each(function: Callable, params: dict[str, Tensor], batch: dict) -> dict[str, Tensor]:
    """function(params, batch of one) for every example of the batch, stacked; one after another for a forward pass that cannot be mapped, because it reads
    values (`if x.sum() > 0`) or writes in place. A pass that fails there too fails as it does."""

    def one(x: Any, y: Tensor, i: Tensor) -> dict[str, Tensor]:
        return function(params, {"x": each(lambda t: t[None], x), "y": y[None], "i": i[None]})

    try:
        return vmap(one)(batch["x"], batch["y"], batch["i"])
    except (RuntimeError, ValueError) as error:
        if not any(word in str(error) for word in MAPPING):
            raise
        found = [one(each(lambda t, k=k: t[k], batch["x"]), batch["y"][k], batch["i"][k]) for k in range(len(batch["i"]))]
        return {n: torch.stack([f.pop(n) for f in found]) for n in params}


def held(params: dict[str, Tensor], taken: int = 0) -> int:
    """Per-example gradients held at once: CHUNK, or as many as the guard has room for beside what is `taken` of its memory, one at least. Raises SettingError
    where it says how much memory there is, and that is less than one takes.

    >>> with guard.watching(guard.Guard(memory=40_000)):
    ...     held({"w": torch.zeros(1000)})
    10
    """
    watch, one = guard.current(), sum(p.numel() * _wide(p).itemsize for p in params.values())
    if watch.memory and one > watch.memory:
        raise SettingError(f"the gradient of one example takes {one:,} bytes, more than memory={watch.memory:,}: give more, or take per_sample=false where "
                           "the method has it")  # fmt: skip
    return max(1, min(CHUNK, (watch.room - taken) // max(1, one)))


def _bound(model: nn.Module, task: Task, loss: Callable[[Out], Tensor] | None = None) -> tuple[dict[str, Tensor], Callable]:
    """The trainable parameters, detached, and (parameters, batch) -> mean loss (or `loss`) of the model with these in place of its own."""
    of = loss or (lambda out: out.mean.mean())
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    return params, lambda p, batch: of(task.forward(Bound(model, p), batch))


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
