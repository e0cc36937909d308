"""Boundary expanding: send forgotten records to an extra shadow class, then take that class away.

Paper    Chen et al., "Boundary Unlearning", CVPR 2023, arXiv:2303.11570.
Forgets  class, records.          Needs    forget.
Scope    all weights, and one more output row that is removed again.   Forget  CE to the shadow class.   Retain  none.   Update  SGD.   Leaves  Replace.
Settings
    epochs        passes over the forget set
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move (as published), freeze or recompute: what happens to batch-norm statistics
Differs  Batch norm is trained on, as in the code, and its statistics are part of the patch. buffers=freeze keeps them and pushes harder: on a network of batch
         norm on digits, a class, three seeds, 2 to 20 points of retain accuracy and 98 to 100 % forgotten, against at most 0.3 points and 66 to 80 %; on
         random records 1 to 10 points against none, where little is forgotten. A derived public code never removes the extra row; here it is gone before the
         patch is made. The shadow row starts with the layer's own initialisation scale.
Check
    >>> import torch
    >>> round(float(torch.nn.functional.cross_entropy(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([2]))), 4)
    2.2395
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.modalities.classification.task import head
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:2303.11570", tasks=("classification",), needs=("forget",),
    cost=lambda n, s: (s["epochs"] * n["forget"], s["epochs"] * n["forget"]), toy={"epochs": 10.0, "lr": 0.03},
    published={"epochs": 10.0, "lr": 1e-05}, place="code: TY-LEE-KR/Boundary-Unlearning-Code",
    lacks="it costs 8 points of retain accuracy or more in all of its valid tables, and 55 on random records of cifar10",
)  # fmt: skip
def boundary_expand(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 5.0,
    lr: float = 0.0005,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    layer = head(model)[1]
    row = torch.randn(1, layer.in_features).to(layer.weight) / layer.in_features**0.5
    caught: list[Tensor] = []

    def loss(batch) -> Tensor:
        handle = layer.register_forward_hook(lambda _, args, out: caught.append(args[0]))
        try:
            out = task.forward(model, batch)
        finally:
            handle.remove()
        shadow = F.linear(caught.pop().flatten(1), row).to(out.logits)
        wide = torch.cat([out.logits, shadow], 1)
        return F.cross_entropy(wide, torch.full_like(out.labels, wide.shape[1] - 1))

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, task.batches(split.forget, batch_size, epochs=epochs, seed=seed), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return e.patch
