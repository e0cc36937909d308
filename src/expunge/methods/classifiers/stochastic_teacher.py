"""Stochastic teacher: first learn the forget set from a random network, then rebuild the retain set from the original.

Paper    Zhang et al., "Machine Unlearning Methodology base on Stochastic Teacher Network", ADMA 2023, arXiv:2308.14322.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  T^2 KL(random || student).   Retain  KL(original || student) or CE.   Update  two phases, Adam.   Leaves  Replace.
Settings
    erase         passes over the forget set in the first phase
    rebuild       passes over the retain set in the second phase
    temperature   T of both divergences
    redraw_every  never, epoch or batch of the first phase: when the random network is drawn anew
    labels        rebuild with CE on labels instead of distillation
    lr_erase      step size of the first phase
    lr            step size of the second phase
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  No public code exists; losses and settings are a reading of the abstract and unverified. The random teacher runs in
         eval mode with batch-norm statistics recomputed on forget (on the batch, with redraw_every=batch). Redrawing drives the mean target
         towards uniform, an entropy that retraining does not give. Teacher logits are computed once unless data is augmented.
Check
    >>> import torch; from expunge.parts.losses import kl; from expunge.core.types import Out
    >>> kl(Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 0.0]])), torch.zeros(1, 2))
    tensor([0.4338])
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit, recompute
from expunge.core.types import Batch, Paired, Split, Task
from expunge.parts.losses import kl, nll
from expunge.parts.losses.distil import targets
from expunge.parts.scopes.layers import everything
from expunge.parts.training import fresh
from expunge.parts.updates.descend import descend

REDRAWS = ("never", "epoch", "batch")


def _cost(n, s) -> tuple[float, float]:
    trained = s["erase"] * n["forget"] + s["rebuild"] * n["retain"]
    drawn = {"never": 1, "epoch": math.ceil(s["erase"]), "batch": s["erase"]}[s["redraw_every"]]
    return trained + 2 * drawn * n["forget"] + (not s["labels"]) * n["retain"], trained


@method(
    paper="arXiv:2308.14322", tasks=("classification",), needs=("forget", "retain"),
    cost=_cost,
    toy={"erase": 8.0, "lr_erase": 0.003, "rebuild": 1.0},
    place="the card names no place: no code is public, and all settings are unverified",
    lacks="on cifar10 it costs 22 to 42 points of retain accuracy, and its losses are a reading of the abstract",
)  # fmt: skip
def stochastic_teacher(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    erase: float = 4.0,
    rebuild: float = 1.0,
    temperature: float = 1.0,
    redraw_every: str = "never",
    labels: bool = False,
    lr_erase: float = 0.003,
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if redraw_every not in REDRAWS:
        raise SettingError(f"redraw_every must be one of {', '.join(REDRAWS)}, not '{redraw_every}'")
    erasing = task.batches(split.forget, batch_size, epochs=erase, seed=seed)
    every = {"never": len(erasing), "epoch": erasing.per_epoch, "batch": 1}[redraw_every]
    teacher = None if labels else targets(model, task, split.retain)
    drawn: dict[int, Callable[[Batch], Tensor]] = {}

    def noise(number: int, batch: Batch) -> Tensor:
        if number not in drawn:
            drawn.clear()
            random = fresh(model, seed + number)
            recompute(random, [batch] if every == 1 else task.batches(split.forget, 256))
            guard.current().meter.add(forward=len(batch["i"]) if every == 1 else len(split.forget))
            if every == 1:
                with guard.quiet(random):
                    return task.forward(random, batch).logits
            drawn[number] = targets(random, task, split.forget)
        return drawn[number](batch)

    def forget(pair) -> Tensor:
        batch, step = pair
        return kl(task.forward(model, batch), noise(step // every, batch), temperature=temperature).mean()

    def retain(batch) -> Tensor:
        out = task.forward(model, batch)
        return (nll(out) if teacher is None else kl(out, teacher(batch), temperature=temperature)).mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, forget, Paired(erasing, range(len(erasing))), lr=lr_erase, optimizer="adam")
        descend(e, retain, task.batches(split.retain, batch_size, epochs=rebuild, seed=seed + 1), lr=lr, optimizer="adam")
    return e.patch
