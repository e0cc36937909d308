"""l1-sparse: fine-tune on retain with a decaying l1 penalty on the weights.

Paper    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv:2304.04934.
Forgets  records, class.          Needs    retain.
Scope    all weights.   Forget  none.   Retain  CE + gamma_t * ||theta||_1, gamma_t = gamma * (1 - t), t the share of steps done.   Update
         SGD.   Leaves  Replace.
Settings
    epochs        passes over the retain set
    gamma         weight of the l1 norm at the start
    proximal      soft-threshold after each step, which gives true zeros, instead of the subgradient
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The published schedule decays per epoch, this one per step; both end at zero.
Check
    >>> [round(1.0 * (1 - e / 10), 1) for e in range(3)]
    [1.0, 0.9, 0.8]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.session import edit
from expunge.types import Paired, Split, Task
from expunge.updates.descend import descend


@method(paper="arXiv:2304.04934", tasks=("classification", "regression"), needs=("retain",),
    cost=lambda n, s: (s["epochs"] * n["retain"], s["epochs"] * n["retain"]), toy={"epochs": 4.0, "lr": 0.1, "gamma": 0.005})  # fmt: skip
def l1_sparse(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 2.0,
    gamma: float = 0.0005,
    proximal: bool = False,
    lr: float = 0.03,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    batches = task.batches(split.retain, batch_size, epochs=epochs, seed=seed)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:

        def weight(step: int) -> float:
            return gamma * (1 - step / len(batches))

        def loss(pair) -> Tensor:
            batch, step = pair
            value = task.forward(model, batch).mean.mean()
            return value if proximal else value + weight(step) * torch.stack([p.abs().sum() for p in e.params.values()]).sum()

        def after(step: int) -> None:
            if proximal:
                with torch.no_grad():
                    for p in e.params.values():
                        p.copy_(p.sign() * (p.abs() - lr * weight(step)).clamp(min=0))

        e.train()
        descend(e, loss, Paired(batches, range(len(batches))), lr=lr, momentum=momentum, weight_decay=weight_decay, after=after)
    return e.patch
