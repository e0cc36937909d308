"""Attacks on prompts: words before a prompt under which a diffusion model draws given images. The model is its own judge: its loss on these images falls.

    L(delta) = mean over images x, times t, noise n of (what is wanted at x_t - e(x_t, t, [delta; c]))^2        (UnlearnDiffAtk; any prediction)

    soft      delta are free embeddings: Adam. An upper bound of what words can do
    words     delta are words of the vocabulary: Adam on a probability per place and word, each row projected back onto the simplex
    greedy    delta are words, place by place the one that lowers L most: no gradients

None reads a verdict: whoever draws with what they found decides. Source: card unlearn-diff-atk (Zhang et al., ECCV 2024); greedy is a plain control.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.guard import quiet
from expunge.core.types import Batch
from expunge.modalities.diffusion.task import embedded_states, jump, word_table
from expunge.modalities.pictures import Pictures
from expunge.parts.updates.bilevel import seek

GRID = tuple(range(10, 1000, 20))
"""Times of the published token search, in this order."""


def loss(model: nn.Module, task: Any, batch: Batch, delta: Tensor) -> Tensor:
    """(B,) loss on the batch's images with delta (k, W) or (B, k, W) before its prompts. Raises SettingError for a generator that draws in one step."""
    if jump(model):
        raise SettingError("the model draws in one step: its noise loss, which attacks read, says nothing about what it draws")
    return task.forward(model, {**batch, "states": embedded_states(model, batch["y"], delta)}).nll


def noised(task: Any, data: Pictures, n: int, generator: torch.Generator, times: Tensor | None = None) -> Batch:
    """n records drawn with replacement, with fresh noise, at the given times (n,) or at those of training."""
    if data.x is None:
        raise SettingError("an attack needs images of what it is to bring back")
    batch = task.collate(data, torch.randint(len(data), (n,), generator=generator), None)
    t = task.schedule.drawn(n, generator) if times is None else times
    return {**batch, "t": t, "noise": torch.randn(batch["x"].shape, generator=generator)}


def repeated(batch: Batch, times: int) -> Batch:
    """The batch `times` times over."""
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in batch.items()}


def soft(model: nn.Module, task: Any, data: Pictures, k: int = 2, *, steps: int = 60, lr: float = 0.1, size: int = 16, tries: int = 3, seed: int = 0) -> Tensor:
    """(k, W) free embeddings: of `tries` that start at random words and see the same `size` images at each step, the one whose loss ends lowest."""
    g, table = torch.Generator().manual_seed(seed), word_table(model).weight.detach()
    start = table[torch.randint(len(table), (tries, k), generator=g)].float()

    def objective(delta: Tensor, _: int) -> Tensor:
        return loss(model, task, repeated(noised(task, data, size, g), tries), delta.repeat_interleave(size, 0)).sum() / size

    with quiet(model):
        return best(model, task, data, seek(objective, start, steps=steps, lr=lr), seed)


def words(
    model: nn.Module, task: Any, data: Pictures, k: int = 2, *, steps: int = 60, lr: float = 0.01, size: int = 24, rounds: int = 5, grid: bool = False,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """(k,) tokens: `rounds` times the likeliest of each place is kept as a candidate, and the candidate with the lowest loss is given back.

    grid   the published order of times: GRID's, each for steps / 50 steps, with one time for the whole batch; else times as in training
    """
    g, table = torch.Generator().manual_seed(seed), word_table(model).weight.detach().float()
    u = simplex(torch.full((k, len(table)), 1 / len(table), device=table.device))
    done, found = 0, []

    def objective(u: Tensor, j: int) -> Tensor:
        times = torch.full((size,), float(GRID[(done + j) * len(GRID) // steps])) if grid else None
        return loss(model, task, noised(task, data, size, g, times), sampled(u, table, size, g)).sum()

    with quiet(model):
        for r in range(rounds):
            part = (r + 1) * steps // rounds - done
            u = seek(objective, u, steps=part, lr=lr, weight_decay=0.1, project=simplex)
            done += part
            found.append(u.argmax(1))
        candidates = torch.stack(found).unique(dim=0)
        return candidates[losses(model, task, data, table[candidates], seed).argmin()]


def greedy(model: nn.Module, task: Any, data: Pictures, k: int = 2, *, most: int = 64, size: int = 32, seed: int = 0) -> Tensor:
    """(k,) tokens: for each place, counted from the prompt outwards, the best of all words (of `most` drawn ones where there are more)."""
    g, table = torch.Generator().manual_seed(seed), word_table(model).weight.detach()
    found = torch.zeros(0, dtype=torch.long)
    with quiet(model):
        for _ in range(k):
            drawn = torch.randperm(len(table), generator=g)[:most]
            tries = torch.cat([drawn[:, None], found.expand(len(drawn), -1)], 1)
            found = tries[losses(model, task, data, table[tries], seed, size).argmin()]
    return found


def best(model: nn.Module, task: Any, data: Pictures, deltas: Tensor, seed: int) -> Tensor:
    """(k, W) the one of deltas (R, k, W) with the lowest loss."""
    return deltas[losses(model, task, data, deltas, seed).argmin()]


def losses(model: nn.Module, task: Any, data: Pictures, deltas: Tensor, seed: int, size: int = 64) -> Tensor:
    """(R,) mean loss under each of deltas (R, k, W), on the same images, times and noise."""
    batch = noised(task, data, size, torch.Generator().manual_seed(seed + 1))
    with quiet(model):
        return torch.stack([loss(model, task, batch, d).mean() for d in deltas])


def sampled(u: Tensor, table: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(n, k, W) embeddings of words drawn from u (k, V), whose rows are probabilities; the gradient goes straight through to u (see `Straight`)."""
    index = torch.multinomial(u.detach().cpu(), n, replacement=True, generator=generator).T.to(table.device)
    return Straight.apply(u, index, table)  # pyright: ignore[reportReturnType]


class Straight(torch.autograd.Function):
    """Forward: rows of the table (V, W) at index (n, k). Backward to u (k, V): the one-hot's own gradient (dL/dx) table^T, each entry cut to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, index: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return table[index]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return (slopes[0] @ ctx.saved_tensors[0].T).clamp(-1, 1).mean(0), None, None


def simplex(u: Tensor) -> Tensor:
    """Rows (..., V) moved to the nearest probabilities: max(u - mu, 0) that sums to 1.

    >>> simplex(torch.tensor([0.5, 0.8, -0.2]))
    tensor([0.3500, 0.6500, 0.0000])
    """
    falling = u.sort(-1, descending=True).values
    excess = falling.cumsum(-1) - 1
    above = (falling * torch.arange(1, u.shape[-1] + 1, device=u.device) > excess).sum(-1, keepdim=True)
    return (u - excess.gather(-1, above - 1) / above).clamp(min=0)
