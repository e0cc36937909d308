"""Gradients of whole data sets: per-example squares (the diagonal Fisher) and batch-mean squares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from expunge import guard
from expunge.types import Task


def fisher(model: nn.Module, task: Task, data, *, per_sample: bool = True, batch_size: int = 64) -> dict[str, Tensor]:
    """Mean over examples of (grad of the example's loss)^2 per trainable parameter, in eval mode.

    per_sample=False gives the published form, the mean over batches of (grad of the batch mean)^2, which depends on the batch size.
    Nothing about the model changes. Source: cards corrective (SSD importance) and l1-sparse.
    """
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: t.detach() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items() if n not in named}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    batches = task.batches(data, batch_size)
    meter = guard.current().meter
    modes = [(m, m.training) for m in model.modules()]
    model.eval()

    def one(params, x, y, i):
        batch = {"x": x[None], "y": y[None], "i": i[None]}
        return task.forward(_Bound(model, {**params, **rest}), batch).mean.mean()

    def whole(params, batch):
        return task.forward(_Bound(model, {**params, **rest}), batch).mean.mean()

    try:
        with meter.pause():
            for k in range(len(batches)):
                b = batches[k]
                n = len(b["i"])
                if per_sample:
                    grads = vmap(grad(one), in_dims=(None, 0, 0, 0))(named, b["x"], b["y"], b["i"])
                    for name, g in grads.items():
                        total[name] += g.square().sum(0) / len(data)
                else:
                    for name, g in grad(whole)(named, b).items():
                        total[name] += g.square() / len(batches)
                meter.add(forward=n, backward=n)
    finally:
        for module, mode in modes:
            module.training = mode
    return total


class _Bound(nn.Module):
    """The model with its tensors replaced, as a module that a task can call; parameters() yields the replaced tensors' stand-ins."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = [model]
        self.tensors = tensors

    def parameters(self, recurse: bool = True):
        return self.inner[0].parameters(recurse)

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.inner[0], self.tensors, (x,))
