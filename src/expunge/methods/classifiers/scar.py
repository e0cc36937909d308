"""SCAR: pull forgotten records to the nearest wrong class, and hold the rest by distilling on out-of-distribution inputs.

Paper    Bonato et al., "Is Retain Set All You Need in Machine Unlearning? Restoring Performance of Unlearned Models with Out-Of-Distribution
         Images", ECCV 2024, arXiv:2404.12922.          Code     jbonato1/SCAR, CC BY-NC-ND 4.0 (written anew here).
Forgets  records, class.          Needs    forget, anchor: inputs from elsewhere, such as other photographs; their labels are not used.
Scope    all weights.   Forget  lambda1 * w_i * D_c(e_i): z = t(e)/|t(e)| - mu_c/|mu_c|, D_c = z' P_c z, t(e) = sign(e) |e|^delta, c the nearest
         wrong class of record i, e the input of the last linear layer.
Retain   lambda2 * KL( softmax(teacher / T) || softmax(student) ) on anchor.   Update  nested batches, Adam, early stop.   Leaves  Replace.
Settings
    lambda1      weight of the distance
    lambda2      weight of the distillation
    temperature  T, of the teacher alone
    delta        power of the features
    gamma1       shrinkage of covariances towards their mean variance
    gamma2       shrinkage of covariances towards their mean covariance
    shrinks      how often the shrinkage is applied
    shared       one covariance for all classes, for classes of few records
    statistics   where class means and covariances are from: retain (one pass over it, never in the loop), anchor (classes as the model assigns
                 them), a file written by `save` when the model was trained, or auto: retain if the split has it, else anchor
    form         class: all labels in forget are removed from the model; records: they stay classes; auto: a label is removed when the
                 statistics of retain or file hold no record of it besides forget (with those of anchor: when forget holds one label only)
    threshold    w_i is the accuracy on the forget records of i's class, and 0 below this; 1 for a removed class
    ratio        anchor batches per forget batch
    epochs       most passes over the forget set
    target       stop when forget accuracy is at most this; negative: 0.01 if all labels are removed, else validation accuracy
    lr           step size
    batch_size   examples per step; published 1024
    buffers      freeze, move (published) or recompute: what happens to batch-norm statistics
Differs  Published statistics are those of retain, so the claim to need none holds only where they were stored at training time: `moments` and
         `save` do that, and what forget added to the sums is taken out before use (for the next request, `save` what `less` leaves). Those of
         anchor are a stand-in that the paper does not have. Targets are fixed per record, not per batch index. The stop and w_i are read once
         per epoch, with fresh Adam state, not after each step, and never on test. t keeps the sign, where a power of a negative feature is
         NaN. The code adds 1e-4 to log-probabilities; not here. A class of one record gets the shared covariance. The code
         lets batch-norm statistics move, which go to those of anchor and cost accuracy on real inputs.
Check
    >>> import torch; from expunge.methods.classifiers.scar import distance, precision, shrunk, tukey
    >>> S = shrunk(shrunk(torch.tensor([[2.0, 0.5], [0.5, 1.0]]), 3, 3), 3, 3); S
    tensor([[24.5000,  8.0000],
            [ 8.0000, 23.5000]])
    >>> distance(tukey(torch.tensor([[4.0, 9.0]]), 0.5), torch.tensor([1.0, 2.0]), precision(S))
    tensor([0.0224])
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import files, guard
from expunge.core.errors import DataError, SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Paired, Split, Task
from expunge.methods.classifiers.laf import embedding
from expunge.parts.losses import kl_to
from expunge.parts.losses.distil import targets
from expunge.parts.reading import outputs
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend

FORMS = ("auto", "class", "records")
HALF = 0.5
"""Share of a removed class that may still be known when all epochs are over; above it, a run counts as partial."""


def tukey(e: Tensor, delta: float) -> Tensor:
    """t(e) = sign(e) |e|^delta, elementwise; its slope is 0 where |e| < 1e-8, so that features of 0 give no infinite gradient."""
    return e.sign() * e.abs().clamp(min=1e-8).pow(delta)


def shrunk(s: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """S + gamma1 V1 I + gamma2 V2 (1 - I) of (..., D, D); V1 the mean of the diagonal, V2 that of the places off it that are not 0."""
    i = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    off = (s * (1 - i)) != 0
    v1 = s.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    v2 = ((s * off).sum((-2, -1)) / off.sum((-2, -1)).clamp(min=1))[..., None, None]
    return s + gamma1 * v1 * i + gamma2 * v2 * (1 - i)


def precision(s: Tensor) -> Tensor:
    """P = pseudo-inverse of the correlations S_ij / sqrt(S_ii S_jj), (..., D, D)."""
    scale = s.diagonal(dim1=-2, dim2=-1).sqrt()
    return torch.linalg.pinv(s / (scale[..., :, None] * scale[..., None, :]), hermitian=True)


def distance(t: Tensor, mu: Tensor, p: Tensor) -> Tensor:
    """D = z' P z, z = t/|t| - mu/|mu|, (B,) for t (B, D), mu (D,) or (B, D), P (D, D)."""
    z = F.normalize(t, dim=-1) - F.normalize(mu, dim=-1)
    return ((z @ p) * z).sum(-1)


