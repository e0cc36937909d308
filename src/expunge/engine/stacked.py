"""Many models of one architecture trained in one pass: shadow models, retrained references, shards, heads, sweeps over seeds.

The weights of K models are stacked to (K, ...) tensors and one pass serves them all, so that what a step costs besides arithmetic is paid once:
a batched product per layer for chains of linear layers (heads, small MLPs), one vectorised forward (`torch.func`) for any other model. Every model
sees the batches it would see alone, and ends where it would end alone, up to rounding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import ScopeError, SettingError
from expunge.core.session import NORMS, Bound
from expunge.core.types import Batch, Batches, Records, Task
from expunge.modalities.classification import task as classification
from expunge.parts.updates.descend import HALF, SCHEDULES, clear, optimiser

CHUNK = 64
"""Most models in one stack; more are trained in turns."""

WINDOW = 2 << 20
"""Bytes of inputs that are gathered at once for the next steps."""

PLAN = 32
"""Least steps whose rows are drawn at once."""

COPY = 256 << 20
"""Most bytes of inputs of all parts that are copied side by side, so that one look-up serves all models; larger ones are looked up model by model."""

ALIGNED = 16
"""Numbers in 64 bytes: where each matrix of a stack begins at a multiple of that, the library's products do not depend on where in the stack it stands."""

SIMPLE = classification.classification()
"""The task whose batches are plain rows and whose gradient `_product` knows."""

Gradient = Callable[[dict[str, Tensor], dict[str, Tensor], Batch, Tensor | None], float]
"""(params, buffers, stacked batch, weights (K, B) or None for means) -> sum of the K losses; leaves the gradients in `.grad`."""


