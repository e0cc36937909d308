"""Which slices of the network a record's loss depends on: conditional dependence T and greedy selection by it. Card lcodec, steps 1 and 2.

A slice is one filter of a convolution or one row of a linear layer, with its bias. T is 0 where Z tells nothing about Y (given X) and 1 where
it tells all, as n grows; on a finite sample it scatters about that and can be below 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expunge.core.errors import ScopeError, SettingError
from expunge.core.guard import quiet
from expunge.core.types import Batch, Scope, Task

CHUNK = 512
"""Perturbed copies passed through the network at once."""


def nearest(z: Tensor) -> Tensor:
    """(..., n) position of the nearest other point of n points on a line, ties to the lower position; z (..., n). By sorting.

    >>> nearest(torch.tensor([1.0, 2.0, 3.0, 5.0]))
    tensor([1, 0, 1, 2])
    """
    # stable sorting leaves equal points in order of position, so that the lowest of a run of equals stands first in it
    order = z.argsort(dim=-1, stable=True)
    s = z.gather(-1, order)
    n, wide = z.shape[-1], torch.full_like(s[..., :1], torch.inf)
    gap = s.diff(dim=-1)
    left, right = torch.cat([wide, gap], -1), torch.cat([gap, wide], -1)
    place = torch.arange(n, device=z.device).expand_as(order)
    start = torch.where(left == 0, 0, place).cummax(-1).values
    head = order.gather(-1, start)
    second = order.gather(-1, (start + 1).clamp(max=n - 1))
    before = head.gather(-1, (place - 1).clamp(min=0))
    after = order.gather(-1, (place + 1).clamp(max=n - 1))
    apart = torch.where(left == right, torch.minimum(before, after), torch.where(left < right, before, after))
    # a point with equals has its nearest among them: the lowest of them, or the second lowest if it is the lowest itself
    twin = (left == 0) | (right == 0)
    near = torch.where(twin, torch.where(place == start, second, head), apart)
    return torch.empty_like(near).scatter(-1, order, near)


def _nearest_of(squares: Tensor) -> Tensor:
    """(..., n) position of the nearest other point for squared distances (..., n, n), ties to the lower position."""
    # the diagonal is put out of reach in place: callers pass distances that they made for this alone
    squares.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return squares.argmin(-1)


def _squares(x: Tensor) -> Tensor:
    """(p, n, n) squared differences of p columns (n, p)."""
    return (x.T[:, :, None] - x.T[:, None, :]).square_()


def ranks(y: Tensor) -> tuple[Tensor, Tensor]:
    """R_i = how many values are at most Y_i, L_i = how many are at least Y_i, (n,); without ties R is the rank and L = n + 1 - R.

    >>> ranks(torch.tensor([10.0, 30.0, 20.0]))
    (tensor([1, 3, 2]), tensor([3, 1, 2]))
    """
    y = y.contiguous()
    s = y.sort().values
    return torch.searchsorted(s, y, right=True), len(y) - torch.searchsorted(s, y)


def dependence(y: Tensor, z: Tensor, x: Tensor | None = None) -> Tensor:
    """T(Y, Z), or T(Y, Z | X): of Y (n,) on each candidate of Z (n, p) alone, or given X (n, q); float64 (p,), or () for Z (n,).

        T(Y, Z)   = sum_i (n min(R_i, R_M(i)) - L_i^2) / sum_i L_i (n - L_i)                    M(i) nearest of i in Z
        T(Y, Z|X) = sum_i (min(R_i, R_M(i)) - min(R_i, R_N(i))) / sum_i (R_i - min(R_i, R_N(i)))    N(i) nearest in X, M(i) in (X, Z)

    0 where the denominator is 0: Y is constant, or X leaves nothing to tell. Raises SettingError for fewer than two points or unequal lengths.

    >>> float(dependence(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])))
    -0.2
    """
    n, columns = len(y), z[:, None] if z.ndim == 1 else z
    if n < 2 or len(z) != n or (x is not None and len(x) != n):
        raise SettingError(f"dependence needs at least two points, as many of each; found {n}, {len(z)}{'' if x is None else f' and {len(x)}'}")
    r, l = ranks(y)  # noqa: E741
    if x is None:
        near = r[nearest(columns.T)].minimum(r)
        top, bottom = n * near.sum(-1) - l.square().sum(), (l * (n - l)).sum()
    else:
        given = _squares(x.reshape(n, -1)).sum(0)
        near = torch.stack([r[_nearest_of(given + s)].minimum(r).sum() for s in map(_square, columns.T)])
        known = r[_nearest_of(given.clone())].minimum(r)
        top, bottom = near - known.sum(), (r - known).sum()
    t = top.double() / bottom if int(bottom) else torch.zeros_like(top, dtype=torch.double)
    return t[0] if z.ndim == 1 else t


def _square(column: Tensor) -> Tensor:
    return (column[:, None] - column).square()


def select(y: Tensor, a: Tensor, *, most: int = 0, jitter: float = 0.0) -> list[int]:
    """Columns of A (n, p) that Y (n,) depends on, in the order of choice: first argmax_j T(Y, A_j), then argmax_l T(Y, A_l | A_S) while above 0.

    most     largest number of columns, 0 for no limit
    jitter   deviation of Gaussian noise on the columns, from the global generator, which breaks ties of discrete variables

    The first is chosen whatever its T. Columns are scaled to deviation 1, so that distances in (X, Z) weigh them alike; those without spread
    are never chosen.
    """
    spread = a.std(0)
    live = (spread > 1e-9 * a.abs().amax(0).clamp(min=1e-30)).nonzero().squeeze(1)
    if not len(live):
        return []
    scaled = (a[:, live] - a[:, live].mean(0)) / spread[live]
    if jitter > 0:
        scaled = scaled + jitter * torch.randn(scaled.shape).to(scaled)
    chosen: list[int] = []
    while len(chosen) < min(most or len(live), len(live)):
        t = dependence(y, scaled, scaled[:, chosen] if chosen else None)
        t[chosen] = -torch.inf
        best = int(t.argmax())
        if chosen and float(t[best]) <= 0:
            break
        chosen.append(best)
    return live[chosen].tolist()


def layers(model: nn.Module) -> Mapping[str, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Convolution and linear layers with a trainable weight, by name: where the slices are. Raises ScopeError if there are none.

    Transposed convolutions are left out: their weight's first dimension is not that of the filters.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m.weight.requires_grad and m.weight.is_floating_point()}
    if not found:
        raise ScopeError("the model has no trainable linear or convolution layer to take slices from")
    return found


def perturbed(model: nn.Module, task: Task, batch: Batch, *, copies: int, sigma: float = 0.1) -> tuple[Tensor, Tensor, list[tuple[str, int]]]:
    """Loss (copies,) and slice outputs (copies, p) of the batch with x + sigma * N(0, 1), and the slices as (layer, number), in eval mode.

    Each copy perturbs the whole batch; a slice's output is its mean over the batch and all other dimensions. Noise comes from the global
    generator. Raises SettingError for fewer than 3 copies.
    """
    if copies < 3:
        raise SettingError(f"copies must be at least 3, not {copies}")
    x, m = batch["x"], len(batch["i"])
    named, caught, values = layers(model), {}, []
    slices = [(name, j) for name, module in named.items() for j in range(len(module.weight))]

    def keep(name: str, channel: int):
        def hook(_module, _inputs, out: Tensor) -> None:
            caught[name] = out.movedim(channel, -1).flatten(1, -2).double().mean(1) if out.ndim > 2 else out.double()

        return hook

    handles = [module.register_forward_hook(keep(name, -1 if isinstance(module, nn.Linear) else 1)) for name, module in named.items()]
    try:
        with quiet(model):
            for part in torch.arange(copies).split(max(1, CHUNK // m)):
                k = len(part)
                noisy = x.repeat(k, *[1] * (x.ndim - 1))
                noisy = noisy + sigma * torch.randn(noisy.shape).to(noisy)
                caught.clear()
                out = task.forward(model, {"x": noisy, "y": batch["y"].repeat(k, *[1] * (batch["y"].ndim - 1)), "i": batch["i"].repeat(k)})
                acts = torch.cat([caught[n] if n in caught else out.nll.new_zeros(k * m, len(named[n].weight)) for n in named], 1)
                values.append((out.mean.double().view(k, m).mean(1), acts.view(k, m, -1).mean(1)))
    finally:
        for handle in handles:
            handle.remove()
    losses, acts = zip(*values, strict=True)
    return torch.cat(losses), torch.cat(acts), slices


def scope_of(model: nn.Module, slices: list[tuple[str, int]], buffers: str = "freeze") -> Scope:
    """Weights and biases of these slices. Raises ScopeError for none."""
    if not slices:
        raise ScopeError("no slice was selected: the loss depends on none of them")
    masks: dict[str, Tensor | None] = {}
    named = layers(model)
    for layer, j in slices:
        for part, p in named[layer].named_parameters(recurse=False):
            if p.requires_grad:
                mask = masks.setdefault(f"{layer}.{part}".lstrip("."), torch.zeros(p.shape, dtype=torch.bool, device=p.device))
                assert mask is not None
                mask[j] = True
    return Scope(masks, buffers)


def codependence(
    model: nn.Module, task: Task, batch: Batch, *, copies: int = 200, sigma: float = 0.1, most: int = 10, jitter: float = 0.0, buffers: str = "freeze"
) -> Scope:  # fmt: skip
    """The slices that the loss of this batch depends on, as a scope: `perturbed`, then `select`. The paper has 1,000 copies and no limit `most`.

    Raises ScopeError when no slice's output moves at all.
    """
    y, a, slices = perturbed(model, task, batch, copies=copies, sigma=sigma)
    chosen = select(y, a, most=most, jitter=jitter)
    return scope_of(model, [slices[j] for j in chosen], buffers)