@dataclass(frozen=True)
class Moments:
    """What is kept of t(e) per class, float64: count (C,), total (C, D) = sum t, square (C, D, D) = sum t t', and the power delta ()."""

    count: Tensor
    total: Tensor
    square: Tensor
    delta: Tensor


def sums(t: Tensor, labels: Tensor, classes: int, delta: float) -> Moments:
    """Moments of t (N, D) float64 under labels (N,)."""
    rows = [t[labels.to(t.device) == c] for c in range(classes)]
    count = torch.tensor([len(r) for r in rows], dtype=torch.float64, device=t.device)
    return Moments(count, torch.stack([r.sum(0) for r in rows]), torch.stack([r.T @ r for r in rows]), torch.tensor(delta, dtype=torch.float64))


def moments(model: nn.Module, task: Task, data, labels: Tensor, classes: int, *, delta: float = 0.5) -> Moments:
    """Moments of `data` under `labels` in one pass: call it on the training data and `save` the result with the model."""
    return sums(tukey(outputs(model, embedding(task), data).double(), delta), labels, classes, delta)


def less(a: Moments, b: Moments) -> Moments:
    """The sums of a without the records of b. Raises DataError when b holds records that a does not."""
    if bool((a.count < b.count).any()):
        raise DataError(f"the statistics hold fewer records of class {int((a.count - b.count).argmin())} than are to be taken out of them")
    return replace(a, count=a.count - b.count, total=a.total - b.total, square=a.square - b.square)


def without(a: Moments, labels: Tensor) -> Moments:
    """The sums of a without these classes."""
    kept = torch.ones_like(a.count)
    kept[labels] = 0
    return replace(a, count=a.count * kept)


STATISTICS = "statistics of scar"
"""What their file says that it holds."""


def save(found: Moments, path: Path | str) -> Path:
    """Write the sums as one safetensors file."""
    return files.write(path, files.seal(STATISTICS, vars(found)))


def load(path: Path | str, like: Moments) -> Moments:
    """Read what `save` wrote; raises DataError for no such file, or sums of other classes, features or power than `like`."""
    found = files.unsealed(Path(path), STATISTICS, DataError, "write retain, anchor, auto or the name of a file made by scar.save")
    want = {n: v.shape for n, v in vars(like).items()}
    if {n: v.shape for n, v in found.items()} != want or found["delta"] != like.delta:
        raise DataError(f"{Path(path).name} holds statistics of another network or of another power than delta={float(like.delta):g}")
    return Moments(**{n: v.to(like.total.device) if v.ndim else v for n, v in found.items()})


