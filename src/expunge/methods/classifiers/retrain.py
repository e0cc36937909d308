"""Retrain: fresh weights, trained on the retain set alone; the reference that all others are read against.

Paper    Bourtoule et al., "Machine Unlearning", IEEE S&P 2021, arXiv:1912.03817 (the definition).
Forgets  records, class.          Needs    retain.
Scope    all weights.   Forget  none.   Retain  CE.   Update  SGD with a schedule.   Leaves  Replace.
Settings
    epochs        passes over the retain set
    optimizer     sgd, nesterov, adam or adamw
    schedule      constant, linear, cosine or onecycle
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  An initialisation that the model's constructor adds on top of `reset_parameters` is not repeated. Weights that are frozen
         (requires_grad=False) stay as they are: the claim `exact` then holds only if they never saw the forget set.
Check
    >>> from expunge.core.registry import METHODS
    >>> METHODS["retrain"].assurance
    'exact'
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.parts.scopes.layers import everything
from expunge.parts.training import fresh
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:1912.03817", tasks=("classification", "regression"), needs=("retain",), assurance="exact",
    cost=lambda n, s: (s["epochs"] * n["retain"], s["epochs"] * n["retain"]), toy={"epochs": 15.0, "lr": 0.03},
    published={"epochs": 160.0, "optimizer": "sgd", "lr": 0.1, "batch_size": 256},
    place="code: OPTML-Group/Unlearn-Sparse, ResNet-18 on CIFAR-10, lr x 0.1 at epochs 91 and 136",
    stable=True,
)  # fmt: skip
def retrain(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 30.0,
    optimizer: str = "nesterov",
    schedule: str = "onecycle",
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 50,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    new = fresh(model, seed)
    values = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        with torch.no_grad():
            for name, tensor in e.tensors().items():
                tensor.copy_(values[name])
        e.train()
        descend(
            e, lambda b: task.forward(model, b).mean.mean(), task.batches(split.retain, batch_size, epochs=epochs, seed=seed),
            lr=lr, optimizer=optimizer, schedule=schedule, momentum=momentum, weight_decay=weight_decay,
        )  # fmt: skip
    return e.patch
