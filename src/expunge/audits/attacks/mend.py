"""Repairs without training: a model with its last layer made even, or with some of its weights put back to what they were before.

Each is a mapping name -> tensor to write over the model's own; `written` puts them there and takes them out again, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.machine.devices import reseeded
from expunge.core.types import Task, spread

New = Mapping[str, Tensor]

SHARES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""Shares of all weights that are put back, largest change first; 0 is one weight."""

MODULES = 8
"""Most layers that are put back one by one: those whose return lowers the loss of the forgotten records most."""

RANK = 4
"""Rank of the part of a matrix's change that is taken out."""

PULLED = 64
"""Most forgotten records that the first-order pull of each weight is read on."""

SAMPLE = 1 << 22
"""Most weights whose order is found exactly; of more, the threshold is read off a sample of as many."""


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and buffers by name, each once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach() for n, t in named.items() if t.is_floating_point()}


@contextlib.contextmanager
def written(model: nn.Module, new: New) -> Iterator[nn.Module]:
    """The model with these tensors in place of its own; on leaving, every bit is as it was."""
    named = tensors(model)
    kept = {n: named[n].clone() for n in new}
    try:
        with torch.no_grad():
            for n, t in new.items():
                named[n].copy_(t)
        yield model
    finally:
        with torch.no_grad():
            for n, t in kept.items():
                named[n].copy_(t)


def last(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the output layer: that of a language model, else the last linear layer; None without one."""
    outer: Any = getattr(model, "get_output_embeddings", lambda: None)()
    found = [(n, m) for n, m in model.named_modules() if (m is outer if outer is not None else isinstance(m, nn.Linear))]
    return found[-1] if found else None


def named_tensor(model: nn.Module, tensor: Tensor) -> str:
    """The name under which a parameter stands in `tensors`, which of tied ones is the first."""
    return next(n for n, t in model.named_parameters() if t is tensor)


def evened(model: nn.Module, rows: bool, biases: bool, only: Tensor | None = None) -> New | None:
    """The last layer with even rows (w_c and b_c times mean ||w|| / ||w_c||) or even biases (b_c = mean b) or both; `only` these rows are changed, if named.

    None where it has nothing of the kind.

    >>> layer = nn.Linear(1, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0], [4.0]])), layer.bias.data.copy_(torch.tensor([2.0, 8.0]))
    >>> {n: t.flatten().tolist() for n, t in evened(nn.Sequential(layer), True, True).items()}
    {'0.weight': [2.5, 2.5], '0.bias': [5.0, 5.0]}
    """
    found = last(model)
    bias = None if found is None else getattr(found[1], "bias", None)
    if found is None or (biases and bias is None and not rows):
        return None
    weight: Any = found[1].weight
    w, b = weight.detach().clone(), None if bias is None else bias.detach().clone()
    which = torch.arange(len(w)) if only is None else only
    if rows:
        norms = w.float().norm(dim=1).clamp(min=1e-12)
        factor = (norms.mean() / norms)[which].to(w.dtype)
        w[which] *= factor[:, None]
        if b is not None:
            b[which] *= factor
    if biases and b is not None:
        b[which] = b.mean()
    return {named_tensor(model, weight): w, **({} if b is None else {named_tensor(model, bias): b})}


def changed(before: nn.Module, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (what it was, what it is) of tensors that both models have in one shape and that differ."""
    old, new = tensors(before), tensors(model)
    return {n: (old[n], t) for n, t in new.items() if n in old and old[n].shape == t.shape and not torch.equal(old[n], t)}