def fitted(found: Moments, *, gamma1: float, gamma2: float, shrinks: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Classes with records (K,), their means (K, D) and precisions (K, D, D). Raises SplitError when no class has two records."""
    have = found.count.nonzero().squeeze(1)
    n, total = found.count[have], found.total[have]
    if not len(have) or float(n.max()) < 2:
        raise SplitError("the statistics of scar need a class with two or more records")
    mean = total / n[:, None]
    scatter = found.square[have] - n[:, None, None] * mean[:, :, None] * mean[:, None, :]
    pooled = scatter.sum(0) / (n.sum() - len(n))
    s = torch.where((n < 2)[:, None, None] | shared, pooled, scatter / (n - 1).clamp(min=1)[:, None, None])
    for _ in range(shrinks):
        s = shrunk(s, gamma1, gamma2)
    return have, mean, precision(s)


def _cost(n, s) -> tuple[float, float]:
    """An upper bound: the run stops when `target` is reached, and inputs that the model assigns to a removed class are not distilled."""
    trained = s["epochs"] * s["ratio"] * (n["forget"] + -(-n["forget"] // s["batch_size"]) * min(s["batch_size"], n["anchor"]))
    source = {"auto": "retain" if "retain" in n else "anchor"}.get(s["statistics"], s["statistics"])
    probed = n.get("validation", 0) if s["target"] < 0 and s["form"] != "class" else 0
    return trained + n.get(source, 0) + 2 * n["anchor"] + (2 + s["epochs"]) * n["forget"] + probed, trained


@method(
    paper="arXiv:2404.12922", tasks=("classification",), needs=("forget", "anchor"), cost=_cost, toy={"epochs": 10},
    published={"batch_size": 1024, "buffers": "move"}, place="code: opts.py and README, CIFAR-10 and CIFAR-100",
    lacks="it stands in no committed table of a valid world: it needs an anchor part, which these worlds have not",
)  # fmt: skip
def scar(
    model: nn.Module, task: Task, split: Split, *, lambda1: float = 1.0, lambda2: float = 5.0, temperature: float = 1.0, delta: float = 0.5,
    gamma1: float = 3.0, gamma2: float = 3.0, shrinks: int = 2, shared: bool = False, statistics: str = "auto", form: str = "auto",
    threshold: float = 0.8, ratio: int = 6, epochs: int = 30, target: float = -1.0, lr: float = 5e-4, batch_size: int = 64,
    buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    return pull(
        model, task, split, lambda1=lambda1, lambda2=lambda2, temperature=temperature, delta=delta, gamma1=gamma1, gamma2=gamma2, shrinks=shrinks,
        shared=shared, statistics=statistics, form=form, threshold=threshold, ratio=ratio, epochs=epochs, target=target, lr=lr, batch_size=batch_size,
        buffers=buffers, seed=seed,
    )  # fmt: skip


def pull(
    model: nn.Module, task: Task, split: Split, *, lambda1: float, lambda2: float, temperature: float, delta: float, gamma1: float, gamma2: float, shrinks: int,
    shared: bool, statistics: str, form: str, threshold: float, ratio: int, epochs: int, target: float, lr: float, batch_size: int, buffers: str, seed: int,
    read: Any = None, least: int = 1,
) -> Patch:  # fmt: skip
    """What the settings of scar mean. The stop reads the accuracy on `read`, records (x, y), in place of the forget set's, from the end of epoch `least` on."""
    if form not in FORMS or min(shrinks, ratio, epochs) < 1 or not temperature > 0 or not 0 < delta <= 1:
        raise SettingError(f"form must be one of {', '.join(FORMS)}, shrinks, ratio and epochs at least 1, temperature above 0, delta in (0, 1]")
    logits = outputs(model, task, split.anchor)
    assigned, classes, own = logits.argmax(-1).cpu(), logits.shape[-1], split.forget.y
    t = tukey(outputs(model, embedding(task), split.forget).double(), delta)
    source = statistics if statistics != "auto" else "retain" if split.retain is not None else "anchor"
    if source == "anchor":
        found = moments(model, task, split.anchor, assigned, classes, delta=delta)
    elif source == "retain":
        split.require("retain")
        found = moments(model, task, split.retain, split.retain.y, classes, delta=delta)
    else:
        mine = sums(t, own, classes, delta)
        found = load(source, mine) if form == "class" else less(load(source, mine), mine)
    asked = own.unique()
    none = asked[:0]
    unseen = (asked if len(asked) == 1 else none) if source == "anchor" else asked[found.count[asked].cpu() == 0]
    removed = {"class": asked, "records": none, "auto": unseen}[form]
    labels, mu, p = fitted(without(found, removed), gamma1=gamma1, gamma2=gamma2, shrinks=shrinks, shared=shared)
    far = torch.stack([distance(t, mu[k], p[k]) for k in range(len(labels))], 1).masked_fill(own.to(t.device)[:, None] == labels, torch.inf)
    if bool(far.isinf().all(1).any()):
        raise SplitError("scar needs a class to move to: the statistics know of none besides that of the forgotten records")
    surrogate = split.anchor.take((~torch.isin(assigned, removed)).nonzero().squeeze(1))
    if not len(surrogate):
        raise SplitError("the model assigns every anchor to a removed class, so none is left to distil on; give anchors of more kinds")
    aim, teacher = far.argmin(1).cpu(), targets(model, task, surrogate)
    weights = torch.ones(len(own), dtype=t.dtype)

    def accuracy(data) -> Tensor:
        return (outputs(model, task, data).argmax(-1).cpu() == data.y).double()

    def weigh() -> float:
        """Sets the weights w by the accuracy on forget, and returns it."""
        hits = accuracy(split.forget)
        share = (torch.bincount(own, hits) / torch.bincount(own).clamp(min=1))[own]
        weights.copy_(torch.where(torch.isin(own, removed), 1.0, torch.where(share >= threshold, share, 0.0)))
        return float(hits.mean())

    def forget(batch) -> Tensor:
        t, goal = tukey(embedding(task).forward(model, batch).logits, delta), aim[batch["i"]]
        total = t.new_zeros(())
        for k in goal.unique():
            rows = (goal == k).nonzero().squeeze(1)
            total = total + (weights[batch["i"][rows]].to(t) * distance(t[rows], mu[k].to(t), p[k].to(t))).sum()
        return lambda1 * total / len(t)

    def retain(batch) -> Tensor:
        taught = teacher(batch).clone()
        taught[:, removed] = taught.min()
        return lambda2 * kl_to(task.forward(model, batch), (taught / temperature).softmax(-1)).mean()

    if target < 0:
        held = split.validation if len(removed) < len(asked) else None
        target = 0.01 if len(removed) == len(asked) else -1.0 if held is None else float(accuracy(held).mean())
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        known = weigh()
        for epoch in range(epochs):
            played = [b for b in task.batches(split.forget, batch_size, seed=seed + 2 * epoch) for _ in range(ratio)]
            per = -(-len(surrogate) // batch_size)
            pairs = Paired(played, task.batches(surrogate, batch_size, epochs=len(played) / per, seed=seed + 2 * epoch + 1))
            descend(e, lambda pair: forget(pair[0]) + retain(pair[1]), pairs, lr=lr, optimizer="adam")
            known = weigh()
            known = known if read is None else float(accuracy(read).mean())
            if known <= target and epoch + 1 >= least:
                break
        else:
            if len(removed) == len(asked) and known > HALF:
                which = "inputs that play the class" if read is None else "forgotten records"
                guard.current().doubt(f"the model still knows {known:.1%} of the {which} after {epochs} epochs: raise epochs or lr")
    return e.patch
