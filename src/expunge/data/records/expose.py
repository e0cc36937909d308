"""Exposed models: a copy in which only what a few clean records do not show is left. The first half of EBYD; `methods/ebyd.py` is the second.

Source: card ebyd (Li et al., "Expose Before You Defend", 2024; code bboylyg/Expose-Before-You-Defend, Apache-2.0). Ascent on clean records makes a
model lose what it does for them first; a backdoor, which none of them triggers, stays, and dominates. Use of an exposed model:

    collapse   which class it answers to everything: published as the target of an all-to-one backdoor
    recover    which channels it wants switched off to work again: those that hold the backdoor
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import ScopeError, SettingError, SplitError
from expunge.core.session import Session, scratch
from expunge.core.types import Task, device_of
from expunge.modalities.examples import Examples
from expunge.parts.losses import ascent, nll
from expunge.parts.reading import score
from expunge.parts.updates.descend import descend

WAYS = ("unlearn", "confuse")
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def expose(
    model: nn.Module, task: Task, clean: Examples, *, how: str = "unlearn", stop: float = 0.5, epochs: int = 40, lr: float = 1e-4, optimizer: str = "adam",
    momentum: float = 0.0, weight_decay: float = 5e-4, clip: float = 20.0, batch_size: int = 64, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A copy that has lost clean behaviour: passes over `clean` until accuracy on it is at most `stop`, or `epochs` are over.

    how     unlearn: minimise -CE(f(x), y), clean unlearning (CUL); confuse: minimise the mean CE to all labels, which is what labels drawn uniformly
            for every batch (the public code) give on average

    Eval mode throughout: batch norm keeps its statistics, which few records could not replace. The gradient norm is clipped at `clip` (the public code
    clips before the backward pass, which clips nothing). The optimiser starts anew every epoch. Steps must be small, and `stop` not too low
    (published .1 to .2): a copy that goes on past the loss of clean accuracy answers one class to everything, and the trigger no longer shows.
    """
    if how not in WAYS:
        raise SettingError(f"how must be one of {', '.join(WAYS)}, not '{how}'")
    if epochs < 1 or not 0 <= stop < 1:
        raise SettingError(f"epochs must be at least 1 and stop in [0, 1); found {epochs} and {stop:g}")
    twin = copy.deepcopy(model).eval()

    def loss(batch) -> Tensor:
        out = task.forward(twin, batch)
        return (ascent(out) if how == "unlearn" else -out.logits.log_softmax(-1).mean(-1)).mean()

    options = {"lr": lr, "optimizer": optimizer, "momentum": momentum, "weight_decay": weight_decay, "clip": clip}
    for epoch in range(epochs):
        _train(scratch(twin), loss, task.batches(clean, batch_size, seed=seed + epoch), **options)
        if guard.current().stopped or float(score(twin, task, clean).correct.float().mean()) <= stop:
            break
    return twin.requires_grad_(False)


def _train(session: Session, loss, batches, **options) -> None:
    """`descend` on a network of one's own: budgets and the meter count, but it is neither validated nor checkpointed."""
    watch = guard.current()
    inner = replace(watch, validate=None, journal=None, max_loss=math.inf)
    with guard.watching(inner):
        descend(session, loss, batches, **options)
    watch.stopped = inner.stopped


@dataclass(frozen=True)
class Collapse:
    """What exposed copies answer to clean records that they were not exposed with, one entry per run.

    labels   the class each run collapses to
    shares   (R,) share of the records of other classes that are given this class, under random noise on the input
    """

    labels: tuple[int, ...]
    shares: tuple[float, ...]


