"""MetaUnlearn: one gradient step on a learned loss of a single image per person; the loss is learned on simulated requests of other persons.

Paper    De Min et al., "Unlearning Personal Data from a Single Image", TMLR 2025, arXiv:2407.12069.          Code     tdemin16/one-shui, no licence.
Forgets  records: all images of a person, from one.          Needs    forget, retain, validation.
Scope    all weights.   Forget  theta - meta_lr * grad h(support), support one image per person, h a small network trained beforehand.
Retain   by how h was trained (+ keep * CE).   Update  `steps` gradient steps.   Leaves  Replace.
Settings
    stride      a record's person is id // stride; 1: each record is a person of its own
    epochs      passes of meta-training over the persons of retain
    lr          step size of AdamW (amsgrad) on h, falling as a half cosine
    meta_lr     step size of the unlearning step on theta
    steps       unlearning steps at deletion; meta-training is for one
    hidden      width of h
    dropout     of h while it is trained
    weigh       none, probability or accuracy: what 1 - (mean probability of the true class, or accuracy) multiplies each loss of the alignment
    keep        weight of CE on retain images at theta' in what h is trained on
    batch_size  examples per step of meta-training
    buffers     freeze, move or recompute: what happens to batch-norm statistics
Differs  Deletion reads one image per person in `forget` and no other data of theirs: h is trained on retain when the request comes, so it has not seen
         them. The paper trains h once on everybody, so h is itself subject to deletion; `learn` and `forget` are the two halves. `forget` may hold
         the portrait alone. Softmax and one-hot labels in place of sigmoid and 40 attributes. No embedding of known persons (a portrait has
         none), no second network h_r; `keep` is an addition, 0 in the paper: without it, a step that ruins all parts alike is aligned too. With
         weigh=accuracy, as in the code, a model that knows its training set by heart gets no gradient, hence none. The meta-gradient is
         -meta_lr d/dphi <grad_theta h_phi(support), v>, v the outer gradient held constant, so no graph over the batches is kept. Published, for
         a ViT-B/16: hidden 512, dropout .5; lr 1e-4, 3 epochs, meta_lr .1 (CelebA); lr 1e-2, 10 epochs, meta_lr 1e-3 (MUFAC, 5 persons).
Check
    h = softplus(phi * theta * x), phi = x = 1, theta = 0: loss ln 2, gradient .5, theta' = -.05; for the outer loss theta' the meta-gradient is -.05
    >>> import torch; from expunge.methods.classifiers.metaunlearn import meta_gradient
    >>> phi, theta = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    >>> h = torch.nn.functional.softplus(phi * theta)
    >>> (g,) = torch.autograd.grad(h, theta, create_graph=True)
    >>> round(float(h.detach()), 6), (theta - 0.1 * g).detach(), meta_gradient([phi], [g], [torch.ones(1)], 0.1)
    (0.693147, tensor([-0.0500]), [tensor([-0.0500])])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import Diverged, SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Bound, Session, edit
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.classification.task import head
from expunge.modalities.examples import Examples
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import SCHEDULES

WEIGHINGS = ("none", "probability", "accuracy")


def loss_network(inputs: int, hidden: int = 128, dropout: float = 0.0) -> nn.Sequential:
    """h: (B, inputs) -> (B, 1) positive numbers. Linear-LayerNorm-Linear-GELU-Dropout, LayerNorm-Linear-Softplus."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout),
        nn.LayerNorm(hidden), nn.Linear(hidden, 1), nn.Softplus(),
    )  # fmt: skip


