"""Trajectories of a frozen diffusion model, drawn once: states x_t with what the model says there, from which every step of a method takes its batch.

The published codes sample some 25 guided steps anew for every single update. A frozen model's trajectories do not depend on the weights that are trained,
so all states of a few of them feed all updates. Kept by digest as long as the run lives (`remember.recall`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.remember import recall
from expunge.tasks.diffusion import draw
from expunge.types import Batch, Batches, Pictures


@dataclass(frozen=True)
class Pool:
    """M states of trajectories.

    xt       (M, C, H, W) states       t      (M,) times       i      (M,) positions of their prompts in the data
    cond     (M, C, H, W) prediction given the prompt            null   (M, C, H, W) given the empty prompt
    """

    xt: Tensor
    t: Tensor
    i: Tensor
    cond: Tensor
    null: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def batches(self, data: Pictures, size: int, steps: int, seed: int) -> Batches:
        """`steps` batches of states: xt, t, y (tokens of the prompt), i, cond, null."""

        def collate(pool: Pool, index: Tensor, _: Any) -> Batch:
            i = pool.i[index]
            return {"xt": pool.xt[index], "t": pool.t[index], "y": data.tokens[i], "i": i, "cond": pool.cond[index], "null": pool.null[index]}

        return Batches(collate, self, size, epochs=steps / -(-len(self) // size), seed=seed)  # pyright: ignore[reportArgumentType]


def distinct(data: Pictures) -> tuple[Pictures, Tensor]:
    """The records with different prompts, and their positions in `data`."""
    seen: dict[bytes, int] = {}
    for k, row in enumerate(data.tokens):
        seen.setdefault(row.numpy().tobytes(), k)
    rows = torch.tensor(sorted(seen.values()), dtype=torch.long)
    return data.take(rows), rows


def pool(model: nn.Module, task: Any, data: Pictures, n: int, *, guidance: float, steps: int, seed: int) -> tuple[Pictures, Pool]:
    """All states of n trajectories, and the records that their prompts were taken from: the different prompts of `data` in turn (a draw of them by seed when
    there are more than n). Costs 2 n `steps` examples forward."""
    chosen, _ = distinct(data)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[torch.arange(n) % len(chosen)]
    data = chosen.take(order)
    data = Pictures(None, data.tokens, seed * 1_000_003 + torch.arange(n), data.rows, data.encode)
    task.collate(chosen, order, None)  # the run's meter counts whose records these are
    shape = task.shape if chosen.x is None else tuple(chosen.x.shape[1:])

    def make() -> dict[str, Tensor]:
        kept: list[tuple[Tensor, ...]] = []

        def watch(rows: Tensor, x: Tensor, t: Tensor, cond: Tensor, null: Tensor) -> None:
            kept.append((x.cpu(), t.cpu(), rows, cond.cpu(), null.cpu()))

        draw(replace(task, shape=shape), model, data, guidance=guidance, steps=steps, seed=seed, watch=watch)
        return dict(zip(("xt", "t", "i", "cond", "null"), (torch.cat(c) for c in zip(*kept, strict=True)), strict=True))

    return data, Pool(**recall(f"pool/{shape}/{guidance}/{steps}/{seed}", model, data, make))
