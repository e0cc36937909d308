"""Gradient ascent (NegGrad): descend on the negative training loss of the forget set.

Paper    Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, arXiv:1911.04933; Thudi et al. 2022.
Forgets  records, class.          Needs    forget.
Scope    all weights.   Forget  -CE.   Retain  none.   Update  SGD.   Leaves  Replace.
Settings
    epochs        passes over the forget set
    lr            step size
    momentum      of SGD
    weight_decay  of SGD
    batch_size    examples per step
    clip          largest gradient norm
    bound         stop pushing an example once its loss is above this: relu(bound - CE); 0 means unbounded, as published
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The published loss is unbounded (bound=0); the default stops pushing an example at a loss of 5 nats.
Check
    >>> import torch; from expunge.core.types import Out
    >>> from expunge.parts.losses import ascent
    >>> ascent(Out(nll=torch.tensor([0.1269]), count=torch.ones(1)))
    tensor([-0.1269])
"""

from __future__ import annotations

import math

from torch import nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.parts.losses import ascent
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:1911.04933",
    tasks=("classification", "regression"),
    needs=("forget",),
    cost=lambda n, s: (s["epochs"] * n["forget"], s["epochs"] * n["forget"]),
    toy={"epochs": 5, "lr": 0.02},
    published={"epochs": 5.0, "lr": 0.0001, "momentum": 0.9, "weight_decay": 0.0005, "batch_size": 256, "bound": 0.0},
    place="code: OPTML-Group/Unlearn-Sparse",
    lacks="it costs far more than it forgets (cifar10, class: gap closed 0.40, retain accuracy 99.6 to 41.4); it is a control",
)
def gradient_ascent(
    model: nn.Module, task: Task, split: Split, *, epochs: float = 3.0, lr: float = 0.005, momentum: float = 0.0, weight_decay: float = 0.0,
    batch_size: int = 64, clip: float = math.inf, bound: float = 5.0, buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""

    def loss(batch):
        value = ascent(task.forward(model, batch))
        return value.mean() if bound == 0 else value.clamp(min=-bound).mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, task.batches(split.forget, batch_size, epochs=epochs, seed=seed), lr=lr, momentum=momentum, weight_decay=weight_decay, clip=clip)
    return e.patch
