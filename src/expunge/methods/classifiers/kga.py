"""KGA: bring the model as far from a network that knows only the forget set as it stood from one that knows only unseen data.

Paper    Wang et al., "KGA: A General Machine Unlearning Framework Based on Knowledge Gap Alignment", ACL 2023, arXiv:2305.06535.
Code     Lingzhi-WANG/KGAUnlearn, MIT.
Forgets  records.          Needs    forget, retain, validation.
Scope    all weights.   Forget  | KL(A* || A_f) on D_f - G |, G = KL(A_D || A_n) on D_n: A_D the given model, A* the edited one, A_f and A_n fresh
         networks trained on D_f and on unseen D_n, each with the same small sample of retain.   Retain  alpha * KL(A_D || A*).
Update   Adam on pairs of batches until the gap is at most `stop` times the first one.   Leaves  Replace.
Settings
    new            part of the split that is D_n: validation or anchor
    sample         share of retain that both helper networks see beside their own data
    helper_epochs  passes that train each helper network
    helper_lr      step size of the helper networks (Adam)
    alpha          weight of the retain loss
    reverse        KL(A_f || A*) and KL(A_n || A_D) instead, as the code for generation has it
    ratio          retain batches per forget batch; published 10
    epochs         most passes over retain
    stop           share of the first gap at which to stop; 0: never before `epochs`
    lr             step size
    batch_size     examples per step
    buffers        move, freeze or recompute: what happens to batch-norm statistics
Differs  D_n must never have been trained on, and look like D_f, so no share of retain can be D_n. The default is validation: no weight of A* is fitted
         to it, one number alone, G, comes from it, as a stopping level does. `new=anchor` takes unseen records with right labels from
         there, if that is what the anchor part holds; out-of-distribution inputs are of no use here. G is computed once over all of
         D_n, where the code takes one batch per step; the stop reads all of D_f after each pass, where the code reads one batch.
         The code mixes directions: for classification KL(A_f || A*) but KL(A_D || A_n), averaged over classes too, and retain weighted by
         1 - alpha. The order here, and the paper's stopping share, are unverified against the paper. A removed class: A_f answers with the
         class itself and G is small, so A* hardly moves; only helpers trained for a few passes make it forget one.
Check
    >>> import torch; from expunge.methods.classifiers.kga import gap
    >>> gap(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))    # ln 2 - H(.8808, .1192)
    tensor([0.3278])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Batch, Paired, Split, Task, concat, drawn
from expunge.parts.losses import kl
from expunge.parts.losses.distil import targets
from expunge.parts.reading import outputs
from expunge.parts.scopes.layers import everything
from expunge.parts.training import fresh, train
from expunge.parts.updates.descend import descend

NEWS = ("validation", "anchor")


def gap(a: Tensor, b: Tensor) -> Tensor:
    """KL( softmax(a) || softmax(b) ) of logits (B, C), (B,)."""
    return F.kl_div(F.log_softmax(b.to(a), -1), F.log_softmax(a, -1), reduction="none", log_target=True).sum(-1)


def _cost(n, s) -> tuple[float, float]:
    """An upper bound: training stops once the gap is closed."""
    new, sample = n.get(s["new"], 0), round(s["sample"] * n["retain"])
    steps = -(-n["retain"] // (s["ratio"] * s["batch_size"]))
    trained = s["helper_epochs"] * (n["forget"] + new + 2 * sample) + s["epochs"] * (n["retain"] + drawn(n["forget"], s["batch_size"], steps))
    return trained + 2 * new + n["retain"] + (2 + s["epochs"]) * n["forget"], trained


@method(
    paper="arXiv:2305.06535", tasks=("classification",), needs=("forget", "retain", "validation"), forgets=("records",),
    cost=_cost, toy={"helper_epochs": 4.0, "sample": 0.0},
    place="it has no card; the page names the settings of its code",
    lacks="it has no card, and stands in valid tables for a class alone, which it is not made for (gap closed -0.03)",
)  # fmt: skip
def kga(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    new: str = "validation",
    sample: float = 0.05,
    helper_epochs: float = 20.0,
    helper_lr: float = 0.003,
    alpha: float = 1.0,
    reverse: bool = False,
    ratio: int = 1,
    epochs: int = 10,
    stop: float = 0.05,
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if new not in NEWS:
        raise SettingError(f"new must be one of {', '.join(NEWS)}, not '{new}'")
    if not 0 <= sample <= 1 or ratio < 1 or epochs < 1 or stop < 0:
        raise SettingError(f"sample must be in 0..1, ratio and epochs 1 or larger, stop 0 or larger; found {sample:g}, {ratio}, {epochs} and {stop:g}")
    split.require(new)
    unseen = getattr(split, new)
    both = split.retain.take(torch.randperm(len(split.retain))[: round(sample * len(split.retain))])

    def helper(data, number: int) -> nn.Module:
        net = fresh(model, seed + number)
        train(net, task, concat(data, both), epochs=helper_epochs, batch_size=batch_size, seed=seed + number, lr=helper_lr, optimizer="adam")
        return net

    def away(mine: Tensor, theirs: Tensor) -> Tensor:
        return (gap(theirs.to(mine), mine) if reverse else gap(mine, theirs)).mean()

    known = targets(helper(split.forget, 0), task, split.forget)
    goal = away(outputs(model, task, unseen), outputs(helper(unseen, 1), task, unseen))
    kept = targets(model, task, split.retain)

    def loss(pair) -> Tensor:
        aligned = (away(task.forward(model, pair[0]).logits, known(pair[0])) - goal).abs()
        return aligned + alpha * kl(task.forward(model, pair[1]), kept(pair[1])).mean()

    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        first = _left(model, task, split, known, away, goal)
        for epoch in range(epochs):
            kept_batches = task.batches(split.retain, ratio * batch_size, seed=seed + 2 * epoch + 1)
            passes = len(kept_batches) / -(-len(split.forget) // batch_size)
            pairs = Paired(task.batches(split.forget, batch_size, epochs=passes, seed=seed + 2 * epoch), kept_batches)
            descend(e, loss, pairs, lr=lr, optimizer="adam")
            if _left(model, task, split, known, away, goal) <= stop * first:
                break
    return e.patch


def _left(model: nn.Module, task: Task, split: Split, known: Callable[[Batch], Tensor], away: Callable, goal: Tensor) -> float:
    """| KL(A* || A_f) - G | over all of the forget set, in eval mode."""
    batches = task.batches(split.forget, 256)
    with guard.quiet(model):
        pairs = [(task.forward(model, b).logits, known(b)) for b in batches]
        return float((away(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])) - goal).abs())
