"""Boundary shrink: relabel each forgotten record with its nearest wrong class and train on that.

Paper    Chen et al., "Boundary Unlearning", CVPR 2023, arXiv:2303.11570.
Forgets  class, records.          Needs    forget.
Scope    all weights.   Forget  CE(f(x), y'), y' from one FGSM step on the original.   Retain  none.   Update  SGD on forget alone.   Leaves  Replace.
Settings
    bound         length of the FGSM step, in units of the model's input
    weighted      per-example weight 3 * sigmoid(5 * (p_second - p_true - 0.5)) as the authors' enhanced form, read on clean inputs
    epochs        passes over the forget set
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  Labels are computed once. Where the step does not cross, the bound is doubled twice, then the runner-up is taken; the code keeps
         the true label. Its lr of 1e-5 is for another network. The curvature penalty and PGD are not offered.
Check
    >>> import torch; from torch import nn; from expunge.data.nearest import fgsm; from expunge.tasks.classification import classification
    >>> batch = {"x": torch.tensor([[0.55, 0.50]]), "y": torch.tensor([0]), "i": torch.tensor([0])}
    >>> fgsm(nn.Identity(), classification(), batch, 0.1, 0, 1)
    tensor([[0.4500, 0.6000]])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.data.nearest import nearest_wrong
from expunge.losses import relabel
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.session import edit
from expunge.types import Split, Task
from expunge.updates.descend import descend


@method(paper="arXiv:2303.11570", tasks=("classification",), needs=("forget",),
    cost=lambda n, s: ((s["epochs"] + 7) * n["forget"], (s["epochs"] + 3) * n["forget"]), toy={"epochs": 5.0, "lr": 0.01})  # fmt: skip
def boundary_shrink(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    bound: float = 0.1,
    weighted: bool = False,
    epochs: float = 5.0,
    lr: float = 0.003,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "freeze",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    labels = nearest_wrong(model, task, split.forget, bound=bound)

    def loss(batch) -> Tensor:
        out = task.forward(model, batch)
        value = relabel(out, labels[batch["i"]])
        if weighted:
            p = out.logits.detach().softmax(-1)
            true = p.gather(1, out.labels[:, None])[:, 0]
            second = p.scatter(1, out.labels[:, None], 0).amax(1)
            value = value * 3 * torch.sigmoid(5 * (second - true - 0.5))
        return value.mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, task.batches(split.forget, batch_size, epochs=epochs, seed=seed), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return e.patch
