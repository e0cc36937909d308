"""Blindspot: learn forgotten records from a proxy that saw the retain set only briefly.

Paper    Tarun et al., "Deep Regression Unlearning", ICML 2023, arXiv:2210.08196.
Forgets  records, range.          Needs    forget, retain.
Scope    all weights.   Forget  |f - proxy| + attention * sum_l A_l.   Retain  |f - y|.   Update  mixed batches, Adam.   Leaves  Replace.
Settings
    proxy_epochs  passes over retain that train the proxy
    proxy_lr      step size of the proxy (Adam)
    attention     weight of the distance of attention maps
    epochs        passes over forget and retain together
    lr            step size
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The proxy is in eval mode when it teaches; the published code leaves it in its last mode.
Check
    >>> c, forget, retain = 0.25, 3.0, 2.0
    >>> c * forget + (1 - c) * retain
    2.25
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, concat
from expunge.parts.losses.features import attention as attention_distance
from expunge.parts.scopes.layers import everything
from expunge.parts.training import fresh, train
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:2210.08196", tasks=("regression",), needs=("forget", "retain"), forgets=("records", "range"),
    cost=lambda n, s: (s["proxy_epochs"] * n["retain"] + 2 * s["epochs"] * (n["forget"] + n["retain"]),
        s["proxy_epochs"] * n["retain"] + s["epochs"] * (n["forget"] + n["retain"])), toy={"epochs": 10.0, "lr": 0.003, "proxy_epochs": 5.0},
    published={"proxy_epochs": 2.0, "proxy_lr": 0.01, "attention": 50.0, "epochs": 1.0}, place="code: ayu987/deep-regression-unlearning, AgeDB",
    lacks="it stands in no committed table of a valid world",
)  # fmt: skip
def blindspot(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    proxy_epochs: float = 3.0,
    proxy_lr: float = 0.003,
    attention: float = 1.0,
    epochs: float = 4.0,
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    proxy = fresh(model, seed)
    train(proxy, task, split.retain, epochs=proxy_epochs, batch_size=batch_size, seed=seed, lr=proxy_lr, optimizer="adam")
    mixed, n = concat(split.forget, split.retain), len(split.forget)

    def loss(batch) -> Tensor:
        (out, maps), gone = watched(model, task, batch), batch["i"] < n
        with torch.no_grad():
            taught, theirs = watched(proxy, task, batch)
        gone = gone.to(out.pred.device)
        goal = torch.where(gone.view(-1, *[1] * (out.pred.ndim - 1)), taught.pred, out.target)
        value = (out.pred - goal).abs().flatten(1).mean(1) if out.pred.ndim > 1 else (out.pred - goal).abs()
        for mine, other in zip(maps, theirs, strict=True):
            value = value + attention * gone * attention_distance(mine, other)
        return value.mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, task.batches(mixed, batch_size, epochs=epochs, seed=seed), lr=lr, optimizer="adam")
    return e.patch


def watched(model: nn.Module, task: Task, batch) -> tuple:
    """The forward pass and the outputs of all hidden convolution and linear layers, in order."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))][:-1]
    maps: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, args, out: maps.append(out)) for m in layers]
    try:
        return task.forward(model, batch), maps
    finally:
        for handle in handles:
            handle.remove()
