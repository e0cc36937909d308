"""Fine-tune: train on the retain set only and let the rest be forgotten; CF-k and EU-k as options.

Paper    Golatkar et al., CVPR 2020, arXiv:1911.04933 (fine-tuning); Goel et al. 2022, arXiv:2201.06640 (CF-k, EU-k).
Forgets  records, class.          Needs    retain.
Scope    all weights or the last k layers.   Forget  none.   Retain  CE + anchor / 2 * ||theta - theta0||^2.   Update  SGD.   Leaves  Replace.
Settings
    epochs        passes over the retain set
    k             how many of the last linear or convolution layers may move; 0 for all (CF-k)
    reset         start those k layers afresh first (EU-k); needs k
    anchor        weight of the squared distance to the weights that training starts from (after the reset, if there is one)
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The SCRUB notebook's fine-tuning (batch norm in eval mode, lr 0.01, 10 epochs, pull to the start) is buffers=freeze, lr=0.01, epochs=10,
         momentum=0, weight_decay=0 and its decay as anchor; the defaults are shorter and faster.
Check
    >>> 0.5 * 0.1 * (1.0 - 3.0) ** 2      # the anchor's penalty on one weight
    0.2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.parts.scopes.layers import everything, last
from expunge.parts.training import fresh
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:2201.06640", tasks=("classification", "regression"), needs=("retain",),
    cost=lambda n, s: (s["epochs"] * n["retain"], s["epochs"] * n["retain"]), toy={"epochs": 4.0, "lr": 0.05, "k": 2, "reset": True},
    published={"epochs": 10.0, "lr": 0.01, "batch_size": 256}, place="code: OPTML-Group/Unlearn-Sparse (batches of 128 in the paper's Table A1)",
    lacks="it does not forget: gap closed 0.05 for a class of digits and 0.02 for one of mnist; it is a baseline",
)  # fmt: skip
def fine_tune(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 2.0,
    k: int = 0,
    reset: bool = False,
    anchor: float = 0.0,
    lr: float = 0.03,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if reset and not k:
        raise SettingError("reset=true needs k, the number of last layers to start afresh")
    scope = last(model, k, buffers) if k else everything(model, buffers)
    with edit(model, scope, stats=task.batches(split.retain, 256)) as e:
        if reset:
            new = dict(fresh(model, seed).named_parameters())
            with torch.no_grad():
                for name, p in e.params.items():
                    p.copy_(new[name])
        base = {n: p.detach().clone() for n, p in e.params.items()}

        def loss(batch) -> Tensor:
            value = task.forward(model, batch).mean.mean()
            if anchor:
                value = value + anchor / 2 * torch.stack([(p - base[n]).square().sum() for n, p in e.params.items()]).sum()
            return value

        e.train()
        descend(e, loss, task.batches(split.retain, batch_size, epochs=epochs, seed=seed), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return e.patch
