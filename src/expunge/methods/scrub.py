"""SCRUB: push the student away from the teacher on forget and pull it back on retain, in turns; SCRUB+R rewinds.

Paper    Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv:2302.09880.
Forgets  records, class.          Needs    forget, retain (and validation with rewind).
Scope    all weights.   Forget  -KL_T(teacher || student).   Retain  gamma * CE + alpha * KL_T.   Update  alternating passes.   Leaves  Replace.
Settings
    epochs        rounds
    msteps        rounds that begin with a pass over forget
    temperature   T of the softened KL, T^2 / B * sum
    gamma         weight of CE on retain
    alpha         weight of KL_T on retain
    rewind        SCRUB+R: take the round whose forget error is nearest to the final model's error on validation records of the same classes
    decay         factor on lr per round
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  Teacher logits are computed once; the published code runs the teacher in every step. Its rewind lists are off by one; here a round's
         error is its own. With rewind, momentum starts anew in each round.
Check
    >>> import torch; from expunge.losses import kl; from expunge.types import Out
    >>> student = Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 0.0]]))
    >>> kl(student, torch.zeros(1, 2), temperature=4.0)
    tensor([0.4949])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.guard import quiet
from expunge.losses import kl, nll
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.session import edit
from expunge.training import outputs
from expunge.types import Split, Task
from expunge.updates.descend import alternate


@method(paper="arXiv:2302.09880", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: (s["epochs"] * n["retain"] + min(s["msteps"], s["epochs"]) * n["forget"] + n["forget"] + n["retain"],
        s["epochs"] * n["retain"] + min(s["msteps"], s["epochs"]) * n["forget"]), toy={"epochs": 4, "msteps": 3, "lr": 0.02})  # fmt: skip
def scrub(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: int = 2,
    msteps: int = 1,
    temperature: float = 4.0,
    gamma: float = 0.99,
    alpha: float = 0.1,
    rewind: bool = False,
    decay: float = 0.5,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    teacher = {name: outputs(model, task, getattr(split, name)) for name in ("forget", "retain")}
    if rewind:
        split.require("validation")

    def forget(batch) -> Tensor:
        return -kl(task.forward(model, batch), teacher["forget"][batch["i"]], temperature=temperature).mean()

    def retain(batch) -> Tensor:
        out = task.forward(model, batch)
        return (gamma * nll(out) + alpha * kl(out, teacher["retain"][batch["i"]], temperature=temperature)).mean()

    def error(data) -> float:
        batches = task.batches(data, 256)
        with quiet(model):
            outs = [task.forward(model, batches[k]) for k in range(len(batches))]
        return float(torch.cat([(o.logits.argmax(-1) != o.labels).float() for o in outs]).mean())

    phases, rounds = [], []
    for epoch in range(epochs):
        if epoch < msteps:
            phases.append((forget, task.batches(split.forget, batch_size, seed=seed + 2 * epoch)))
            rounds.append(epoch)
        phases.append((retain, task.batches(split.retain, batch_size, seed=seed + 2 * epoch + 1)))
        rounds.append(epoch)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        options = {"momentum": momentum, "weight_decay": weight_decay}
        kept = []
        for epoch in range(epochs) if rewind else ():
            alternate(e, *[p for p, r in zip(phases, rounds, strict=True) if r == epoch], lr=lr * decay**epoch, **options)
            kept.append((error(split.forget), {n: t.detach().clone() for n, t in e.tensors().items()}))
        if not rewind:
            alternate(e, *phases, lr=lr, decay=lambda k: decay ** rounds[k], **options)
        if rewind:
            unseen = split.validation.take(torch.isin(split.validation.y, split.forget.y.unique()).nonzero().squeeze(1))
            goal = error(unseen if len(unseen) else split.validation)
            best = min(kept, key=lambda pair: abs(pair[0] - goal))[1]
            with torch.no_grad():
                for name, tensor in e.tensors().items():
                    tensor.copy_(best[name])
    return e.patch
