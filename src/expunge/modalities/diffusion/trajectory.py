"""Trajectories of a frozen diffusion model, drawn once: states x_t with what the model says there, from which every step of a method takes its batch.

The published codes sample some 25 guided steps anew for every single update. A frozen model's trajectories do not depend on the weights that are trained,
so all states of a few of them feed all updates. Kept by digest as long as the run lives (`remember.recall`). `follow` is the loop of methods that learn so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import ModelError, ScopeError, SettingError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.session import Session, edit
from expunge.core.types import Batch, Batches, Paired, Scope, Split, drawn
from expunge.modalities.diffusion.task import draw
from expunge.modalities.pictures import Pictures
from expunge.parts.remember import recall
from expunge.parts.scopes import attention
from expunge.parts.scopes.lora import lora as adapters
from expunge.parts.updates.descend import descend

CHUNK = 512
"""States asked at once."""

FEW, MANY = 20, 256
"""Trajectories where a run names no number: one for each different prompt, but at least and at most so many."""


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


def many(n: int, prompts: int, least: int = FEW) -> int:
    """n trajectories, or for 0 as many as there are different prompts, at least `least` and at most MANY.

    >>> many(0, 5), many(0, 30), many(0, 1000), many(3, 30)
    (20, 30, 256, 3)
    """
    return n or max(least, min(prompts, MANY))


def lines(n: Mapping[str, int], s: Mapping[str, Any], part: str = "forget", least: int = FEW) -> int:
    """Trajectories of a run with these part sizes and settings: what a method's cost multiplies."""
    return many(s["trajectories"], n.get(f"{part}.different", n[part]), least)


def worked(forget: Pictures, used: Tensor, n: int = MANY) -> None:
    """Tell the guard how many of the different prompts of a request are among those that a method worked on, `used` (K, L), with n trajectories."""
    every, mine = ({row.numpy().tobytes() for row in tokens} for tokens in (forget.tokens, used))
    way = f"raise trajectories to at least {len(every)}" if n < len(every) else "give each prompt an anchor of its own"
    guard.current().covered("forget", seen=len(every & mine), of=len(every), what="prompts", way=way)


def pool(model: nn.Module, task: Any, data: Pictures, n: int, *, guidance: float, steps: int, seed: int) -> tuple[Pictures, Pool]:
    """All states of n trajectories (0: see `many`), and the records that their prompts were taken from: the different prompts of `data` in turn (a draw of them
    by seed when there are more than n). Costs 2 n `steps` examples forward."""
    chosen, _ = distinct(data)
    n = many(n, len(chosen))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[torch.arange(n) % len(chosen)]
    data = replace(chosen.take(order), x=None, ids=seed * 1_000_003 + torch.arange(n))
    task.collate(chosen, order, None)  # the run's meter counts whose records these are
    shape = task.shape if chosen.x is None else tuple(chosen.x.shape[1:])

    def make() -> dict[str, Tensor]:
        kept: list[tuple[Tensor, ...]] = []

        def watch(rows: Tensor, x: Tensor, t: Tensor, cond: Tensor, null: Tensor) -> None:
            kept.append((x.cpu(), t.cpu(), rows, cond.cpu(), null.cpu()))

        draw(replace(task, shape=shape), model, data, guidance=guidance, steps=steps, seed=seed, watch=watch)
        return dict(zip(("xt", "t", "i", "cond", "null"), (torch.cat(c) for c in zip(*kept, strict=True)), strict=True))

    return data, Pool(**recall(f"pool/{shape}/{guidance}/{steps}/{seed}", model, data, make))


def squared(task: Any, model: nn.Module, batch: Batch, target: Tensor) -> Tensor:
    """(B,) mean over the elements of (e(x_t, t, c) - target)^2, in float32. Check (card esd): e - target = (0.8, -0.8) gives 0.64."""
    pred = task.forward(model, batch).pred
    return (pred - target.to(pred.device)).square().flatten(1).mean(1)


def counterparts(asked: Pictures, there: Pictures, instead: Pictures, name: str = "anchor") -> Tensor:
    """(N, L) tokens of `instead` in the rows where `there` has the prompts of `asked` (N). Raises SettingError if both are not as long."""
    if len(there) != len(instead):
        raise SettingError(f"{name} must say row by row what to draw instead: it has {len(instead)} rows, and there are {len(there)} to answer")
    rows = {row.numpy().tobytes(): k for k, row in enumerate(there.tokens)}
    return instead.tokens[[rows[row.numpy().tobytes()] for row in asked.tokens]]


