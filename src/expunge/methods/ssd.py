"""SSD, selective synaptic dampening: shrink the weights that matter far more for forget than for all data.

Paper    Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024, arXiv:2308.07707.
Forgets  records, class.          Needs    forget, retain.
Scope    weights with I_f > alpha * I_D.   Forget  theta <- theta * min((lam * I_D / I_f)^exponent, 1).   Retain  none.   Update  one pass.
         Leaves  Replace.
Settings
    alpha       how many times more important for forget a weight must be
    lam         strength: the factor is lam * I_D / I_f
    exponent    of the factor
    per_sample  importance from per-example gradients; false gives the published batch-mean form
    batch_size  examples per step
    buffers     move, freeze or recompute: what happens to batch-norm statistics
Differs  The published importance squares batch-mean gradients, which depends on the batch size (per_sample=false). I_D is taken over forget
         and retain together.
Check
    >>> import torch; from expunge.updates.oneshot import dampening
    >>> dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=30, lam=1)
    tensor([1.0000, 1.0000, 0.0100])
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.session import edit
from expunge.types import Split, Task
from expunge.updates.gradients import fisher
from expunge.updates.oneshot import dampening


@method(paper="arXiv:2308.07707", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: (n["forget"] + n["retain"], n["forget"] + n["retain"]), toy={"alpha": 2.0, "lam": 0.5})  # fmt: skip
def ssd(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    alpha: float = 2.0,
    lam: float = 1.0,
    exponent: float = 1.0,
    per_sample: bool = True,
    batch_size: int = 64,
    buffers: str = "freeze",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    here = fisher(model, task, split.forget, per_sample=per_sample, batch_size=batch_size)
    kept = fisher(model, task, split.retain, per_sample=per_sample, batch_size=batch_size)
    n, m = len(split.forget), len(split.retain)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        with torch.no_grad():
            for name, p in e.params.items():
                p.mul_(dampening((n * here[name] + m * kept[name]) / (n + m), here[name], alpha=alpha, lam=lam, exponent=exponent))
    return e.patch
