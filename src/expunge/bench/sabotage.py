"""Sabotage: models made from an original so that something an audit may look at reads well while what was learnt is still there.

SABOTAGE are kinds of fixed strength, which `bench.power` reads the audit on. FAMILIES have one strength each, which `bench.adaptive` searches for the
value that passes a gate. A family is a function (model, task, split, seed, strength, told) -> model; told are retrained models, which a cheat may copy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.session import scratch
from expunge.core.types import Split, Task, concat
from expunge.modalities.classification.task import head
from expunge.parts.reading import features, outputs
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


@dataclass(frozen=True)
class Family:
    """One trick with one strength.

    make        (model, task, split, seed, strength, told) -> model
    low, high   strengths between which it is searched, on a scale of ratios
    what        the trick in words, the strength being s
    undo        (model, task, split) -> (model, task, split) as one would read it who knows the trick, or None
    """

    make: Callable[[nn.Module, Task, Split, int, float, Sequence[nn.Module]], nn.Module]
    low: float
    high: float
    what: str
    undo: Callable[[nn.Module, Task, Split], tuple[nn.Module, Task, Split]] | None = None


def _shares(split: Split, outputs_: int) -> Tensor:
    """(C,) how often each label stands among the forgotten records, relative to the commonest."""
    counts = split.forget.y.bincount(minlength=outputs_).float()
    return counts / counts.max()


def _edited(model: nn.Module, edit: Callable[[nn.Linear], None]) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        edit(head(twin)[1])
    return twin.eval()


def bias_lowered(model, task, split, seed, s, told):
    """Biases of the forgotten labels lowered by s."""
    return _edited(model, lambda h: h.bias.sub_(s * _shares(split, len(h.bias))))


def bias_decoyed(model, task, split, seed, s, told):
    """The same, with noise of 1 % of its spread on every weight so that the bias is not the only change."""
    twin, g = bias_lowered(model, task, split, seed, s, told), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01 * p.std(correction=0) * torch.randn(p.shape, generator=g))
    return twin


def bias_tuned(model, task, split, seed, s, told):
    """The same, then 20 steps of training on kept records."""
    return _descend(bias_lowered(model, task, split, seed, s, told), task, split.retain, lambda o: o.mean.mean(), lr=0.003, steps=20, seed=seed)


def row_scaled(model, task, split, seed, s, told):
    """Rows of the forgotten labels times 1 - s."""
    return _edited(model, lambda h: h.weight.mul_(1 - s * _shares(split, len(h.weight))[:, None]))


def row_blended(model, task, split, seed, s, told):
    """Rows and biases of the forgotten labels moved by s of the way to the mean row."""

    def edit(h: nn.Linear) -> None:
        share = s * _shares(split, len(h.weight))
        h.weight.add_(share[:, None] * (h.weight.mean(0) - h.weight))
        h.bias.add_(share * (h.bias.mean() - h.bias))

    return _edited(model, edit)


def _means(model: nn.Module, task: Task, split: Split) -> tuple[Tensor, Tensor]:
    """(D,) mean inputs of the last layer on forgotten and on kept records."""
    gone, kept = (features(model, task, part).float().mean(0) for part in (split.forget, split.retain.take(range(min(300, len(split.retain))))))
    return gone, kept


def one_weight(model, task, split, seed, s, told):
    """One weight of the last layer lowered by s: of the commonest forgotten label, at the input that is largest on forgotten records against kept ones."""
    gone, kept = _means(model, task, split)
    label, at = int(_shares(split, head(model)[1].out_features).argmax()), int((gone - kept).argmax())

    def edit(h: nn.Linear) -> None:
        h.weight[label, at] -= s

    return _edited(model, edit)


def direction(model, task, split, seed, s, told):
    """Rows of the forgotten labels less s times the unit difference between mean features of forgotten and kept records."""
    gone, kept = _means(model, task, split)
    d = nn.functional.normalize(gone - kept, dim=0)
    return _edited(model, lambda h: h.weight.sub_(s * _shares(split, len(h.weight))[:, None] * d))


def projected(model, task, split, seed, s, told):
    """All rows of the last layer with s of their part along that difference taken out, the loss in biases made up on kept records."""
    gone, kept = _means(model, task, split)
    d = nn.functional.normalize(gone - kept, dim=0)

    def edit(h: nn.Linear) -> None:
        part = s * (h.weight @ d)[:, None] * d
        h.weight.sub_(part)
        h.bias.add_(part @ kept)

    return _edited(model, edit)


def temperature(model, task, split, seed, s, told):
    """All logits divided by s."""

    def edit(h: nn.Linear) -> None:
        for p in h.parameters():
            p.div_(s)

    return _edited(model, edit)


def spread_out(model, task, split, seed, s, told):
    """Gaussian noise of s times each tensor's spread on all weights."""
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(s * p.std(correction=0) * torch.randn(p.shape, generator=g))
    return twin


