"""Random label: train the forget set on random labels beside the retain set on true ones.

Paper    Golatkar et al., CVPR 2020, arXiv:1911.04933.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  CE(f(x), y'), y' random.   Retain  CE.   Update  one shuffled pass over both.   Leaves  Replace.
Settings
    epochs        passes over forget and retain together
    other         draw among the wrong labels only
    fixed         draw one label per record before training; otherwise a new one each time the record is seen
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  Forget and retain are shuffled together; SalUn's code alternates passes (see salun).
Check
    >>> import torch; from expunge.parts.losses import relabel; from expunge.core.types import Out
    >>> relabel(Out(torch.zeros(1), torch.ones(1), logits=torch.tensor([[2.0, 0.0]])), torch.tensor([1]))
    tensor([2.1269])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, concat
from expunge.parts.losses import random_labels, relabel
from expunge.parts.reading import outputs
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:1911.04933", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: (s["epochs"] * (n["forget"] + n["retain"]) + s["fixed"], s["epochs"] * (n["forget"] + n["retain"])),
    toy={"epochs": 3.0, "lr": 0.05},
    published={"epochs": 3.0, "fixed": True}, place="reference codes, with Adam at 1e-4 where this is SGD; the card names no section",
    stable=True,
)  # fmt: skip
def random_label(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 2.0,
    other: bool = True,
    fixed: bool = False,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    mixed, n = concat(split.forget, split.retain), len(split.forget)
    drawn = random_labels(split.forget.y, outputs(model, task, split.forget.take([0])).shape[-1], other=other) if fixed else None

    def loss(batch) -> Tensor:
        out = task.forward(model, batch)
        noise = random_labels(out.labels, out.logits.shape[-1], other=other) if drawn is None else drawn[batch["i"].clamp(max=n - 1)]
        gone = (batch["i"] < n).to(out.labels.device)
        return relabel(out, torch.where(gone, noise.to(out.labels.device), out.labels)).mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, task.batches(mixed, batch_size, epochs=epochs, seed=seed), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return e.patch
