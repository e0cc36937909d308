"""Stochastic teacher: first learn the forget set from a random network, then rebuild the retain set from the original.

Paper    Zhang et al., "Machine Unlearning Methodology base on Stochastic Teacher Network", ADMA 2023, arXiv:2308.14322.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  T^2 KL(random || student).   Retain  KL(original || student) or CE.   Update  two phases, Adam.   Leaves  Replace.
Settings
    erase        passes over the forget set in the first phase
    rebuild      passes over the retain set in the second phase
    temperature  T of both divergences
    labels       rebuild with CE on labels instead of distillation
    lr_erase     step size of the first phase
    lr           step size of the second phase
    batch_size   examples per step
    buffers      move, freeze or recompute: what happens to batch-norm statistics
Differs  No public code exists; losses and settings are a reading of the abstract and unverified. The random teacher is drawn once, in eval
         mode with batch-norm statistics recomputed on forget.
Check
    >>> import torch; from expunge.losses import kl; from expunge.types import Out
    >>> kl(Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 0.0]])), torch.zeros(1, 2))
    tensor([0.4338])
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.losses import kl, nll
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.session import edit, recompute
from expunge.training import fresh, outputs
from expunge.types import Split, Task
from expunge.updates.descend import descend


@method(paper="arXiv:2308.14322", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: ((s["erase"] + 1) * n["forget"] + (s["rebuild"] + (not s["labels"])) * n["retain"],
        s["erase"] * n["forget"] + s["rebuild"] * n["retain"]),
    toy={"erase": 8.0, "lr_erase": 0.003, "rebuild": 1.0})  # fmt: skip
def stochastic_teacher(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    erase: float = 2.0,
    rebuild: float = 1.0,
    temperature: float = 1.0,
    labels: bool = False,
    lr_erase: float = 0.001,
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    random = fresh(model, seed)
    recompute(random, task.batches(split.forget, 256))
    noise = outputs(random, task, split.forget)
    teacher = noise if labels else outputs(model, task, split.retain)

    def forget(batch) -> Tensor:
        return kl(task.forward(model, batch), noise[batch["i"]], temperature=temperature).mean()

    def retain(batch) -> Tensor:
        out = task.forward(model, batch)
        return (nll(out) if labels else kl(out, teacher[batch["i"]], temperature=temperature)).mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, forget, task.batches(split.forget, batch_size, epochs=erase, seed=seed), lr=lr_erase, optimizer="adam")
        descend(e, retain, task.batches(split.retain, batch_size, epochs=rebuild, seed=seed + 1), lr=lr, optimizer="adam")
    return e.patch
