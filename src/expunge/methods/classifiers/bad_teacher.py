"""Bad teaching: learn the forget set from a random network and the retain set from the original.

Paper    Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023, arXiv:2205.08096.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  KL(random teacher || student).   Retain  KL(original || student).   Update  one mixed pass, Adam.   Leaves  Replace.
Settings
    epochs       passes over forget and the drawn share of retain
    share        share of retain that is mixed in, 0..1
    temperature  of both softmaxes
    reduction    batchmean (sum over classes, mean over examples) or mean (divides by classes too, as published)
    lr           step size
    batch_size   examples per step
    buffers      move, freeze or recompute: what happens to batch-norm statistics
Differs  Teacher logits are computed once unless data is augmented. The published loss divides by the number of classes
         (reduction=mean), which makes lr mean something else in other code; published otherwise: lr 1e-4, 1 epoch, batches of 256.
Check
    >>> import torch
    >>> student = torch.tensor([[2.0, 0.0]])
    >>> p = torch.tensor([[0.0, 1.0]]).softmax(-1)
    >>> value = torch.nn.functional.kl_div(student.log_softmax(-1), p, reduction="batchmean")
    >>> round(float(value), 4), round(float(value) / 2, 4)
    (1.0068, 0.5034)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, concat
from expunge.parts.losses import kl_to
from expunge.parts.losses.distil import targets
from expunge.parts.scopes.layers import everything
from expunge.parts.training import fresh
from expunge.parts.updates.descend import descend


def _mixed(n, share: float) -> int:
    return n["forget"] + max(1, int(share * n["retain"]))


@method(
    paper="arXiv:2205.08096", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: ((s["epochs"] + 1) * _mixed(n, s["share"]), s["epochs"] * _mixed(n, s["share"])),
    toy={"epochs": 4.0, "lr": 0.003},
    published={"epochs": 1.0, "reduction": "mean", "lr": 0.0001, "batch_size": 256}, place="code: vikram2000b/bad-teaching-unlearning",
    lacks="it costs 6 to 10 points of retain accuracy in three of its four valid tables",
)  # fmt: skip
def bad_teacher(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 2.0,
    share: float = 0.3,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if reduction not in ("batchmean", "mean") or not 0 < share <= 1:
        raise SettingError(f"reduction must be batchmean or mean and share in (0, 1]; found '{reduction}' and {share}")
    n, order = len(split.forget), torch.randperm(len(split.retain), generator=torch.Generator().manual_seed(seed))
    kept = split.retain.take(order[: max(1, int(share * len(split.retain)))])
    mixed = concat(split.forget, kept)
    bad, good = targets(fresh(model, seed), task, split.forget), targets(model, task, kept)

    def target(batch) -> Tensor:
        gone = batch["i"] < n
        logits = [
            teacher({key: value[mask] for key, value in batch.items()} | {"i": batch["i"][mask] - first})
            for teacher, mask, first in ((bad, gone, 0), (good, ~gone, n))
            if bool(mask.any())
        ]
        places = torch.cat([gone.nonzero(), (~gone).nonzero()]).squeeze(1).argsort()
        return (torch.cat(logits)[places] / temperature).softmax(-1)

    def loss(batch) -> Tensor:
        out = task.forward(model, batch)
        value = kl_to(out, target(batch), temperature=temperature).mean()
        return value / out.logits.shape[-1] if reduction == "mean" else value

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, task.batches(mixed, batch_size, epochs=epochs, seed=seed), lr=lr, optimizer="adam")
    return e.patch
