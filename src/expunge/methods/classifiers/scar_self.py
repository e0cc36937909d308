"""SCAR-self: remove a class with out-of-distribution inputs alone; those that the model assigns to the class play the forget set.

Paper    Bonato et al., "Is Retain Set All You Need in Machine Unlearning? Restoring Performance of Unlearned Models with Out-Of-Distribution
         Images", ECCV 2024, arXiv:2404.12922.          Code     jbonato1/SCAR, CC BY-NC-ND 4.0 (written anew here).
Forgets  class.          Needs    anchor. Nothing is learnt from forget: it names the class, and its inputs say when to stop (stop=forget); with stop=anchor
         they are never read, so that one record of the class will do.
Scope    all weights.   Forget  lambda1 * D_c(e) on anchor inputs assigned to the class.   Retain  lambda2 * KL( softmax(teacher / T) ||
         softmax(student) ) on the other anchor inputs.   Update  nested batches, Adam, early stop.   Leaves  Replace.
Settings
    lambda1      weight of the distance
    lambda2      weight of the distillation
    temperature  T, of the teacher alone
    delta        power of the features
    gamma1       shrinkage of covariances towards their mean variance
    gamma2       shrinkage of covariances towards their mean covariance
    shrinks      how often the shrinkage is applied: once here, twice in scar
    shared       one covariance for all classes, for classes of few records
    statistics   where class means and covariances are from: retain, anchor, a file, or auto, as in scar
    ratio        batches to distil per batch that plays the forget set
    epochs       most passes over the inputs that play the forget set; published 30, of more inputs
    stop         what the stop reads: forget (records of the class itself, as published) or anchor (the inputs that play them)
    target       stop, from the second pass on, when at most this share of them is still assigned to the class; negative: 0.01
    lr           step size
    batch_size   examples per step; published 1024
    buffers      freeze, move (published) or recompute: what happens to batch-norm statistics
Differs  The code splits each mixed batch in two and skips those without an input of the class; here the two kinds are batched apart, as forget
         and anchor are in scar, whose other differences hold here too. The stop is read once per pass, not after each step. stop=anchor is ours, for
         a class of which no record is at hand: its stand-ins are gone long before the class is. On digits with noise as anchors, eight runs, it leaves
         39 to 76 % of the class known, and stop=forget 1 %, after up to 100 of our short passes where 30 of the published ones do.
Check
    >>> import torch; from expunge.methods.classifiers.scar import precision, shrunk
    >>> precision(shrunk(torch.tensor([[2.0, 0.5], [0.5, 1.0]]), 3, 3))                  # once: correlation 2 / sqrt(6.5 * 5.5) = .3345
    tensor([[ 1.1260, -0.3766],
            [-0.3766,  1.1260]])
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import METHODS, method
from expunge.core.types import Split, Task
from expunge.methods.classifiers.scar import pull
from expunge.parts.reading import outputs

STOPS = ("forget", "anchor")


def _cost(n, s) -> tuple[float, float]:
    """That of scar when a fifth of anchor plays the forget set; which share does is known to the model alone."""
    played = -(-n["anchor"] // 5)
    forward, backward = METHODS["scar"].cost({**n, "forget": played, "anchor": n["anchor"] - played}, {**s, "form": "class"})
    return forward + n["anchor"] + (s["epochs"] * n["forget"] if s["stop"] == "forget" else 0), backward


@method(
    paper="arXiv:2404.12922", tasks=("classification",), needs=("anchor",), forgets=("class",), cost=_cost, toy={"epochs": 100},
    published={"epochs": 30, "batch_size": 1024, "buffers": "move"}, place="code: opts.py and README, CIFAR-10 and CIFAR-100",
    lacks="it stands in no committed table of a valid world: it needs an anchor part, which these worlds have not",
)  # fmt: skip
def scar_self(
    model: nn.Module, task: Task, split: Split, *, lambda1: float = 1.0, lambda2: float = 5.0, temperature: float = 1.0, delta: float = 0.5,
    gamma1: float = 3.0, gamma2: float = 3.0, shrinks: int = 1, shared: bool = False, statistics: str = "auto", ratio: int = 6, epochs: int = 100,
    stop: str = "forget", target: float = 0.01, lr: float = 5e-4, batch_size: int = 64, buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if stop not in STOPS:
        raise SettingError(f"stop must be one of {', '.join(STOPS)}, not '{stop}'")
    removed = split.forget.y.unique()
    assigned = outputs(model, task, split.anchor).argmax(-1).cpu()
    if split.retain is not None and (kept := set(removed.tolist()) & set(split.retain.y.tolist())):
        raise SplitError(f"scar_self removes classes, but retain holds records of class {min(kept)}; use scar to forget some records of a class")
    mine = torch.isin(assigned, removed)
    lacking = [c for c in removed.tolist() if not (assigned == c).any()]
    if lacking or mine.all():
        found = f"none of {len(mine)} anchors to class {lacking[0]}" if lacking else "all anchors to the removed class"
        raise SplitError(f"the model assigns {found}; give anchors of more kinds")
    played = replace(split.anchor.take(mine.nonzero().squeeze(1)), y=assigned[mine])
    stand_in = replace(split, forget=played, anchor=split.anchor.take((~mine).nonzero().squeeze(1)))
    return pull(
        model, task, stand_in, lambda1=lambda1, lambda2=lambda2, temperature=temperature, delta=delta, gamma1=gamma1, gamma2=gamma2, shrinks=shrinks,
        shared=shared, statistics=statistics, form="class", threshold=0.0, ratio=ratio, epochs=epochs, target=target, lr=lr, batch_size=batch_size,
        buffers=buffers, seed=seed, read=split.forget if stop == "forget" else None, least=2,
    )  # fmt: skip