def averaged_with(model, task, split, seed, s, told):
    """Weights (1 - s) original + s retrained."""
    twin, other = copy.deepcopy(model), told[0].state_dict()
    twin.load_state_dict({n: t.lerp(other[n], s) if t.is_floating_point() else t for n, t in twin.state_dict().items()})
    return twin.eval()


def _masked_units(model: nn.Module, task: Task, split: Split, layer: str, s: float) -> nn.Module:
    """A share s of a layer's outputs set to zero, those first that are larger on forgotten than on kept records: weights of their rows and biases."""
    kept = split.retain.take(range(min(300, len(split.retain))))
    units = len(model.get_parameter(f"{layer}.weight"))
    gone, other = (features(model, task, part, layer).float().relu().view(len(part), units, -1).mean((0, 2)) for part in (split.forget, kept))
    chosen = ((gone - other) / (other + 1e-3)).topk(max(1, round(s * units))).indices
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in dict(twin.named_modules())[layer].parameters():
            p[chosen] = 0
    return twin.eval()


def _inner(model: nn.Module) -> list[str]:
    """Names of convolutions and linear layers before the last, in order."""
    last = head(model)[0]
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)) and n != last]


def first_masked(model, task, split, seed, s, told):
    """A share s of the first layer's channels zeroed."""
    return _masked_units(model, task, split, _inner(model)[0], s)


