"""Amnesiac (relabel form): one fixed wrong label per forgotten record, then train on all.

Paper    Graves et al., "Amnesiac Machine Learning", AAAI 2021, arXiv:2010.10981.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  CE(f(x), y'), y' random wrong, drawn once.   Retain  CE.   Update  one shuffled pass over both.   Leaves  Replace.
Settings
    epochs        passes over forget and retain together
    lr            step size
    momentum      of SGD; 0 uses Adam, as published
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The update form (subtract the stored training steps that held the records) needs logs written while the model was trained; it belongs
         to exact deletion and is not here. Published: Adam 1e-4, 3 epochs; small networks need a larger lr.
Check
    >>> import torch; from expunge.parts.losses import relabel; from expunge.core.types import Out
    >>> relabel(Out(torch.zeros(1), torch.ones(1), logits=torch.tensor([[2.0, 0.0]])), torch.tensor([1]))
    tensor([2.1269])
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, concat
from expunge.parts.losses import random_labels
from expunge.parts.reading import outputs
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:2010.10981", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: (s["epochs"] * (n["forget"] + n["retain"]) + 1, s["epochs"] * (n["forget"] + n["retain"])), toy={"epochs": 3.0, "lr": 0.003},
    published={"epochs": 3.0, "lr": 0.0001}, place="reference codes, small networks; the card names no section",
    lacks="on cifar10 it forgets random records hardly (gap closed 0.06) and costs 10.5 points of test accuracy; a class it forgets",
)  # fmt: skip
def amnesiac(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 2.0,
    lr: float = 0.001,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    classes = outputs(model, task, split.forget.take([0])).shape[-1]
    mixed = concat(replace(split.forget, y=random_labels(split.forget.y, classes, other=True)), split.retain)
    optimizer = "sgd" if momentum else "adam"
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(
            e, lambda b: task.forward(model, b).mean.mean(), task.batches(mixed, batch_size, epochs=epochs, seed=seed),
            lr=lr, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay,
        )  # fmt: skip
    return e.patch
