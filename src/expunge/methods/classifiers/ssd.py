"""SSD, selective synaptic dampening: shrink the weights that matter far more for forget than for all data.

Paper    Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024, arXiv:2308.07707.
Code     if-loops/selective-synaptic-dampening, MIT.
Forgets  records, class.          Needs    forget, retain.
Scope    weights with I_f > alpha * I_D.   Forget  theta <- theta * min((lam * I_D / I_f)^exponent, 1).   Retain  none.   Update  one pass.
Leaves   Replace of the dampened places.
Settings
    alpha       how many times more important for forget than for all data a weight must be
    lam         strength: the factor is lam * I_D / I_f
    exponent    of the factor
    labels      false gives LFSSD, which reads no label: importance is the mean of |grad ||logits||^2| in place of the squared gradient of CE
    per_sample  importance from per-example gradients; false gives the published batch-mean form
    batch_size  examples per batch of the batch-mean form
    buffers     move, freeze or recompute: what happens to batch-norm statistics
Differs  The published importance squares batch-mean gradients, which depends on the batch size and favours the smaller, more alike forget
         set (per_sample=false); published defaults for it are alpha 10, lam 1. I_D is the mean over forget and retain together, each
         weighted by its number of records; in the batch-mean form that stands for batches that do not mix the two.
Check
    >>> import torch; from expunge.parts.updates.oneshot import dampening
    >>> dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=30, lam=1)
    tensor([1.0000, 1.0000, 0.0100])
"""

from __future__ import annotations

from torch import nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.gradients import fisher, sensitivity
from expunge.parts.updates.oneshot import dampen


@method(
    paper="arXiv:2308.07707",
    tasks=("classification",),
    needs=("forget", "retain"),
    cost=lambda n, s: (n["forget"] + n["retain"], n["forget"] + n["retain"]),
    toy={"alpha": 4.0, "lam": 1.0},
    published={"alpha": 10.0, "per_sample": False},
    place="code: if-loops/selective-synaptic-dampening, ResNet-18 on CIFAR",
    lacks="it forgets a class of cifar10 on one seed and not on another (UA 1.78 to 100); those of digits and mnist it forgets",
)
def ssd(
    model: nn.Module, task: Task, split: Split, *, alpha: float = 4.0, lam: float = 1.0, exponent: float = 1.0, labels: bool = True,
    per_sample: bool = True, batch_size: int = 64,
    buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if alpha < 0 or lam < 0:
        raise SettingError(f"alpha and lam must be 0 or larger; found {alpha} and {lam}")
    kind = {} if labels else {"loss": sensitivity, "power": 1}
    here, kept = (fisher(model, task, data, per_sample=per_sample, batch_size=batch_size, **kind) for data in (split.forget, split.retain))
    n, m = len(split.forget), len(split.retain)
    there = {name: (n * here[name] + m * kept[name]) / (n + m) for name in here}
    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:
        dampen(e.params, there, here, alpha=alpha, lam=lam, exponent=exponent)
    return e.patch