def by_size(both: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """|change| relative to the root mean square of the tensor as it was (as it is, where that is 0)."""
    scale = lambda a, b: a.float().square().mean().sqrt().clamp(min=1e-12) if bool(a.any()) else b.float().square().mean().sqrt()  # noqa: E731
    return {n: (b - a).abs().float() / scale(a, b) for n, (a, b) in both.items()}


def by_pull(both: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module, task: Task, data: Any) -> dict[str, Tensor]:
    """What putting a weight back takes off the mean loss of `data`, to first order: (now - before) * gradient; no decoy among the changes helps against it."""
    part = data.take(spread(len(data), PULLED))
    named = dict(model.named_parameters())
    flags, modes = {n: q.requires_grad for n, q in named.items()}, [(m, m.training) for m in model.modules()]
    grads: dict[str, Tensor] = {}
    try:
        model.eval()
        for q in named.values():
            q.requires_grad_(True)
        batches = task.batches(part, min(PULLED, getattr(part, "at_once", PULLED)))
        for k in range(len(batches)):
            with torch.enable_grad():
                found = torch.autograd.grad(task.forward(model, batches[k]).mean.sum() / len(part), list(named.values()), allow_unused=True)
            for n, g in zip(named, found, strict=True):
                if g is not None and n in both:
                    grads[n] = grads.get(n, 0) + g
    finally:
        for n, q in named.items():
            q.requires_grad_(flags[n])
        for m, mode in modes:
            m.training = mode
    return {n: ((both[n][1] - both[n][0]) * g).float() for n, g in grads.items()}


def chosen(order: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of the k largest entries of all tensors together that are above 0 (equal ones together; about k where there are more than SAMPLE).

    >>> {n: m.tolist() for n, m in chosen({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, 2).items()}
    {'a': [True, False], 'b': [True]}
    """
    flat = torch.cat([t.flatten() for t in order.values()]) if order else torch.zeros(0)
    if len(flat) > SAMPLE:
        flat, k = flat[:: -(-len(flat) // SAMPLE)], max(1, round(k / -(-len(flat) // SAMPLE)))
    flat = flat[flat > 0]
    if not len(flat):
        return {}
    edge = flat.topk(min(k, len(flat))).values[-1]
    masks = {n: t >= edge for n, t in order.items()}
    return {n: m for n, m in masks.items() if bool(m.any())}


@dataclass(frozen=True)
class Set_:
    """Weights that are put back: how they were chosen, how many they are, and where."""

    label: str
    count: int
    masks: Mapping[str, Tensor | None]

    def back(self, both: Mapping[str, tuple[Tensor, Tensor]]) -> New:
        """The tensors with these places as they were before."""
        return {n: both[n][0] if m is None else torch.where(m, *both[n]) for n, m in self.masks.items()}


def sets(before: nn.Module, model: nn.Module, task: Task, data: Any, rows: Sequence[int] = ()) -> tuple[list[Set_], int]:
    """Sets of weights to put back, smallest first, and how many weights there are: shares SHARES by size and by pull, rows of the last layer (if any are
    named), the last layer, single layers by pull, everything."""
    both, total = changed(before, model), sum(t.numel() for t in tensors(model).values())
    if not both:
        return [], total
    moved = {n: a != b for n, (a, b) in both.items()}
    pulls, found = by_pull(both, model, task, data), []
    for how, order in (("size", by_size(both)), ("pull", pulls)):
        for share in SHARES:
            masks = chosen(order, max(1, round(share * total)))
            found += [Set_(f"{how} {share:g}", sum(int((m & moved[n]).sum()) for n, m in masks.items()), masks)] if masks else []
    outer = last(model)
    owners: dict[str, list[str]] = {}
    for n in both:
        owners.setdefault(n.rpartition(".")[0], []).append(n)
    if outer is not None:
        mine = [n for t in (outer[1].weight, getattr(outer[1], "bias", None)) if t is not None and (n := named_tensor(model, t)) in both]
        if len(rows):
            masks = {n: torch.zeros_like(moved[n]).index_fill_(0, torch.tensor(rows, device=moved[n].device), True) for n in mine}
            found.append(Set_("row", sum(int((m & moved[n]).sum()) for n, m in masks.items()), masks))
        if mine:
            found.append(Set_("head", sum(int(moved[n].sum()) for n in mine), dict.fromkeys(mine)))
    gain = {owner: sum(float(pulls[n].clamp(min=0).sum()) for n in names if n in pulls) for owner, names in owners.items()}
    for owner in sorted(gain, key=lambda o: -gain[o])[:MODULES]:
        found.append(Set_(f"layer {owner}", sum(int(moved[n].sum()) for n in owners[owner]), dict.fromkeys(owners[owner])))
    found.append(Set_("all", sum(int(m.sum()) for m in moved.values()), dict.fromkeys(both)))
    return sorted((s for s in found if s.count), key=lambda s: s.count), total


def unranked(before: nn.Module, model: nn.Module) -> New:
    """Every changed matrix with the part of rank RANK of its change taken out: w - U S V of the largest singular values of (now - before)."""
    out = {}
    for n, (a, b) in changed(before, model).items():
        if b.ndim == 2:
            d = (b - a).float()
            with reseeded(0):
                u, s, v = torch.svd_lowrank(d, q=min(RANK + 4, *d.shape))
            k = min(RANK, len(s))
            out[n] = b - ((u[:, :k] * s[:k]) @ v[:, :k].T).to(b.dtype)
    return out


def paired_units(own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, float]:
    """(D,) for each column of `own` (N, D) the column of `theirs` (N, D) that goes with it, one to one with the largest sum of correlations; the factor that
    brings it there, E[own theirs] / E[own^2]; and the median correlation of the pairs that vary in both.

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> unit, scale, match = paired_units(a, a[:, [1, 0]] * 2)
    >>> unit.tolist(), scale.tolist(), round(match, 4)
    ([1, 0], [2.0, 2.0], 1.0)
    """
    from scipy.optimize import linear_sum_assignment

    a, b = ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6) for x in (own.double(), theirs.double()))
    table = a.T @ b / len(own)
    unit = torch.as_tensor(linear_sum_assignment(table.numpy(), maximize=True)[1])
    live = (a.abs().amax(0) > 0) & (b.abs().amax(0)[unit] > 0)
    match = float(table[torch.arange(len(unit)), unit][live].median()) if bool(live.any()) else 0.0
    scale = (own * theirs[:, unit]).mean(0) / own.square().mean(0).clamp(min=1e-12)
    return unit, scale, match
