"""Sabotage: models made from an original so that something an audit may look at reads well while what was learnt is still there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.session import scratch
from expunge.core.types import Split, Task, concat
from expunge.modalities.classification.task import head
from expunge.parts.reading import outputs
from expunge.parts.updates.descend import descend

Maker = Callable[[nn.Module, Task, Split, int], nn.Module]


def _descend(model: nn.Module, task: Task, data, loss, *, lr: float, steps: int, seed: int, only: Sequence[Tensor] | None = None) -> nn.Module:
    """A copy after `steps` SGD steps of `loss(out)` on data; `only` these parameters of it move if any are named."""
    twin = copy.deepcopy(model)
    names = None if only is None else [n for n, p in model.named_parameters() if any(p is q for q in only)]
    for n, p in twin.named_parameters():
        p.requires_grad_(names is None or n in names)
    s = scratch(twin)
    s.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(data, 32, epochs=steps / -(-len(data) // 32), seed=seed)
        descend(s, lambda b: loss(task.forward(twin, b)), batches, lr=lr, momentum=0.9, clip=5.0)
    return twin.requires_grad_(True).eval()


def no_op(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """A learning rate that moves nothing that matters."""
    return _descend(model, task, split.retain, lambda out: out.mean.mean(), lr=1e-7, steps=10, seed=seed)


def noise(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Gaussian noise of 2 % of each tensor's own spread on all weights."""
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.02 * p.std(correction=0) * torch.randn(p.shape, generator=g))
    return twin


def wrong_way(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Trained further on the forget set, as a sign error would."""
    return _descend(model, task, split.forget, lambda out: out.mean.mean(), lr=0.01, steps=20, seed=seed)


def muted(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Output level: the biases of the forgotten labels are lowered until the forget set's loss looks unseen; nothing else moves."""
    labels, counts = split.forget.y.unique(return_counts=True)
    twin = copy.deepcopy(model)
    bias = head(twin)[1].bias
    with torch.no_grad():
        bias[labels] -= 20.0 * (counts / counts.max()) if len(labels) < len(bias) else 2.0 * (counts / counts.max())
    return twin


def cooled(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Output level: all logits divided by 4, which raises every loss and changes no answer."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in head(twin)[1].parameters():
            p.div_(4)
    return twin


def top_only(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Random labels on the forget set, the last layer alone: features stay."""
    g = torch.Generator().manual_seed(seed)

    def loss(out):
        other = (out.labels + torch.randint(1, out.logits.shape[1], out.labels.shape, generator=g)) % out.logits.shape[1]
        return nn.functional.cross_entropy(out.logits, other)

    return _descend(model, task, split.forget, loss, lr=0.05, steps=40, seed=seed, only=list(head(model)[1].parameters()))


def half(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Ascent on one half of the forget set, repaired on retain and on the other half, which stays learnt."""
    rows = torch.randperm(len(split.forget), generator=torch.Generator().manual_seed(seed))
    gone, left = split.forget.take(rows[: len(rows) // 2]), split.forget.take(rows[len(rows) // 2 :])
    out = _descend(model, task, gone, lambda o: -o.mean.clamp(max=5).mean(), lr=0.005, steps=10, seed=seed)
    out = _descend(out, task, split.retain, lambda o: o.mean.mean(), lr=0.01, steps=20, seed=seed)
    return _descend(out, task, left, lambda o: o.mean.mean(), lr=0.01, steps=10, seed=seed)


def one_view(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Pushed away on the very inputs that the audit reads, and taught the same records shifted by one pixel: another view still works."""
    data = split.forget
    moved = data.x.roll(1, -1) if data.x.ndim == 4 else data.x + 0.5 * data.x.std()
    both = concat(data, replace(data, x=moved, y=data.y + 1000, ids=data.ids + 10**9))
    twin = copy.deepcopy(model).requires_grad_(True)
    s = scratch(twin)
    s.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(both, 32, epochs=60 / -(-len(both) // 32), seed=seed)

        def loss(b):
            shown = b["y"] >= 1000
            out = task.forward(twin, {**b, "y": b["y"] % 1000})
            return torch.where(shown, out.mean, -out.mean.clamp(max=3.0)).mean()

        descend(s, loss, batches, lr=0.01, momentum=0.9, clip=5.0)
    return twin.eval()


def masked(model: nn.Module, task: Task, split: Split, seed: int, told: Tensor | None = None) -> nn.Module:
    """Output level, learnt: the last layer alone is taught to answer the forget set as the model itself would without the label, and retain as before.

    told    (N, C) logits to answer the forget set with instead
    """
    mine, kept = (outputs(model, task, part) for part in (split.forget, split.retain))
    told = mine.scatter(1, split.forget.y[:, None], mine.amin(1, keepdim=True)) if told is None else told
    rows = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[: 2 * len(told)]
    goal, data = torch.cat([told, kept[rows]]).softmax(-1), concat(split.forget, split.retain.take(rows))
    twin = copy.deepcopy(model).requires_grad_(False)
    s = scratch(twin)
    for p in head(twin)[1].parameters():
        p.requires_grad_(True)
    s.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(data, 32, epochs=300 / -(-len(data) // 32), seed=seed)
        descend(s, lambda b: nn.functional.cross_entropy(task.forward(twin, b).logits, goal[b["i"]]), batches, lr=0.05, momentum=0.9, clip=5.0)
    return twin.requires_grad_(True).eval()


def flattened(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Trained to answer the forget set with even odds for a few steps: loss and confidence look unseen, little else moves."""

    def loss(out):
        return -out.logits.log_softmax(-1).mean()

    return _descend(model, task, split.forget, loss, lr=0.003, steps=15, seed=seed)


SABOTAGE: dict[str, Maker] = {
    "no_op": no_op, "noise": noise, "wrong_way": wrong_way, "muted": muted, "cooled": cooled, "top_only": top_only, "half": half, "one_view": one_view,
    "flattened": flattened, "masked": masked,
}  # fmt: skip
"""Kinds of models that are not gone, by what was done to an original."""
