"""Gradients of whole data sets: per-example squares (the diagonal Fisher), batch-mean squares, and per-example gradients as rows.

All run in eval mode under `torch.func`, in chunks, and change nothing about the model. What they cost is added to the meter by hand, since
a forward pass under a transform cannot be watched. Sources: cards corrective (SSD importance) and l1-sparse (FF, IU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from expunge import guard
from expunge.types import Task

CHUNK = 64
"""Per-example gradients held at once."""


def squares(model: nn.Module, task: Task, data, *, per_sample: bool = True, expected: bool = False, batch_size: int = CHUNK) -> tuple[dict[str, Tensor], int]:
    """Per trainable parameter the sum of squared gradients, and how many were summed. Half-precision gradients are summed in float32.

    per_sample  True: sum over examples of (grad of the example's loss)^2, and their number; False, as published: sum over batches of
                (grad of the batch mean)^2, and the number of batches, which makes the mean depend on `batch_size`
    expected    instead of the true label's loss, the expectation over the model's own labels, sum_y p_y (grad -log p_y)^2: the Fisher
                matrix proper, which does not vanish on examples known by heart. Costs C backward passes per example; needs logits
    """
    params, outs = _bound(model, task)
    total = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in params.items()}
    meter, count, classes = guard.current().meter, 0, 1

    def loss(p: dict[str, Tensor], batch: dict) -> Tensor:
        return outs(p, batch).mean.mean()

    def losses(p: dict[str, Tensor], batch: dict) -> tuple[Tensor, Tensor]:
        logs = outs(p, batch).logits.log_softmax(-1)
        return -logs.mean(0), logs.detach().exp().mean(0)

    def square(p: dict[str, Tensor], batch: dict) -> dict[str, Tensor]:
        if not expected:
            return {n: g.to(_wide(g)).square() for n, g in grad(loss)(p, batch).items()}
        grads, weights = jacrev(losses, has_aux=True)(p, batch)
        return {n: torch.tensordot(weights.to(_wide(g)), g.to(_wide(g)).square(), dims=1) for n, g in grads.items()}

    with guard.quiet(model), meter.pause():
        if expected:
            classes = outs(params, task.batches(data, 1)[0]).logits.shape[-1]
            meter.add(forward=1)
        batches = task.batches(data, max(1, CHUNK // classes) if per_sample else batch_size)
        for k in range(len(batches)):
            n = len(batches[k]["i"])
            found = _each(square, params, batches[k]) if per_sample else square(params, batches[k])
            for name, value in found.items():
                total[name] += value.sum(0) if per_sample else value
            count += n if per_sample else 1
            meter.add(forward=n, backward=n * classes)
    return total, count


def fisher(model: nn.Module, task: Task, data, *, per_sample: bool = True, expected: bool = False, batch_size: int = CHUNK) -> dict[str, Tensor]:
    """Mean of the squared gradients per trainable parameter: `squares` divided by its count."""
    total, count = squares(model, task, data, per_sample=per_sample, expected=expected, batch_size=batch_size)
    return {n: t / count for n, t in total.items()}


def rows(model: nn.Module, task: Task, data) -> Tensor:
    """(N, P) gradient of each example's loss over all trainable parameters, flattened in the model's order."""
    params, outs = _bound(model, task)
    batches, meter, found = task.batches(data, CHUNK), guard.current().meter, []
    with guard.quiet(model), meter.pause():
        for k in range(len(batches)):
            n = len(batches[k]["i"])
            grads = _each(grad(lambda p, b: outs(p, b).mean.mean()), params, batches[k])
            found.append(torch.cat([g.to(_wide(g)).reshape(n, -1) for g in grads.values()], 1))
            meter.add(forward=n, backward=n)
    return torch.cat(found)


def _each(function: Callable, params: dict[str, Tensor], batch: dict) -> dict[str, Tensor]:
    """function(params, batch of one) for every example of the batch, stacked."""
    return vmap(lambda x, y, i: function(params, {"x": x[None], "y": y[None], "i": i[None]}))(batch["x"], batch["y"], batch["i"])


def _bound(model: nn.Module, task: Task) -> tuple[dict[str, Tensor], Callable]:
    """The trainable parameters, detached, and (parameters, batch) -> Out of the model with these in place of its own."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    return params, lambda p, batch: task.forward(_Bound(model, p), batch)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


class _Bound(nn.Module):
    """The model with some tensors replaced, as a module that a task can call; parameters() yields the model's own, for device and type."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = [model]
        self.tensors = tensors

    def parameters(self, recurse: bool = True):
        return self.inner[0].parameters(recurse)

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.inner[0], self.tensors, (x,))
