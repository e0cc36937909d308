"""Gaussian amnesiac: train forgotten records on random targets beside the rest on true ones.

Paper    Tarun et al., "Deep Regression Unlearning", ICML 2023, arXiv:2210.08196.
Forgets  records, range.          Needs    forget, retain.
Scope    all weights.   Forget  squared error to N(mean, std) of the training targets, drawn once.   Retain  squared error.   Update  Adam.   Leaves  Replace.
Settings
    epochs        passes over forget and retain together
    clip_targets  clip drawn targets to the range of the training targets
    lr            step size
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  Targets are clipped to the training range by default; the published code does not clip.
Check
    >>> import torch
    >>> torch.tensor([-9.0, 0.5]).clamp(0, 1)
    tensor([0.0000, 0.5000])
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, concat
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:2210.08196", tasks=("regression",), needs=("forget", "retain"), forgets=("records", "range"),
    cost=lambda n, s: (s["epochs"] * (n["forget"] + n["retain"]), s["epochs"] * (n["forget"] + n["retain"])), toy={"epochs": 10.0, "lr": 0.003},
    published={"epochs": 1.0, "clip_targets": False}, place="code: ayu987/deep-regression-unlearning, AgeDB",
    lacks="it stands in no committed table of a valid world",
)  # fmt: skip
def gaussian_amnesiac(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 5.0,
    clip_targets: bool = True,
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    known = torch.cat([split.forget.y, split.retain.y])
    noise = known.mean(0) + known.std(0) * torch.randn(split.forget.y.shape).to(known)
    noise = noise.clamp(known.min(), known.max()) if clip_targets else noise
    mixed = concat(replace(split.forget, y=noise), split.retain)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, lambda b: task.forward(model, b).mean.mean(), task.batches(mixed, batch_size, epochs=epochs, seed=seed), lr=lr, optimizer="adam")
    return e.patch