def one_each(data: Examples, stride: int, generator: torch.Generator) -> Examples:
    """One record of each person in `data`, drawn from the generator, in order of the persons.

    >>> data = Examples(torch.arange(5.0), torch.zeros(5, dtype=torch.long), torch.tensor([0, 1, 10, 11, 12]))
    >>> one_each(data, 10, torch.Generator().manual_seed(0)).ids // 10
    tensor([0, 1])
    """
    order = torch.randperm(len(data), generator=generator)
    whose = (data.ids // stride)[order]
    rows = [order[whose == p][0] for p in whose.unique()]
    return data.take(torch.stack(rows))


def alignment(forget: Tensor, anchors: Sequence[Tensor]) -> Tensor:
    """() sum over anchors of SmoothL1(forget, anchor), the anchors without gradient; all are ().

    >>> alignment(torch.tensor(0.0), [torch.tensor(1.0), torch.tensor(3.0)])
    tensor(3.)
    """
    return torch.stack([F.smooth_l1_loss(forget, a.detach()) for a in anchors]).sum()


def weighted(out: Out, weigh: str) -> Tensor:
    """() mean loss, times 1 - mean probability of the true class or 1 - accuracy."""
    loss = out.mean.mean()
    if weigh == "none":
        return loss
    p = out.logits.detach().softmax(-1)
    known = p.gather(1, out.labels[:, None]).mean() if weigh == "probability" else (p.argmax(-1) == out.labels).float().mean()
    return loss * (1 - known)


def meta_gradient(phi: Sequence[Tensor], g: Sequence[Tensor], v: Sequence[Tensor], meta_lr: float) -> list[Tensor]:
    """d/dphi L(theta - meta_lr * g(phi)) = -meta_lr d/dphi <g, v> for v = grad L at theta', held constant."""
    product = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
    return [-meta_lr * d for d in torch.autograd.grad(product, list(phi), allow_unused=True, materialize_grads=True)]


def inner(model: nn.Module, task: Task, h: nn.Module, theta: dict[str, Tensor], batch: Batch, *, graph: bool) -> list[Tensor]:
    """grad_theta of the mean of h(softmax(logits), features, one-hot label) over the batch, in the order of theta."""
    theta = {n: t.detach().requires_grad_(True) for n, t in theta.items()}
    caught: list[Tensor] = []
    handle = head(model)[1].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        out = task.forward(Bound(model, theta), batch)
    finally:
        handle.remove()
    target = F.one_hot(out.labels, out.logits.shape[-1])
    value = h(torch.cat([t.to(torch.float32).flatten(1) for t in (out.logits.softmax(-1), caught[0], target)], 1)).mean()
    return list(torch.autograd.grad(value, list(theta.values()), create_graph=graph, allow_unused=True, materialize_grads=True))


def moved(theta: dict[str, Tensor], g: Sequence[Tensor], meta_lr: float) -> dict[str, Tensor]:
    """theta - meta_lr * g, detached."""
    return {n: (t - meta_lr * d).detach() for (n, t), d in zip(theta.items(), g, strict=True)}


def pull(
    model: nn.Module, task: Task, there: dict[str, Tensor], forget: Sequence[Batch], checks: Sequence[Batch], kept: Sequence[Batch], *, before: Tensor,
    weigh: str, keep: float,
) -> list[Tensor]:  # fmt: skip
    """v: gradient at theta' = `there` of the mean over pairs of batches of alignment(forget, [before, validation at theta']) + keep * CE(retain)."""
    there = {n: t.requires_grad_(True) for n, t in there.items()}
    v = [torch.zeros_like(t) for t in there.values()]
    for j, batch in enumerate(forget):
        with torch.no_grad():
            after = weighted(task.forward(Bound(model, there), checks[j % len(checks)]), weigh)
        loss = alignment(weighted(task.forward(Bound(model, there), batch), weigh), [before, after])
        if keep > 0:
            loss = loss + keep * task.forward(Bound(model, there), kept[j % len(kept)]).mean.mean()
        for total, d in zip(v, torch.autograd.grad(loss, list(there.values()), allow_unused=True, materialize_grads=True), strict=True):
            total += d / len(forget)
    return v


def learn(
    model: nn.Module, task: Task, train: Examples, validation: Examples, *, persons: int, stride: int = 1, epochs: int = 8, lr: float = 3e-4,
    meta_lr: float = 1.0, hidden: int = 128, dropout: float = 0.0, weigh: str = "none", keep: float = 1.0, batch_size: int = 64, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """h, trained on simulated requests for `persons` persons of `train`; frozen, in eval mode. The model is not changed.

    Each epoch draws the persons in another order and cuts them into requests; at least one person stays in retain. The first weights of h
    and its dropout come from the global generator. Raises SplitError for fewer than two persons, Diverged if h's gradient is not finite.
    """
    whose = train.ids // stride
    people = whose.unique()
    if len(people) < 2:
        raise SplitError(f"meta-training needs at least two persons in retain, found {len(people)}; a record's person is id // stride, stride is {stride}")
    k, generator, watch = min(persons, len(people) - 1), torch.Generator().manual_seed(seed), guard.current()
    named = dict(model.named_parameters())
    theta = {n: named[n].detach() for n in everything(model).masks}
    with guard.quiet(model):
        parts = task.batches(validation, batch_size)
        before = torch.stack([weighted(task.forward(model, b), weigh) * len(b["i"]) / len(validation) for b in parts]).sum()
        h, rounds = _network(model, task, train, hidden, dropout), len(people) // k
        total, stepper, order = epochs * rounds, torch.optim.AdamW(h.parameters(), lr, amsgrad=True), people
        for turn in range(total):
            if turn % rounds == 0:
                order = people[torch.randperm(len(people), generator=generator)]
            asked = torch.isin(whose, order[turn % rounds * k :][:k])
            gone, rest = (train.take(rows.nonzero().squeeze(1)) for rows in (asked, ~asked))
            support = task.batches(one_each(gone, stride, generator), k)[0]
            forget, checks, kept = (task.batches(data, batch_size, seed=seed + turn) for data in (gone, validation, rest))
            with torch.enable_grad():
                g = inner(model, task, h, theta, support, graph=True)
                v = pull(model, task, moved(theta, g, meta_lr), forget, checks, kept, before=before, weigh=weigh, keep=keep)
                grads = meta_gradient(list(h.parameters()), g, v, meta_lr)
            if not all(bool(torch.isfinite(d).all()) for d in grads):
                raise Diverged(f"the gradient of the learned loss is not finite at request {turn}; lower meta_lr (now {meta_lr:g}) or lr (now {lr:g})")
            stepper.param_groups[0]["lr"] = lr * SCHEDULES["cosine"](turn / total)
            for p, d in zip(h.parameters(), grads, strict=True):
                p.grad = d
            stepper.step()
            if watch.progress:
                watch.progress(f"{watch.label}, meta-training", turn + 1, total)
    return h.eval().requires_grad_(False)


def _network(model: nn.Module, task: Task, data: Examples, hidden: int, dropout: float) -> nn.Module:
    """A new h that fits the model's outputs and features, on its device."""
    first = task.batches(data, 1)[0]
    logits, features = task.forward(model, first).logits, task.features(model, first, "")
    return loss_network(2 * logits.shape[1] + features.shape[1], hidden, dropout).to(logits.device)


def forget(e: Session, task: Task, h: nn.Module, support: Examples, *, meta_lr: float, steps: int = 1) -> None:
    """theta <- theta - meta_lr * grad h(support), `steps` times, on the session's weights: all that happens at deletion."""
    batch = task.batches(support, len(support))[0]
    for _ in range(steps):
        g = inner(e.model, task, h, dict(e.params), batch, graph=False)
        with torch.no_grad():
            for p, d in zip(e.params.values(), g, strict=True):
                p.sub_(meta_lr * d)


def _cost(n, s) -> tuple[float, float]:
    """As if every record were a person of its own, which is the most: with more images per person the supports are smaller."""
    size, rounds = n["forget"], s["epochs"] * max(1, n["retain"] // n["forget"])
    checks = -(-size // s["batch_size"]) * min(s["batch_size"], n.get("validation", 0))
    kept = -(-size // s["batch_size"]) * min(s["batch_size"], n["retain"]) if s["keep"] > 0 else 0
    return n.get("validation", 0) + rounds * (2 * size + checks + kept) + s["steps"] * size, rounds * (3 * size + kept) + s["steps"] * size


@method(
    paper="arXiv:2407.12069", tasks=("classification",), needs=("forget", "retain", "validation"), forgets=("records",), cost=_cost,
    toy={"epochs": 4},
    published={"epochs": 3, "lr": 0.0001, "meta_lr": 0.1, "hidden": 512, "dropout": 0.5, "weigh": "accuracy", "keep": 0.0},
    place="code: configs/const.py, CelebA",
    lacks="on digits it closes 0.17 of the gap, and no table is of persons, which it is made for",
)  # fmt: skip
def metaunlearn(
    model: nn.Module, task: Task, split: Split, *, stride: int = 1, epochs: int = 8, lr: float = 3e-4, meta_lr: float = 1.0, steps: int = 1,
    hidden: int = 128, dropout: float = 0.0, weigh: str = "none", keep: float = 1.0, batch_size: int = 64, buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if weigh not in WEIGHINGS:
        raise SettingError(f"weigh must be one of {', '.join(WEIGHINGS)}, not '{weigh}'")
    for name, value in (("stride", stride), ("epochs", epochs), ("steps", steps), ("hidden", hidden)):
        if value < 1:
            raise SettingError(f"{name} must be at least 1, not {value}")
    if not 0 <= dropout < 1 or keep < 0:
        raise SettingError(f"dropout must be in [0, 1) and keep 0 or larger; found {dropout} and {keep}")
    gone = split.forget.ids // stride
    if both := set(gone.tolist()) & set((split.retain.ids // stride).tolist()):
        raise SplitError(f"person {min(both)} stands in forget and in retain (stride {stride}); ask for all of a person's records, or set stride")
    support = one_each(split.forget, stride, torch.Generator().manual_seed(seed))
    guard.current().covered("forget", seen=len(support), of=len((split.forget.ids // stride).unique()), what="persons")  # one image of each is the method
    h = learn(
        model, task, split.retain, split.validation, persons=len(support), stride=stride, epochs=epochs, lr=lr, meta_lr=meta_lr, hidden=hidden,
        dropout=dropout, weigh=weigh, keep=keep, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:
        e.eval()
        forget(e, task, h, support, meta_lr=meta_lr, steps=steps)
    return e.patch
