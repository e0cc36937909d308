"""Influence unlearning: one Newton step that takes the forget set's pull out of the weights.

Paper    Koh and Liang, ICML 2017, arXiv:1703.04730; as an unlearning baseline in Jia et al., NeurIPS 2023, arXiv:2304.04934.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  theta + scale * F^{-1} v, v = (1/n) [sum_f g - (n_f / n_r) sum_r g].   Retain  by F.   Update  one step.   Leaves  Replace.
Settings
    scale       length of the step
    damp        damping of the Fisher matrix; F^{-1} is scaled by it, so that the step tends to v for large damp
    rank        how many retain examples the Fisher matrix is built from
    form        woodbury (the exact inverse on those examples) or published (the rank-one recursion)
    batch_size  examples per step
    buffers     move, freeze or recompute: what happens to batch-norm statistics
Differs  The published recursion stays parallel to the first example's gradient (form=published); woodbury solves the real system.
Check
    >>> import torch; from expunge.updates.newton import published
    >>> published(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0]))
    tensor([0.9990])
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.errors import SettingError
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.scopes.saliency import gradient_sum
from expunge.session import edit
from expunge.types import Split, Task
from expunge.updates.newton import published, woodbury


@method(paper="arXiv:2304.04934", tasks=("classification", "regression"), needs=("forget", "retain"),
    cost=lambda n, s: (n["forget"] + n["retain"] + min(s["rank"], n["retain"]), n["forget"] + n["retain"] + min(s["rank"], n["retain"])),
    toy={"scale": 30.0, "damp": 0.1})  # fmt: skip
def influence(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    scale: float = 5.0,
    damp: float = 0.1,
    rank: int = 64,
    form: str = "woodbury",
    batch_size: int = 64,
    buffers: str = "freeze",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if form not in ("woodbury", "published"):
        raise SettingError(f"form must be woodbury or published, not '{form}'")

    def total(data):
        return gradient_sum(model, task, task.batches(data, batch_size), loss=lambda out: out.mean.sum())

    n, m = len(split.forget), len(split.retain)
    gone, kept = total(split.forget), total(split.retain)
    v = torch.cat([((gone[k] - n / m * kept[k]) / (n + m)).flatten() for k in gone])
    rows = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:rank]
    singles = [total(split.retain.take([int(i)])) for i in rows]
    grads = torch.stack([torch.cat([g[k].flatten() for k in gone]) for g in singles])
    step = woodbury(grads, v, damp) if form == "woodbury" else published(grads, v)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        with torch.no_grad():
            for (name, _), part in zip(gone.items(), step.split([g.numel() for g in gone.values()]), strict=True):
                e.params[name].add_(scale * part.view_as(e.params[name]))
    return e.patch