def collapse(
    model: nn.Module, task: Task, clean: Examples, *, runs: int = 3, noise: float = 0.1, seed: int = 0, **options
) -> Collapse:  # fmt: skip
    """The class to which copies exposed on random halves of `clean` send the other half: published as the target of an all-to-one backdoor.

    noise    deviation of the noise on the inputs, as a share of the range of `clean`
    options  of `expose`

    Read it beside models of the same kind that are known to be clean, and draw no verdict from it alone: clean models collapse too. On 8
    backdoored and 8 clean networks for digits (stop 0.2) all runs agreed on one class, at shares above 0.9, once in each group, and that class was
    not the target.
    """
    if runs < 2 or len(clean) < 2:
        raise SettingError(f"a collapse needs at least 2 runs and 2 records; found {runs} and {len(clean)}")
    low, high = clean.x.min(), clean.x.max()
    labels, shares = [], []
    for r in range(runs):
        g = torch.Generator().manual_seed(seed + r)
        order = torch.randperm(len(clean), generator=g)
        exposed = expose(model, task, clean.take(order[: len(clean) // 2]), seed=seed + r, **options)
        held = clean.take(order[len(clean) // 2 :])
        x = (held.x + noise * (high - low) * torch.randn(held.x.shape, generator=g, dtype=held.x.dtype)).clamp(low, high)
        answers = score(exposed, task, replace(held, x=x)).logits
        classes = torch.arange(answers.shape[1])
        other = held.y[:, None] != classes
        rate = ((answers.argmax(-1)[:, None] == classes) & other).sum(0) / other.sum(0).clamp(min=1)
        labels.append(int(rate.argmax()))
        shares.append(float(rate.max()))
    return Collapse(tuple(labels), tuple(shares))


def gated(model: nn.Module, linear: bool = True) -> dict[str, nn.Module]:
    """Trainable layers whose output channels can get a gate: batch norms where the model has any, else convolutions; if `linear`, hidden linear
    layers too. Raises ScopeError if there are none."""
    free = {n: m for n, m in model.named_modules() if (own := list(m.parameters(recurse=False))) and all(p.requires_grad for p in own)}
    norms = {n: m for n, m in free.items() if isinstance(m, BATCH_NORMS)}
    found = norms or {n: m for n, m in free.items() if isinstance(m, CONVOLUTIONS)}
    hidden = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:-1] if linear else []
    found |= {n: free[n] for n in hidden if n in free}
    if not found:
        raise ScopeError(f"no channel to gate: no trainable batch norm or convolution{' and no hidden linear layer' if linear else '; set linear=true'}")
    return found


def recover(
    exposed: nn.Module, task: Task, clean: Examples, layers: Iterable[str], *, alpha: float = 0.2, epochs: float = 20.0, lr: float = 0.2,
    momentum: float = 0.9, batch_size: int = 64, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Layer -> gates m (C,) in [0, 1] with which the exposed model works best again: the lowest are on channels that it must lose.

    min over m of alpha * CE(f(x; m), y), m = 1 at first, SGD, m <- clip(m, 0, 1) after every step; channel c of a layer's output is multiplied by
    m_c. Weights stay. Gates that no gradient reaches stay at 1.
    """
    named = dict(exposed.named_modules())
    found = {n: named[n] for n in layers}
    gates = {n: nn.Parameter(torch.ones(len(cast(Tensor, m.weight)), device=device_of(exposed))) for n, m in found.items()}
    exposed.eval()

    def loss(batch) -> Tensor:
        return alpha * nll(task.forward(exposed, batch)).mean()

    def clip(_: int) -> None:
        with torch.no_grad():
            for m in gates.values():
                m.clamp_(0, 1)

    handles = [m.register_forward_hook(_gate(gates[n])) for n, m in found.items()]
    try:
        batches = task.batches(clean, batch_size, epochs=epochs, seed=seed)
        _train(Session(exposed, gates, dict.fromkeys(gates)), loss, batches, lr=lr, momentum=momentum, after=clip)
    finally:
        for handle in handles:
            handle.remove()
    return {n: m.detach() for n, m in gates.items()}


def _gate(m: Tensor):
    """A forward hook: output (B, C, ...) times m (C,) along the channels; the last dimension is that of a linear layer."""

    def hook(module: nn.Module, _, out: Tensor) -> Tensor:
        return out * (m.to(out) if isinstance(module, nn.Linear) else m.to(out).view(1, -1, *[1] * (out.ndim - 2)))

    return hook


def silence(params: Mapping[str, Tensor], channels: Iterable[tuple[str, int]]) -> None:
    """Set weight and bias of the given (layer, channel) to zero in `params`, in place: the channel's output is 0 for every input.

    >>> layer = nn.Linear(1, 2); silence(dict(layer.named_parameters()), [("", 1)]); layer.weight[1].item(), layer.bias[1].item()
    (0.0, 0.0)
    """
    with torch.no_grad():
        for name, channel in channels:
            for kind in ("weight", "bias"):
                p = params.get(f"{name}.{kind}" if name else kind)
                if p is not None:
                    p[channel] = 0


def lowest(gates: Mapping[str, Tensor]) -> list[tuple[float, str, int]]:
    """(gate, layer, channel) of all channels, lowest first; equal ones in the model's order.

    >>> lowest({"a": torch.tensor([1.0, 0.5]), "b": torch.tensor([0.0])})
    [(0.0, 'b', 0), (0.5, 'a', 1), (1.0, 'a', 0)]
    """
    flat = [(value, name, c) for name, m in gates.items() for c, value in enumerate(m.tolist())]
    return sorted(flat, key=lambda entry: entry[0])


def sample(data: Examples, n: int, seed: int) -> Examples:
    """n records drawn at random, all if there are fewer. Raises SplitError for an empty part."""
    if not len(data):
        raise SplitError("there is no clean record to expose the model with")
    return data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n])
