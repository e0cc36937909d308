"""FILA: LoRA that starts at the part of each weight matrix that matters to the forget set. Source: card loku, FILA steps 1 to 4.

F      Fisher diagonal of a set: sum over batches b of n_b (gradient of the batch's mean token loss)^2 / sum of n_b, n_b its target tokens
I      F_f / (1e-5 + F_r), element by element
w      (O,) sqrt of the row sums of I
B A    the best rank-r fit to diag(w) W, taken back through diag(w): scale B A = diag(1 / (w + 1e-5)) U S V^T
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from expunge.core.errors import ScopeError
from expunge.core.machine.devices import reseeded
from expunge.core.types import Data, Task

EPS = 1e-5
OVERSAMPLING, ITERATIONS = 8, 4
"""Of the randomised SVD: columns beyond the rank, and power iterations."""


def fila(
    model: nn.Module, task: Task, forget: Data, retain: Data, names: Sequence[str], *, rank: int, scale: float, size: int = 2, budget: float = 4.0,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Layer name -> (B (O, r), A (r, I)) to start LoRA with, `scale` = alpha / r. Layers that the forget loss does not reach are left out.

    Raises ScopeError when none is left, or when the rank exceeds a side of a matrix.
    """
    rows = importance(model, task, forget, retain, names, size=size, budget=budget)
    found = {n: fit(model.get_parameter(f"{n}.weight"), w, rank, scale, seed=seed) for n, w in rows.items() if bool(w.any())}
    if not found:
        raise ScopeError("the forget loss has no gradient in any of the layers: nothing to start LoRA from")
    return found


def fit(weight: Tensor, rows: Tensor, rank: int, scale: float, *, eps: float = EPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, A) of rank r with scale B A = diag(1 / (w + eps)) [diag(w) W]_r, for row weights w (O,). Rows of ones and eps 0 give the plain SVD of W.

    Randomised SVD with its own seed: same input, same bits, and the global generator is left alone.

    >>> b, a = fit(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([2.0, 2.0]), 1, 2.0)
    >>> bool((torch.diag(torch.tensor([3.0, 1.0])) - 2 * b @ a - torch.diag(torch.tensor([1.5e-5, 1.0]))).abs().max() < 1e-6)
    True
    """
    if rank > min(weight.shape):
        raise ScopeError(f"rank {rank} is larger than a side of a {weight.shape[0]} x {weight.shape[1]} weight; lower lora, or name larger layers")
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    matrix, w = weight.detach().to(wide), rows.to(weight.device, wide)
    with reseeded(seed):
        u, s, v = torch.svd_lowrank(w[:, None] * matrix, q=min(rank + OVERSAMPLING, *weight.shape), niter=ITERATIONS)
    root = (s[:rank].clamp(min=0) / scale).sqrt()
    return u[:, :rank] * root / (w[:, None] + eps), (v[:, :rank] * root).T.contiguous()


def importance(model: nn.Module, task: Task, forget: Data, retain: Data, names: Sequence[str], *, size: int = 2, budget: float = 4.0) -> dict[str, Tensor]:
    """w (O,) of each named linear layer.

    size     records per batch: F is that of batches, as published, and depends on it
    budget   GiB for Fisher diagonals. Layers are taken in as many groups as that needs, one pass over both sets each; of a group only w is kept
    """
    found: dict[str, Tensor] = {}
    for group in groups({n: model.get_parameter(f"{n}.weight").numel() for n in names}, budget):
        here, there = (fisher(model, task, data, group, size) for data in (forget, retain))
        for name in group:
            found[name] = (here.pop(name) / (EPS + there.pop(name))).sum(1).sqrt()
    return found


def groups(sizes: Mapping[str, int], budget: float) -> Iterator[list[str]]:
    """Names in order, cut so that two float32 values per weight of a group fit into `budget` GiB; a larger layer stands alone.

    >>> list(groups({"a": 2**27, "b": 2**27, "c": 2**28}, 2.0))
    [['a', 'b'], ['c']]
    """
    group, filled = [], 0.0
    for name, size in sizes.items():
        need = 8 * size / 2**30
        if group and filled + need > budget:
            yield group
            group, filled = [], 0.0
        group, filled = [*group, name], filled + need
    if group:
        yield group


def fisher(model: nn.Module, task: Task, data: Data, names: Sequence[str], size: int) -> dict[str, Tensor]:
    """F of the named layers' weights, in float32, from gradients of sum nll / sqrt(n_b), whose squares are n_b (gradient of the mean)^2. Each
    gradient is squared and dropped as it arrives in the backward pass; nothing about the model changes."""
    weights = {n: model.get_parameter(f"{n}.weight") for n in names}
    total = {n: torch.zeros(p.shape, dtype=torch.float64 if p.dtype is torch.float64 else torch.float32, device=p.device) for n, p in weights.items()}
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]

    def taker(name: str):
        def take(p: Tensor) -> None:
            total[name] += p.grad.to(total[name].dtype).square()
            p.grad = None

        return take

    for p, _, _ in flags:
        p.grad = None
        p.requires_grad_(False)
    handles = [p.requires_grad_(True).register_post_accumulate_grad_hook(taker(n)) for n, p in weights.items()]
    model.eval()
    batches, tokens = task.batches(data, size), 0.0
    try:
        for k in range(len(batches)):
            out = task.forward(model, batches[k])
            n = out.count.sum()
            loss = out.nll.sum() / n.sqrt()
            if loss.requires_grad:
                loss.backward()
            tokens += float(n)
    finally:
        for handle in handles:
            handle.remove()
        for p, required, grad in flags:
            p.requires_grad_(required)
            p.grad = grad
        for module, mode in modes:
            module.training = mode
    return {n: t / tokens for n, t in total.items()}
