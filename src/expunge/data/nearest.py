"""Nearest wrong labels by an input attack on the frozen original. Source: card boundary, steps 1 and 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge import guard
from expunge.types import Batch, Task


def fgsm(model: nn.Module, task: Task, batch: Batch, bound: float, low: float, high: float) -> Tensor:
    """x' = clip(x + bound * sign(grad_x CE(f(x), y)), low, high), in the model's own input domain."""
    x = batch["x"].detach().clone().requires_grad_(True)
    (g,) = torch.autograd.grad(task.forward(model, {**batch, "x": x}).nll.sum(), x)
    return (x + bound * g.sign()).clamp(low, high).detach()


def nearest_wrong(model: nn.Module, task: Task, data, *, bound: float, tries: int = 3, batch_size: int = 256) -> Tensor:
    """(N,) label that the attacked input gets; where it is still the true one the bound is doubled, up to `tries` times, then the runner-up is taken.

    Computed once: the labels depend on the original model and the inputs alone. Inputs are clipped to the range of the data.
    """
    low, high = float(data.x.min()), float(data.x.max())
    batches = task.batches(data, batch_size)
    found = []
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with guard.current().meter.pause():
            for k in range(len(batches)):
                b = batches[k]
                n = len(b["i"])
                labels = b["y"].clone()
                for j in range(tries):
                    attacked = fgsm(model, task, b, bound * 2**j, low, high)
                    with torch.no_grad():
                        now = task.forward(model, {**b, "x": attacked}).logits.argmax(-1).cpu()
                    labels = torch.where(labels == b["y"], now, labels)
                    guard.current().meter.add(forward=2 * n, backward=n)
                with torch.no_grad():
                    logits = task.forward(model, b).logits.cpu()
                guard.current().meter.add(forward=n)
                runner = logits.scatter(1, b["y"][:, None], -torch.inf).argmax(-1)
                found.append(torch.where(labels == b["y"], runner, labels))
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(found)