def train(
    models: Sequence[nn.Module], task: Task, parts: Sequence[Records], *, epochs: float, batch_size: int, seeds: Sequence[int], lr: float,
    schedule: str = "constant", chunk: int = CHUNK, alike: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Train `models` in place, model k on parts[k] with seeds[k], as `training.train` would one by one; leaves them in eval mode.

    options as for `parts.updates.descend.alternate` without clip. Parts may differ in length: a model takes as many steps as it would alone, under its own
    schedule, and leaves the stack after its last one. A batch that is shorter than another's of the same step is padded with rows of weight zero, so
    the loss of a record must not depend on the others of its batch. Raises SettingError for a module that draws random numbers in training (dropout),
    which a stack would draw differently, and for batch norm where a batch must be padded: choose parts of one length then.

    alike   every model ends with the same bits whatever is trained beside it: batches, inputs and inner layers are padded to multiples of ALIGNED. For chains
            of linear layers under a constant schedule, whose batched products do not depend on how many there are; SettingError for anything else
    """
    if not len(models) == len(parts) == len(seeds):
        raise SettingError(f"stacked training needs as many parts and seeds as models, not {len(parts)} and {len(seeds)} for {len(models)}")
    if schedule not in SCHEDULES:
        raise SettingError(f"schedule must be one of {', '.join(SCHEDULES)}, not '{schedule}'")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) for model in models[:1] for m in model.modules()):
        raise SettingError("a model with dropout cannot be trained in a stack: its masks would differ from those it draws alone")
    if not all(any(p.requires_grad for p in m.parameters()) for m in models):
        raise ScopeError("no weight of the models may move: all of them are frozen")
    if alike and schedule != "constant":
        raise SettingError(f"the bits of a stack depend on its members under schedule '{schedule}'; use constant, or train one by one")
    for k in range(0, len(models), chunk):
        mine, given = models[k : k + chunk], parts[k : k + chunk]
        wide, given = ([_widened(m) for m in mine], [_wide(part) for part in given]) if alike else (mine, given)
        batches = [task.batches(part, batch_size, epochs=epochs, seed=seed) for part, seed in zip(given, seeds[k : k + chunk], strict=True)]
        _train(wide, task, batches, lr, schedule, dict(options), (k, len(models)), _up(batch_size) if alike else 0)
        for model, trained in zip(mine, wide, strict=True):
            if trained is not model:
                _narrow(trained, model)


def _train(
    models: Sequence[nn.Module], task: Task, batches: Sequence[Batches], lr: float, schedule: str, options: dict[str, Any], where: tuple[int, int],
    width: int,
) -> None:  # fmt: skip
    settings = [options.pop(name, default) for name, default in (("optimizer", "sgd"), ("momentum", 0.0), ("weight_decay", 0.0))]
    if options:
        raise SettingError(f"stacked training has no option '{next(iter(options))}'")
    _padding(models[0], task, batches)
    product, rows = _product(models[0], task, batches), _rows(batches)
    if width and (product is None or rows is None):
        raise SettingError("the bits of a stack depend on its members unless they are chains of linear layers on rows in memory; train this model one by one")
    gradient = product or _vectorised(models[0], task)
    watch, total = guard.current(), max(len(b) for b in batches)
    live, step = list(range(len(models))), None
    for first, last in itertools.pairwise([0, *sorted({len(b) for b in batches})]):
        keep = [j for j, i in enumerate(live) if len(batches[i]) > first]
        live = [live[j] for j in keep]
        params, buffers = stack([models[i] for i in live])
        moving = [p for p in params.values() if p.requires_grad]
        step = _carry(step, optimiser(moving, settings[0], lr, *settings[1:], fused=not width), keep)  # a fused step rounds the last few weights otherwise
        for k, (batch, sizes) in enumerate(_draw([batches[i] for i in live], None if rows is None else (*rows[:2], rows[2][live]), first, last, width), first):
            weights = _weights(sizes, width) if width or min(sizes) < max(sizes) else None
            clear(moving)
            with watch.meter.pause():
                loss = gradient(params, buffers, batch, weights)
            watch.check_loss(loss / len(live), k, lr)
            _move(step, moving, [lr * SCHEDULES[schedule](k / len(batches[i])) for i in live])
            watch.meter.add(forward=sum(sizes), backward=sum(sizes))
            if watch.progress:
                watch.progress(f"{watch.label} {where[0] + len(models)} of {where[1]} models", k + 1, total)
        unstack([models[i] for i in live], params, buffers)


def _up(n: int) -> int:
    """The next multiple of ALIGNED.

    >>> _up(16), _up(17)
    (16, 32)
    """
    return -(-n // ALIGNED) * ALIGNED


def _widened(model: nn.Module) -> nn.Module:
    """A copy of a chain of linear layers whose inputs and inner layers are widened by zeros, which stay zero; any other model as it is."""
    layers = _chain(model)
    if layers is None or len({id(m) for _, m in layers}) < len(layers):
        return model
    wide = copy.deepcopy(model)
    linears = [m for _, m in _chain(wide) or () if isinstance(m, nn.Linear)]
    for m in linears:
        out = m.out_features if m is linears[-1] else _up(m.out_features)
        more = (0, _up(m.in_features) - m.in_features, 0, out - m.out_features)
        m.weight = nn.Parameter(F.pad(m.weight.detach(), more), m.weight.requires_grad)
        if m.bias is not None:
            m.bias = nn.Parameter(F.pad(m.bias.detach(), more[2:]), m.bias.requires_grad)
        m.in_features, m.out_features = m.weight.shape[1], out
    return wide


def _wide(part: Records) -> Records:
    """The part with the inputs of `_widened`: rows flattened and filled up with zeros."""
    x = part.x.flatten(1)
    return part if part.x.ndim == 2 and x.shape[1] == _up(x.shape[1]) else replace(part, x=F.pad(x, (0, _up(x.shape[1]) - x.shape[1])))


@torch.no_grad()
def _narrow(wide: nn.Module, model: nn.Module) -> None:
    """Write the weights of `_widened(model)` back into the model, and put it into eval mode."""
    for w, p in zip(wide.parameters(), model.parameters(), strict=True):
        p.copy_(w[tuple(slice(n) for n in p.shape)])
    model.eval()


def _padding(model: nn.Module, task: Task, batches: Sequence[Batches]) -> None:
    """Raises SettingError when a batch would have to be padded and its records are not independent of each other."""
    tied = [
        name for name, m in model.named_modules() if isinstance(m, NORMS) and (m.running_mean is not None or isinstance(m, nn.modules.batchnorm._BatchNorm))
    ]
    if not tied and not task.tied:
        return
    first = 0
    for last in sorted({len(b) for b in batches}):
        if any(len(set(sizes)) > 1 for sizes in _sizes([b for b in batches if len(b) >= last], first, last)):
            what = f"batch norm ('{tied[0]}')" if tied else "a contrastive loss"
            raise SettingError(
                f"parts of unequal lengths give batches that must be padded, which {what} would see; give parts of one length, or train one by one"
            )
        first = last


def _sizes(batches: Sequence[Batches], first: int, last: int) -> list[list[int]]:
    """Examples of every model's batch, for steps first..last - 1."""
    n, m = (torch.tensor(counts) for counts in ([len(b.data) for b in batches], [b.per_epoch for b in batches]))
    j = torch.arange(first, last)[:, None] % m
    return ((j + 1) * n // m - j * n // m).tolist()


def _weights(sizes: Sequence[int], width: int = 0) -> Tensor:
    """(K, B) float64: 1 / size on a model's own rows and 0 on those that pad its batch, up to `width` or the longest.

    >>> _weights([1, 2]).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    n = torch.tensor(sizes, dtype=torch.float64)[:, None]
    return (torch.arange(width or max(sizes)) < n) / n


def _draw(batches: Sequence[Batches], rows: tuple[Tensor, Tensor, Tensor] | None, first: int, last: int, width: int) -> Iterator[tuple[Batch, list[int]]]:
    """Batches first..last - 1 of all models as (K, B, ...) tensors, and each model's own number of rows; the rest of its rows repeat its first one.

    rows   what `_rows` gave for them
    """
    if rows is not None:
        yield from _gather(batches, *rows, first, last, width)
        return
    for k in range(first, last):
        each = [b[k] for b in batches]
        sizes = [len(r["i"]) for r in each]
        if len({tuple((name, t.shape[1:]) for name, t in r.items()) for r in each}) > 1:
            raise SettingError("stacked training needs batches of one shape; texts of unequal lengths must be trained one by one")
        yield {name: torch.stack([_pad(r[name], max(sizes)) for r in each]) for name in each[0]}, sizes


def _pad(rows: Tensor, width: int) -> Tensor:
    """(n, ...) -> (width, ...): the first row fills up."""
    return rows if len(rows) == width else torch.cat([rows, rows[:1].expand(width - len(rows), *rows.shape[1:])])


def _rows(batches: Sequence[Batches]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Inputs and targets of all parts, one after another, and (K,) where each part starts. None unless batches are rows of examples in memory as they
    are, of one shape, and all parts together are small enough for a copy (COPY)."""
    data = [b.data for b in batches if b.collate is classification.collate and b.data.augment is None and isinstance(b.data.x, Tensor) and b.data.x.ndim != 4]
    kinds = [{(t.shape[1:], t.dtype, t.device) for t in tensors} for tensors in ([d.x for d in data], [d.y for d in data])]
    if len(data) < len(batches) or any(len(kind) > 1 for kind in kinds) or sum(d.x.nbytes for d in data) > COPY:
        return None
    return torch.cat([d.x for d in data]), torch.cat([d.y for d in data]), torch.tensor([0, *itertools.accumulate(len(d) for d in data[:-1])])


def _gather(batches: Sequence[Batches], x: Tensor, y: Tensor, starts: Tensor, first: int, last: int, fixed: int) -> Iterator[tuple[Batch, list[int]]]:
    """`_draw` for plain rows: those of many steps by one look-up."""
    sizes = _sizes(batches, first, last)
    widths = [fixed or max(s) for s in sizes]
    window = max(1, WINDOW // max(1, len(batches) * max(widths) * x[0].nbytes))
    for start in range(0, len(sizes), max(PLAN, window)):
        some = widths[start : start + max(PLAN, window)]
        rows = torch.stack([torch.cat([_pad(b._epoch(k // b.per_epoch)[k % b.per_epoch], w) for k, w in enumerate(some, first + start)]) for b in batches])
        at = (rows + starts[:, None]).to(x.device)
        for k in range(0, len(some), window):
            cut = slice(sum(some[:k]), sum(some[: k + window]))
            index = torch.cat([block.reshape(-1) for block in at[:, cut].split(some[k : k + window], 1)])
            blocks = [t.index_select(0, index).split([len(batches) * w for w in some[k : k + window]]) for t in (x, y)]
            for n, (width, i, xs, ys) in enumerate(zip(some[k:], rows[:, cut].split(some[k : k + window], 1), *blocks, strict=False), start + k):
                yield {"x": xs.view(len(batches), width, *x.shape[1:]), "y": ys.view(len(batches), width, *y.shape[1:]), "i": i}, sizes[n]


def _vectorised(model: nn.Module, task: Task) -> Gradient:
    """Autograd through one vectorised forward: any model and task."""
    base = copy.deepcopy(model).train()

    def mean(p: dict[str, Tensor], b: dict[str, Tensor], batch: Batch) -> Tensor:
        return task.forward(Bound(base, {**p, **b}), batch).mean.mean()

    def weighted(p: dict[str, Tensor], b: dict[str, Tensor], batch: Batch, w: Tensor) -> Tensor:
        own = task.forward(Bound(base, {**p, **b}), batch).mean
        return (own * w.to(own)).sum()

    means, sums = vmap(mean), vmap(weighted)

    def gradient(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, weights: Tensor | None) -> float:
        total = (means(params, buffers, batch) if weights is None else sums(params, buffers, batch, weights)).sum()
        total.backward()
        return float(total.detach())

    return gradient


def _product(model: nn.Module, task: Task, batches: Sequence[Batches]) -> Gradient | None:
    """The gradient of cross-entropy by hand, one batched product per layer, for a linear layer or a chain of them with ReLU between (`nn.Sequential`).

        z = h W' + b,  p = softmax(z),  dL/dz = w (p - onehot(y)),  dL/dW = (dL/dz)' h,  dL/dh = (dL/dz) W,  behind a ReLU only where its output is above 0

    with w the weight of a row in its model's loss. None for anything else: another task, other layers, hooks, half precision, labels that are no classes.
    """
    layers = _chain(model)
    parts = [b.data for b in batches]
    if layers is None or task.forward is not SIMPLE.forward or not all(isinstance(data.x, Tensor) for data in parts):
        return None
    names, linears = [n for n, _ in layers], [m for _, m in layers if isinstance(m, nn.Linear)]
    flat = isinstance(layers[0][1], nn.Flatten)
    if {_name(n, p) for n, m in layers for p, _ in m.named_parameters()} != {n for n, _ in model.named_parameters()} or len(set(names)) < len(names):
        return None
    for data in parts:
        if data.y.ndim != 1 or data.y.dtype != torch.long or not 0 <= int(data.y.min()) <= int(data.y.max()) < linears[-1].out_features:
            return None
        if data.x.ndim < 2 or (data.x.ndim > 2 and not flat):
            return None
    if len({p.dtype for p in model.parameters()}) > 1 or linears[0].weight.dtype in HALF:
        return None

    if len(layers) == 1:
        return _head

    @torch.no_grad()
    def gradient(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, weights: Tensor | None) -> float:
        like = params[_name(names[-1], "weight")]
        h, y, seen = batch["x"].to(like), batch["y"].to(like.device)[..., None], []
        for name, layer in layers:
            seen.append(h)
            if isinstance(layer, nn.Linear):
                weight, bias = params[_name(name, "weight")].mT, params.get(_name(name, "bias"))
                h = torch.bmm(h, weight)
                h = h if bias is None else h.add_(bias[:, None])
            elif isinstance(layer, nn.ReLU):
                h = h.relu()
            elif isinstance(layer, nn.Flatten):
                h = h.flatten(2)
        logp = F.log_softmax(h, -1)
        own = logp.gather(-1, y).squeeze(-1)
        loss = own.mean(1).sum() if weights is None else (own * weights.to(own)).sum()
        down = torch.zeros_like(logp).scatter_(-1, y, -1 / y.shape[1] if weights is None else -weights.to(logp)[..., None])
        g = torch.ops.aten._log_softmax_backward_data(down, logp, -1, logp.dtype)
        lowest = min(k for k, (_, m) in enumerate(layers) if any(p.requires_grad for p in m.parameters()))
        for k in range(len(layers) - 1, lowest - 1, -1):
            name, layer = layers[k]
            if isinstance(layer, nn.ReLU):
                g = g.mul_(seen[k + 1] > 0)
            elif isinstance(layer, nn.Linear):
                weight, bias = params[_name(name, "weight")], params.get(_name(name, "bias"))
                if weight.requires_grad:
                    weight.grad = torch.bmm(g.mT, seen[k])
                if bias is not None and bias.requires_grad:
                    bias.grad = g.sum(1)
                if k > lowest:
                    g = torch.bmm(g, weight)
        return -float(loss)

    return gradient


@torch.no_grad()
def _head(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, weights: Tensor | None) -> float:
    """`_product` for one linear layer, with records as the last dimension: z = W x' is (K, C, B), which is several times faster for few classes."""
    (_, weight), *rest = params.items()
    x, y = batch["x"].to(weight), batch["y"].to(weight.device)[:, None]
    z = torch.bmm(weight, x.mT)
    logp = F.log_softmax(z.add_(rest[0][1][..., None]) if rest else z, 1)
    w = torch.full((), 1 / y.shape[2], dtype=logp.dtype, device=logp.device) if weights is None else weights.to(logp)[:, None]
    loss = (logp.gather(1, y) * w).sum()
    g = logp.exp_().scatter_add_(1, y, logp.new_full((), -1).expand(y.shape)).mul_(w)
    if weight.requires_grad:
        weight.grad = torch.bmm(g, x)
    if rest and rest[0][1].requires_grad:
        rest[0][1].grad = g.sum(2)
    return -float(loss)


def _name(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _chain(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Names and layers of a linear layer, or of an `nn.Sequential` of linear layers and ReLU that may begin with Flatten; None for another model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(m, h) for m in model.modules() for h in hooks):
        return None
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if type(m) is not nn.Sequential]
    kinds = [type(m) for _, m in found]
    head = bool(kinds) and kinds[0] is nn.Flatten and (found[0][1].start_dim, found[0][1].end_dim) == (1, -1)
    if nn.Linear not in kinds or kinds[-1] is not nn.Linear or any(kind not in (nn.Linear, nn.ReLU) for kind in kinds[head:]):
        return None
    return found


def _carry(old: torch.optim.Optimizer | None, new: torch.optim.Optimizer, keep: Sequence[int]) -> torch.optim.Optimizer:
    """`new`, over the models `keep` of those that `old` moves, goes on from the state of `old`."""
    if old is not None:
        with torch.no_grad():
            for a, b in zip(old.param_groups[0]["params"], new.param_groups[0]["params"], strict=True):
                b.copy_(a[keep])
                new.state[b] = {name: v[keep] if v.shape == a.shape else v for name, v in old.state[a].items()}
    return new


def _move(step: torch.optim.Optimizer, params: Sequence[Tensor], rates: Sequence[float]) -> None:
    """One step, model k at rates[k]. Every optimiser's step is linear in lr, so all are moved at the largest rate, and each is then put at its share of it."""
    top, masters = max(rates), step.param_groups[0]["params"]
    before = [p.detach().clone() for p in masters] if min(rates) < top else []
    step.param_groups[0]["lr"] = top
    step.step()
    with torch.no_grad():
        for p, m, old in zip(params, masters, before, strict=False):  # none where all have one rate
            share = torch.tensor(rates, dtype=m.dtype, device=m.device).div_(top).view(-1, *[1] * (m.ndim - 1))
            m.copy_(torch.lerp(old, m, share))
            if p is not m:
                p.copy_(m)


def stack(models: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters as (K, ...) leaves that require grad where those of the first model do, and buffers as (K, ...)."""
    own, held = [dict(m.named_parameters()) for m in models], [dict(m.named_buffers()) for m in models]
    params = {n: torch.stack([named[n].detach() for named in own]).requires_grad_(p.requires_grad) for n, p in own[0].items()}
    return params, {n: torch.stack([named[n] for named in held]) for n in held[0]}


def unstack(models: Sequence[nn.Module], params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Write slice k of every stack into model k, and put it into eval mode."""
    with torch.no_grad():
        for k, model in enumerate(models):
            for n, p in model.named_parameters():
                p.copy_(params[n][k])
            for n, b in model.named_buffers():
                b.copy_(buffers[n][k])
            model.eval()


def logits(models: Sequence[nn.Module], task: Task, data: Records, size: int = 500) -> Tensor:
    """(K, N, C) logits of all models in eval mode, in one pass per batch."""
    params, buffers = stack(models)
    base = copy.deepcopy(models[0]).eval()
    each = vmap(lambda p, b, batch: task.forward(Bound(base, {**p, **b}), batch).logits, in_dims=(0, 0, None))
    batches = task.batches(data, size)
    with torch.no_grad():
        return torch.cat([each(params, buffers, batches[k]).detach() for k in range(len(batches))], 1)