def upto(states: Pool, latest: float) -> Pool:
    """The states at noise times of at most the share `latest`. Raises SettingError when there is none."""
    mine = states.t <= 1000 * latest
    if not bool(mine.any()):
        raise SettingError(f"no state of the trajectories lies at {latest:g} of the noise time or below: raise latest or path")
    return Pool(*(getattr(states, n)[mine] for n in ("xt", "t", "i", "cond", "null")))


def under(model: nn.Module, task: Any, states: Pool, tokens: Tensor) -> Tensor:
    """(M, C, H, W) the frozen model's predictions at the pool's states under other prompts: tokens (N, L) by trajectory."""
    with quiet(model):
        parts = torch.arange(len(states)).split(CHUNK)
        found = [task.forward(model, {"xt": states.xt[k], "t": states.t[k], "y": tokens[states.i[k]], "i": k}).pred.cpu() for k in parts]
    return torch.cat(found)


def kept_times(s: Any) -> int:
    """States of a trajectory that `upto` leaves, as a method's cost has it (those of a flow)."""
    return max(1, sum(1 - k / s["path"] <= s["latest"] for k in range(s["path"])))


def opened(model: nn.Module, scope: Scope, rank: int, alpha: float = 0.0) -> AbstractContextManager[Session]:
    """A session on a scope, or, for a rank other than 0, on new adapters of that rank on its linear layers (`scopes.lora`; alpha 0 is twice the rank), whose
    patch is low rank. Raises ScopeError where there is no such layer."""
    if not rank:
        return edit(model, scope)
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError("adapters need peft: pip install 'expunge[text]'") from None
    modules = dict(model.named_modules())
    layers = [n.removesuffix(".weight") for n in scope.masks if n.endswith(".weight") and isinstance(modules[n.removesuffix(".weight")], nn.Linear)]
    if not layers:
        raise ScopeError("lora adapts linear layers, and none is among the weights that are to move: name another part, or set lora=0")
    return adapters(model, f"^({'|'.join(map(re.escape, layers))})$", rank=rank, alpha=alpha)


def follow(
    model: nn.Module, task: Any, split: Split, data: Pictures, forget: Callable[[Batch, Pictures], Tensor], *, part: str, alpha: float, steps: int,
    batch_size: int, lr: float, guidance: float, trajectories: int, path: int, seed: int, made: Callable[[Pictures, Pool], Pool] | None = None,
    lora: int = 0,
) -> Patch:  # fmt: skip
    """Descend by Adam on forget(batch, prompts) over states of `data`'s trajectories, plus alpha || e(x_t, t, r) - e*(x_t, t, r) ||^2 over retained ones.

    forget   a batch of states and the records that its positions `i` name -> (B,)
    made     records and their states -> the states to learn from, where some are left out or say something else
    lora     rank of adapters that are trained in place of the part's weights (`opened`)
    The rest are the settings of the methods (see esd).
    """
    scope = attention.part(model, part)
    gone, states = pool(model, task, data, trajectories, guidance=guidance, steps=path, seed=seed)
    if data is split.forget:
        worked(data, gone.tokens, len(gone))
    if made is not None:
        states = made(gone, states)
    streams = [states.batches(gone, batch_size, steps, seed)]
    if split.retain is not None and alpha:
        kept, others = pool(model, task, split.retain, len(gone), guidance=guidance, steps=path, seed=seed + 1)
        streams.append(others.batches(kept, batch_size, steps, seed + 1))

    def loss(pair: tuple[Batch, ...]) -> Tensor:
        f, *rest = pair
        value = forget(f, gone).mean()
        for r in rest:
            value = value + alpha * squared(task, model, r, r["cond"]).mean()
        return value

    with opened(model, scope, lora) as e:
        e.eval()
        descend(e, loss, Paired(*streams), lr=lr, optimizer="adam")
    return e.patch


def cost(n, s, part: str = "forget") -> tuple[float, float]:
    """Passes of a method that calls `follow` on that part: 2 per state drawn, and those of the updates."""
    parts = 2 if "retain" in n and s["alpha"] else 1
    size = lines(n, s, part) * s["path"]
    seen = parts * drawn(size, s["batch_size"], s["steps"])
    return seen + parts * 2 * size, seen
