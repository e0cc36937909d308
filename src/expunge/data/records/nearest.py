"""Nearest wrong labels by an input attack on the frozen original. Source: card boundary, steps 1 and 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.types import Batch, Task


def pgd(model: nn.Module, task: Task, batch: Batch, bound: float, low: float, high: float, *, step: float = 0.0, steps: int = 1) -> Tensor:
    """x' after `steps` times x <- clip(x + step * sign(grad_x CE(f(x), y))), kept within `bound` of the input and in [low, high].

    step 0 means bound; one such step is FGSM. In the model's own input domain.
    """
    start = x = batch["x"].detach()
    for _ in range(steps):
        g = _slope(model, task, {**batch, "x": x.clone().requires_grad_(True)})
        x = torch.minimum(torch.maximum(x + (step or bound) * g.sign(), start - bound), start + bound).clamp(low, high)
    return x


def _slope(model: nn.Module, task: Task, batch: Batch, graph: bool = False) -> Tensor:
    """grad_x CE(f(x), y) per example, of x's shape; x must require grad."""
    return torch.autograd.grad(task.forward(model, batch).nll.sum(), batch["x"], create_graph=graph)[0]


def curvature(model: nn.Module, task: Task, batch: Batch, *, h: float = 0.9, graph: bool = False) -> Tensor:
    """(B,) ||grad_x [l(x + z) - l(x)]||, z = h * sign(g) / ||sign(g)||, g = grad_x l(x): how much the loss bends at each input (CURE).

    With `graph` the result can be differentiated by the weights.
    """
    x = batch["x"].detach().clone().requires_grad_(True)
    g = _slope(model, task, {**batch, "x": x}, graph)
    sign = g.detach().sign()
    z = h * sign / sign.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))
    there = (x.detach() + z).requires_grad_(True)
    change = (_slope(model, task, {**batch, "x": there}, graph) - g).flatten(1)
    return (change.square().sum(1) + 1e-12).sqrt()


def nearest_wrong(
    model: nn.Module, task: Task, data, *, bound: float, step: float = 0.0, steps: int = 1, tries: int = 3, batch_size: int = 256
) -> Tensor:  # fmt: skip
    """(N,) label that the attacked input gets; where it is still the true one, bound and step are doubled, up to `tries` times, then the runner-up is taken.

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
                    attacked = pgd(model, task, b, bound * 2**j, low, high, step=step * 2**j, steps=steps)
                    with torch.no_grad():
                        now = task.forward(model, {**b, "x": attacked}).logits.argmax(-1).cpu()
                    labels = torch.where(labels == b["y"], now, labels)
                    guard.current().meter.add(forward=(steps + 1) * n, backward=steps * n)
                with torch.no_grad():
                    logits = task.forward(model, b).logits.cpu()
                guard.current().meter.add(forward=n)
                runner = logits.scatter(1, b["y"][:, None], -torch.inf).argmax(-1)
                found.append(torch.where(labels == b["y"], runner, labels))
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(found)