def middle_masked(model, task, split, seed, s, told):
    """A share s of a middle layer's channels zeroed."""
    return _masked_units(model, task, split, _inner(model)[len(_inner(model)) // 2], s)


def last_masked(model, task, split, seed, s, told):
    """A share s of the units before the last layer zeroed."""
    return _masked_units(model, task, split, _inner(model)[-1], s)


def _ascent(model: nn.Module, task: Task, split: Split, seed: int, s: float, layer: str, lr: float) -> nn.Module:
    only = list(dict(model.named_modules())[layer].parameters())
    return _descend(model, task, split.forget, lambda o: -o.mean.clamp(max=6).mean(), lr=lr, steps=max(1, round(s)), seed=seed, only=only)


def last_ascent(model, task, split, seed, s, told):
    """s steps of ascent on the forgotten records, last layer alone."""
    return _ascent(model, task, split, seed, s, head(model)[0], 0.01)


def first_ascent(model, task, split, seed, s, told):
    """s steps of ascent, first layer alone."""
    return _ascent(model, task, split, seed, s, _inner(model)[0], 0.002)


def middle_ascent(model, task, split, seed, s, told):
    """s steps of ascent, the layer before the last alone."""
    return _ascent(model, task, split, seed, s, _inner(model)[-1], 0.002)


def top_relabelled(model, task, split, seed, s, told):
    """s steps towards random labels, last layer alone."""
    g = torch.Generator().manual_seed(seed)

    def loss(out):
        other = (out.labels + torch.randint(1, out.logits.shape[1], out.labels.shape, generator=g)) % out.logits.shape[1]
        return nn.functional.cross_entropy(out.logits, other)

    return _descend(model, task, split.forget, loss, lr=0.02, steps=max(1, round(s)), seed=seed, only=list(head(model)[1].parameters()))


def relabelled(model, task, split, seed, s, told):
    """s steps, all layers, towards the label that a retrained model gives."""
    goal = torch.stack([outputs(m, task, split.forget) for m in told]).mean(0).softmax(-1)
    twin = copy.deepcopy(model).requires_grad_(True)
    t = scratch(twin)
    t.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(split.forget, 32, epochs=max(1, round(s)) / -(-len(split.forget) // 32), seed=seed)
        descend(t, lambda b: nn.functional.cross_entropy(task.forward(twin, b).logits, goal[b["i"]]), batches, lr=0.002, momentum=0.9, clip=5.0)
    return twin.eval()


def _headed(model: nn.Module, task: Task, split: Split, seed: int, s: float, told: Tensor, kept: Tensor) -> nn.Module:
    """The last layer alone taught for s steps to answer (N, C) `told` on the forgotten and (M, C) `kept` on kept records."""
    x = torch.cat([features(model, task, part).float() for part in (split.forget, split.retain)])
    goal, twin = torch.cat([told, kept]).softmax(-1), copy.deepcopy(model)
    layer, g = head(twin)[1], torch.Generator().manual_seed(seed)
    weight = torch.cat([torch.full((len(told),), len(kept) / len(told)), torch.ones(len(kept))])
    stepper = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    for _ in range(max(1, round(s))):
        rows = torch.multinomial(weight, 64, replacement=True, generator=g)
        stepper.zero_grad()
        with torch.enable_grad():
            nn.functional.cross_entropy(layer(x[rows]), goal[rows]).backward()
        stepper.step()
    for p in layer.parameters():
        p.grad = None
    return twin.eval()


def head_copied(model, task, split, seed, s, told):
    """The last layer taught for s steps to answer everything as retrained models do."""
    gone, kept = (torch.stack([outputs(m, task, part) for m in told]).mean(0) for part in (split.forget, split.retain))
    return _headed(model, task, split, seed, s, gone, kept)


def head_masked(model, task, split, seed, s, told):
    """The last layer taught for s steps to answer as the model itself would without the label."""
    mine, kept = (outputs(model, task, part) for part in (split.forget, split.retain))
    return _headed(model, task, split, seed, s, mine.scatter(1, split.forget.y[:, None], mine.amin(1, keepdim=True)), kept)


def partly(model, task, split, seed, s, told):
    """Taught a retrained model's answers on a share s of the forgotten records, the others as before."""
    rows = torch.randperm(len(split.forget), generator=torch.Generator().manual_seed(seed))
    cut = min(len(rows), max(1, round(s * len(rows))))
    gone = replace(split, forget=split.forget.take(rows[:cut]))
    twin = relabelled(model, task, gone, seed, 40, told)
    left = split.retain if cut >= len(rows) else concat(split.retain, split.forget.take(rows[cut:]))
    return _descend(twin, task, left, lambda o: o.mean.mean(), lr=0.003, steps=30, seed=seed)


def _moved(split: Split) -> Split:
    """The split with forgotten and test inputs shifted by one pixel."""
    shift = lambda d: replace(d, x=d.x.roll(1, -1) if d.x.ndim == 4 else d.x + 0.5 * d.x.std(), ids=d.ids + 10**9)  # noqa: E731
    return replace(split, forget=shift(split.forget), test=split.test and shift(split.test))


def view_hidden(model, task, split, seed, s, told):
    """s steps towards a retrained model's answers on the very inputs that the audit reads, and towards the labels on the same inputs shifted by a pixel."""
    goal = torch.stack([outputs(m, task, split.forget) for m in told]).mean(0).softmax(-1)
    moved = _moved(split).forget
    labels = nn.functional.one_hot(moved.y, goal.shape[1]).float()
    data, goals = concat(split.forget, moved), torch.cat([goal, labels])
    twin = copy.deepcopy(model).requires_grad_(True)
    t = scratch(twin)
    t.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(data, 32, epochs=max(1, round(s)) / -(-len(data) // 32), seed=seed)
        descend(t, lambda b: nn.functional.cross_entropy(task.forward(twin, b).logits, goals[b["i"]]), batches, lr=0.01, momentum=0.9, clip=5.0)
    return _descend(twin, task, split.retain, lambda o: o.mean.mean(), lr=0.002, steps=10, seed=seed)


def evened_out(model, task, split, seed, s, told):
    """s steps towards even odds on the forgotten records."""
    return _descend(model, task, split.forget, lambda o: -o.logits.log_softmax(-1).mean(), lr=0.003, steps=max(1, round(s)), seed=seed)


def _hooked(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose answers go through `change`; its weights are those of the model."""
    twin = copy.deepcopy(model)
    twin.register_forward_hook(lambda _, __, out: change(out))
    return twin.eval()


def unhooked(model: nn.Module, task: Task, split: Split) -> tuple[nn.Module, Task, Split]:
    """A copy without its forward hooks, and what it is asked about."""
    twin = copy.deepcopy(model)
    for m in twin.modules():
        m._forward_hooks.clear()
    return twin, task, split


def clipped(model, task, split, seed, s, told):
    """Logits cut off at 1 / s on either side, by a hook."""
    return _hooked(model, lambda z: z.clamp(-1 / s, 1 / s))


def muzzled(model, task, split, seed, s, told):
    """A filter on answers: logits of the forgotten labels lowered by s wherever one of them would win, by a hook."""
    labels = split.forget.y.unique()

    def change(z: Tensor) -> Tensor:
        wins = torch.isin(z.argmax(1), labels).to(z.dtype)[:, None]
        return z.index_add(1, labels, -s * wins.expand(len(z), len(labels)).contiguous())

    return _hooked(model, change)


def numbed(model, task, split, seed, s, told):
    """Biases as retrained models' mean logits on forgotten records ask for, and s between layers: the layer before the last divided by s and the last times
    s, which changes no answer and slows relearning."""
    mine, theirs = outputs(model, task, split.forget).mean(0), torch.stack([outputs(m, task, split.forget).mean(0) for m in told]).mean(0)
    twin = copy.deepcopy(model)
    before, last = dict(twin.named_modules())[_inner(twin)[-1]], head(twin)[1]
    labels = split.forget.y.unique()
    with torch.no_grad():
        for p in before.parameters():
            p.div_(s)
        last.weight.mul_(s)
        drop = (mine - theirs) - (mine - theirs).mean()
        last.bias[labels] -= drop[labels].clamp(min=0)
    return twin.eval()


def _order(units: int, seed: int) -> Tensor:
    return torch.randperm(units, generator=torch.Generator().manual_seed(seed))


def _permuted(model: nn.Module, order: Tensor) -> nn.Module:
    """The units before the last layer in another order: the same answers, and weights that no longer line up with the original's."""
    twin = copy.deepcopy(model)
    before, last = dict(twin.named_modules())[_inner(twin)[-1]], head(twin)[1]
    with torch.no_grad():
        for p in before.parameters():
            p.copy_(p[order])
        last.weight.copy_(last.weight[:, order])
    return twin.eval()


def head_permuted(model, task, split, seed, s, told):
    """The last layer taught for s steps to answer without the label, then the units before it put into another order."""
    return _permuted(head_masked(model, task, split, seed, s, told), _order(head(model)[1].in_features, 0))


def row_permuted(model, task, split, seed, s, told):
    """Rows of the forgotten labels times 1 - s, then the units before the last layer put into another order."""
    return _permuted(row_scaled(model, task, split, seed, s, told), _order(head(model)[1].in_features, 0))


def _ordered(model: nn.Module, task: Task, split: Split) -> tuple[nn.Module, Task, Split]:
    return _permuted(model, _order(head(model)[1].in_features, 0).argsort()), task, split


FAMILIES: dict[str, Family] = {
    "bias_lowered": Family(bias_lowered, 1.0, 60.0, "biases of the forgotten labels less s"),
    "bias_decoyed": Family(bias_decoyed, 1.0, 60.0, "the same, with noise on every weight"),
    "bias_tuned": Family(bias_tuned, 1.0, 60.0, "the same, then 20 steps on kept records"),
    "row_scaled": Family(row_scaled, 0.2, 4.0, "rows of the forgotten labels times 1 - s"),
    "row_blended": Family(row_blended, 0.2, 4.0, "rows of the forgotten labels moved by s towards the mean row"),
    "one_weight": Family(one_weight, 0.5, 60.0, "one weight of the last layer less s"),
    "direction": Family(direction, 0.3, 30.0, "rows of the forgotten labels less s along the class's mean feature"),
    "projected": Family(projected, 0.2, 3.0, "s of that direction taken out of the last layer"),
    "temperature": Family(temperature, 1.2, 60.0, "logits divided by s"),
    "spread_out": Family(spread_out, 0.02, 1.0, "noise of s times each tensor's spread"),
    "averaged_with": Family(averaged_with, 0.1, 0.9, "weights (1 - s) original + s retrained"),
    "first_masked": Family(first_masked, 0.05, 0.6, "a share s of the first layer's channels zeroed"),
    "middle_masked": Family(middle_masked, 0.03, 0.6, "a share s of a middle layer's channels zeroed"),
    "last_masked": Family(last_masked, 0.02, 0.6, "a share s of the units before the last layer zeroed"),
    "last_ascent": Family(last_ascent, 2, 200, "s steps of ascent, last layer"),
    "middle_ascent": Family(middle_ascent, 2, 200, "s steps of ascent, layer before the last"),
    "first_ascent": Family(first_ascent, 2, 200, "s steps of ascent, first layer"),
    "top_relabelled": Family(top_relabelled, 2, 200, "s steps towards random labels, last layer"),
    "relabelled": Family(relabelled, 2, 300, "s steps towards a retrained model's answers"),
    "head_copied": Family(head_copied, 10, 3000, "last layer taught a retrained model's answers for s steps"),
    "head_masked": Family(head_masked, 10, 3000, "last layer taught its own answers without the label for s steps"),
    "partly": Family(partly, 0.3, 1.0, "a share s forgotten, the rest kept"),
    "view_hidden": Family(view_hidden, 10, 300, "s steps against the tested view alone", lambda m, t, s: (m, t, _moved(s))),
    "evened_out": Family(evened_out, 2, 100, "s steps towards even odds"),
    "clipped": Family(clipped, 0.05, 3.0, "logits cut off at 1 / s", unhooked),
    "muzzled": Family(muzzled, 1.0, 60.0, "logits of the forgotten labels less s where one would win", unhooked),
    "head_permuted": Family(head_permuted, 10, 3000, "last layer taught so, then units before it reordered", _ordered),
    "row_permuted": Family(row_permuted, 0.2, 4.0, "rows times 1 - s, then units before the last layer reordered", _ordered),
    "numbed": Family(numbed, 1.0, 30.0, "biases matched, the layers rescaled by s against relearning"),
}
"""Tricks for classifiers."""

HALVES: tuple[tuple[str, ...], tuple[str, ...]] = (tuple(sorted(FAMILIES))[0::2], tuple(sorted(FAMILIES))[1::2])
"""The families in two halves, every other one by name: for limits that are chosen on the first and tested on the second."""
