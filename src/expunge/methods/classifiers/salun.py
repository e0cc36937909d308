"""SalUn: random labels on the forget set and true labels on the retain set, moving only the most salient weights.

Paper    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024, arXiv:2310.12508.
Code     OPTML-Group/Unlearn-Saliency, MIT.
Forgets  records, class.          Needs    forget, retain.
Scope    share `keep` of weights with the largest |sum of forget gradients|.   Forget  CE(f(x), y'), y' ~ Uniform.
Retain   alpha * CE.   Update  alternating passes or joint steps of SGD, places outside the mask bitwise frozen.   Leaves  Replace.
Settings
    keep          share of all weights that may move, 0..1
    soft          True: proximal variant, no mask; after each step theta - theta0 is soft-thresholded so that a linearly growing share moves
    order         passes: a pass over forget, then one over retain, each epoch (the code); joint: one pair of batches per step (equation 6)
    other         draw labels among the wrong ones only
    alpha         weight of the retain loss
    epochs        passes over the retain set
    lr            step size
    momentum      of SGD
    weight_decay  of SGD
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  Batch-norm buffers moved unmasked in the code; `buffers` says so here. The code's mask until 2026 let weight decay move frozen weights.
Check
    >>> import torch; from expunge.parts.scopes.saliency import top
    >>> top({"w": torch.tensor([[0.5, 1.0], [0.3, 0.6], [0.2, 0.4]])}, 0.5).masks["w"].int()
    tensor([[1, 1],
            [0, 1],
            [0, 0]], dtype=torch.int32)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Session, edit
from expunge.core.types import Paired, Split, Task
from expunge.parts.losses import nll, random_labels, relabel
from expunge.parts.scopes.layers import everything
from expunge.parts.scopes.saliency import saliency
from expunge.parts.updates.descend import alternate, descend

ORDERS = ("passes", "joint")


def _cost(n, s) -> tuple[float, float]:
    rounds = s["epochs"] * (n["forget"] + n["retain"])
    mask = 0 if s["soft"] else n["forget"]
    if s["order"] == "joint":
        rounds = 2 * s["epochs"] * n["retain"]
    return rounds + mask, rounds + mask


@method(
    paper="arXiv:2310.12508", tasks=("classification",), needs=("forget", "retain"), cost=_cost, toy={"epochs": 5, "lr": 0.1, "keep": 0.5},
    published={"epochs": 10, "batch_size": 256}, place="code: README of OPTML-Group/Unlearn-Saliency, CIFAR-10 and ResNet-18",
    stable=True,
)  # fmt: skip
def salun(
    model: nn.Module, task: Task, split: Split, *, keep: float = 0.5, soft: bool = False, order: str = "passes", other: bool = False, alpha: float = 1.0,
    epochs: int = 2, lr: float = 0.013, momentum: float = 0.9, weight_decay: float = 5e-4, batch_size: int = 64, buffers: str = "move", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if order not in ORDERS:
        raise SettingError(f"order must be one of {', '.join(ORDERS)}, not '{order}'")
    scope = everything(model, buffers) if soft else saliency(model, task, task.batches(split.forget, batch_size, seed=seed), keep=keep, buffers=buffers)

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        return relabel(out, random_labels(out.labels, out.logits.shape[-1], other=other)).mean()

    def retain(batch) -> Tensor:
        return alpha * nll(task.forward(model, batch)).mean()

    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    with edit(model, scope, stats=task.batches(split.retain, 256)) as e:
        e.train()
        if order == "joint":
            pairs = Paired(
                task.batches(split.forget, batch_size, epochs=epochs, seed=seed), task.batches(split.retain, batch_size, epochs=epochs, seed=seed + 1)
            )
            descend(e, lambda pair: forget(pair[0]) + retain(pair[1]), pairs, after=_proximal(e, len(pairs)) if soft else None, **options)
        else:
            phases = []
            for epoch in range(epochs):
                phases.append((forget, task.batches(split.forget, batch_size, seed=seed + 2 * epoch)))
                phases.append((retain, task.batches(split.retain, batch_size, seed=seed + 2 * epoch + 1)))
            alternate(e, *phases, after=_proximal(e, sum(len(b) for _, b in phases)) if soft else None, **options)
    return e.patch


def _proximal(e: Session, steps: int):
    """After step k: soft-threshold theta - theta0 by the value that leaves a share (k + 1) / steps of the weights free."""
    base = {n: p.detach().clone() for n, p in e.params.items()}

    def after(step: int) -> None:
        with torch.no_grad():
            flat = torch.cat([(p - base[n]).abs().reshape(-1) for n, p in e.params.items()])
            frozen = flat.numel() - max(1, int(flat.numel() * (step + 1) / steps))
            if frozen <= 0:
                return
            t = flat.kthvalue(frozen).values
            for n, p in e.params.items():
                d = p - base[n]
                p.copy_(base[n] + d.sign() * (d.abs() - t).clamp(min=0))

    return after
