"""Fisher forgetting: add noise to each weight in inverse proportion to its importance for the retain set.

Paper    Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, arXiv:1911.04933.
Forgets  records, class.          Needs    retain.
Scope    all weights.   Forget  theta + N(0, alpha * min(1 / (F + 1e-8), cap)).   Retain  by F.   Update  one draw.   Leaves  Replace.
Settings
    alpha       strength of the noise
    per_sample  diagonal Fisher from per-example gradients; false gives squares of batch means, as published
    batch_size  examples per step
    buffers     move, freeze or recompute: what happens to batch-norm statistics
Differs  The published code weights squared batch-mean gradients of every class; here F is the empirical Fisher of the true labels.
         Variances are averaged over dimension 1 and multiplied by 10 for the last layer and for vectors, as published.
Check
    >>> round((1e-8 * min(1 / 0.01, 1e3) * 10) ** 0.5, 6)
    0.003162
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, absent
from expunge.parts.scopes.layers import everything, last
from expunge.parts.updates.gradients import fisher


@method(
    paper="arXiv:1911.04933", tasks=("classification",), needs=("retain",),
    cost=lambda n, s: (n["retain"], n["retain"]), toy={"alpha": 1e-5},
    published={"per_sample": False, "batch_size": 32}, place="code: fisher_new in unlearn/ of OPTML-Group/Unlearn-Sparse; alpha is searched per case",
    stable=True,
)  # fmt: skip
def fisher_forgetting(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    alpha: float = 1e-7,
    per_sample: bool = True,
    batch_size: int = 64,
    buffers: str = "freeze",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    importance = fisher(model, task, split.retain, per_sample=per_sample, batch_size=batch_size)
    head = set(last(model, 1).masks)
    gone = absent(split.forget.y, split.retain.y).tolist() if task.name == "classification" else []
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        with torch.no_grad():
            for name, p in e.params.items():
                cap = 1e2 if name in head else 1e3
                variance = alpha * (1 / (importance[name].to(p) + 1e-8)).clamp(max=cap)
                variance = variance.mean(1, keepdim=True).expand_as(p) if p.ndim > 1 else variance
                p.add_((variance * (10 if name in head or p.ndim == 1 else 1)).sqrt() * torch.randn(p.shape).to(p))
                if name in head and gone and len(p) > max(gone):
                    p[gone] = 1e-2 * torch.randn(p[gone].shape).to(p)
    return e.patch
