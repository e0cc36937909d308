"""Does it come back? Attacks on the weights that need no forgotten record: rounding, pruning, averaging with the model before, training on retain.

Each is read as an excess: what the attacked candidate knows of the forget set, minus what retrained models know after the same attack. A
retrained model can relearn and be averaged too; only the difference is memory. Sources: cards open-problems (B2, B3, B4), audits-classification.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.distance import apart, closed
from expunge.audits.membership.losses import targets
from expunge.audits.unseen import same_form
from expunge.core import guard
from expunge.core.registry import check
from expunge.core.session import scratch
from expunge.core.stats import Z, auc, matched, wilson
from expunge.parts.reading import score
from expunge.parts.training import pace
from expunge.parts.updates.descend import descend

PRUNED = 0.3
"""Share of the weights of every matrix and convolution that is set to zero, by magnitude."""


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy with every matrix and convolution rounded to `bits` bits, symmetric, one scale per output channel, and back to floats.

    w' = s * round(w / s), s = max|w| / (2^(bits - 1) - 1)
    """
    twin = copy.deepcopy(model)
    for p in _weights(twin):
        rows = p.reshape(len(p), -1)
        s = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        p.copy_((s * (rows / s).round()).view_as(p))
    return twin


@torch.no_grad()
def pruned(model: nn.Module, share: float = PRUNED) -> nn.Module:
    """A copy with the smallest `share` of every matrix and convolution set to zero."""
    twin = copy.deepcopy(model)
    for p in _weights(twin):
        k = int(share * p.numel())
        if k:
            p.masked_fill_(p.abs() <= p.abs().flatten().kthvalue(k).values, 0)
    return twin


@torch.no_grad()
def averaged(model: nn.Module, other: nn.Module) -> nn.Module:
    """A copy with the mean of both models' weights and floating buffers."""
    twin, theirs = copy.deepcopy(model), other.state_dict()
    twin.load_state_dict({n: (t + theirs[n]) / 2 if t.is_floating_point() else t for n, t in twin.state_dict().items()})
    return twin


def _weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.ndim >= 2]


ATTACKS: dict[str, Callable[[Probe, nn.Module], nn.Module]] = {
    "none": lambda p, model: model,
    "int8": lambda p, model: rounded(model, 8),
    "int4": lambda p, model: rounded(model, 4),
    "prune": lambda p, model: pruned(model),
    "average": lambda p, model: averaged(model, p.before),
}
"""Name -> attacked copy. `none` is the unattacked excess, which the others are read beside."""


def recalled(p: Probe, model: nn.Module) -> tuple[float, float, int]:
    """(value, half-width of its 90 % interval, n): what a model still knows of the forget set.

    A removed class: accuracy on forget. Records: AUC of forget losses against those of matched test records.
    """
    mine = score(model, p.task, p.split.forget)
    if p.removed():
        value, low, high = wilson(int(mine.correct.sum()), len(mine.nll))
    else:
        test = score(model, p.task, p.split.test)
        drawn, _ = matched(targets(mine), targets(test), p.seed)
        value, low, high = auc(test.nll[drawn], mine.nll)
    return value, (high - low) / 2, len(mine.nll)


def excess(mine: tuple[float, float, int], rest: list[tuple[float, float, int]], name: str, note: str) -> Row:
    """One row: the candidate's value minus the mean of the retrained models', their errors added in squares, with the spread between models."""
    centre = sum(r[0] for r in rest) / len(rest)
    between = torch.tensor([r[0] for r in rest]).var(correction=1).item() if len(rest) > 1 else 0.0
    width = (mine[1] ** 2 + sum(r[1] ** 2 for r in rest) / len(rest) ** 2 + Z * Z * between * (1 + 1 / len(rest))) ** 0.5
    value = mine[0] - centre
    return Row(name, value, value - width, value + width, mine[2], f"{note}; retrained models read {centre:.3g} after the same attack")


@check(tasks=("classification", "causal_lm"), needs=("forget", "test"), reference=True)
def restore(p: Probe) -> list[Row]:
    """restore.none, .int8, .int4, .prune, .average: excess of what is known of the forget set over retrained models, after each attack."""
    what = "accuracy on forget" if p.removed() else "AUC of forget losses"
    rows = []
    for name, attack in ATTACKS.items():

        def read(model: nn.Module, name: str = name, attack: Callable = attack) -> tuple[float, float, int]:
            return p.once(("restore", name, id(p.before), p.seed), model, lambda: recalled(p, attack(p, model)))

        mine = read(p.after)
        row = excess(mine, [read(r) for r in p.references], f"restore.{name}", f"{what} {mine[0]:.3g}")
        rows.append(apart_from_one(row) if name == "average" and len(p.references) == 1 else row)
    return rows


def apart_from_one(row: Row) -> Row:
    """The row, its interval open to both sides: what the mean of two models that were trained apart still knows differs too much between retrained models (on
    MNIST from 0 to 0.8 of a removed class, with a standard deviation of 0.2) to be read against one of them."""
    return replace(row, low=-1.0, high=1.0, note=f"{row.note}; it differs much between retrained models, and there is one: give a second")


@check(tasks=("classification", "causal_lm"), needs=("forget", "retain", "test"), reference=True, slow=True)
def benign(p: Probe) -> list[Row]:
    """restore.retain: excess of what is known of the forget set after 32 steps on retain alone, as a later user would fine-tune. restore.closed: share of the
    way from the original to the references, all of them after these steps:

        1 - (D(after) - F) / (D(before) - F),   D(model) = mean over forget of (margin - mean margin of references)^2

    with F as `audits.distance.closed` has it. 0 for doing nothing, 1 for a retrained model.
    """
    u = same_form(p) if len(p.references) == 1 else None

    def read(model: nn.Module) -> tuple[tuple[float, float, int], Tensor, Tensor]:
        twin = copy.deepcopy(model).requires_grad_(True)
        s, data = scratch(twin), p.split.retain
        with guard.watching(guard.Guard()):
            s.eval()
            batches = p.task.batches(data, 32, epochs=32 / -(-len(data) // 32), seed=p.seed)
            descend(s, lambda batch: p.task.forward(twin, batch).mean.mean(), batches, **pace(p.task, twin))
        margin = score(twin, p.task, p.split.forget).margin
        return recalled(p, twin), margin, margin[:0] if u is None else score(twin, p.task, u.data).margin

    def after(model: nn.Module) -> tuple[tuple[float, float, int], Tensor, Tensor]:
        return p.once(("benign", p.seed, len(p.references) == 1), model, lambda: read(model))

    mine, original, *rest = (after(model) for model in (p.after, p.before, *p.references[:3]))
    note = "32 steps on retain"
    return [
        excess(mine[0], [r[0] for r in rest], "restore.retain", note),
        closed("restore.closed", mine[1], original[1], torch.stack([r[1] for r in rest]), p.seed, note, apart(p, lambda m: after(m)[2]) if u else None),
    ]
