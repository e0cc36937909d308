"""Training on new records with a term that retains the old ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from expunge.core.session import scratch
from expunge.core.types import Paired, Records, Task
from expunge.data.records.memory import FisherSum
from expunge.guarantees.streams.course import Course
from expunge.guarantees.streams.state import State
from expunge.parts.losses.continual import der, derpp, ewc, lwf
from expunge.parts.losses.distil import targets
from expunge.parts.updates.descend import descend
from expunge.parts.updates.episodic import refreshing, rule


def learn(s: State, task: Task, rows: Records, old: Tensor, course: Course, epochs: float, seed: int) -> None:
    """Train the model on `rows` with the retention term, whose reference is the model as it is now; `old` are the classes it holds."""
    model, memory, term = s.model, s.memory, course.term
    session = scratch(model)
    session.train()
    new = task.batches(rows, course.batch_size, epochs=epochs, seed=seed)

    def replayed(data: Records, stream: int):
        """As many batches of the memory as there are of the new records."""
        return task.batches(data, course.replay, epochs=len(new) / -(-len(data) // course.replay), seed=seed + stream)

    def ce(batch) -> Tensor:
        return task.forward(model, batch).mean.mean()

    loss: Callable[[Any], Any] = lambda batch: ce(batch[0])  # noqa: E731
    streams, bend = [new], None
    if term == "lwf" and len(old):
        teacher = targets(copy.deepcopy(model), task, rows)

        def distilled(batch) -> Tensor:
            out = task.forward(model, batch[0])
            return (out.mean + course.alpha * lwf(out, teacher(batch[0]), temperature=course.temperature, classes=old)).mean()

        loss = distilled
    elif term == "ewc" and s.fisher:
        anchor, F = {n: p.detach().clone() for n, p in session.params.items()}, _pooled(s.fisher, course.gamma)
        loss = lambda batch: ce(batch[0]) + ewc(session.params, anchor, F, strength=course.strength)  # noqa: E731
    elif term in ("gem", "agem") and len(memory):
        parts = memory.part.unique().tolist() if term == "gem" else [None]
        streams += [replayed(memory.rows(part), 2 + k) for k, part in enumerate(parts)]
        bend = rule(term, **({"margin": course.margin, "eps": course.eps} if term == "gem" else {}))
        loss = lambda batch: tuple(ce(b) for b in batch)  # noqa: E731
    elif term in ("der", "derpp", "refresh"):
        draws = 1 if term == "der" else 2
        streams += [replayed(memory.rows(), 2 + k) for k in range(draws)] if len(memory) else []
        stir = refreshing(session, ce, delta=course.delta, generator=torch.Generator().manual_seed(seed + 1)) if term == "refresh" else None

        def replay(batch) -> Tensor:
            if stir is not None:
                stir(batch[0])
            total = ce(batch[0])
            if len(batch) == 1:
                return total
            out, z = task.forward(model, batch[1]), memory.logits[batch[1]["i"]]
            if draws == 1:
                return total + course.alpha * der(out, z).mean()
            return total + derpp(out, z, task.forward(model, batch[2]), alpha=course.alpha, beta=course.beta).mean()

        loss = replay
    descend(session, loss, Paired(*streams), lr=course.lr, momentum=course.momentum, clip=course.clip, combine=bend)
    model.eval()


def _pooled(parts: Mapping[int, FisherSum], gamma: float) -> dict[str, Tensor]:
    """sum over parts of gamma^(newer parts) * total / count, by name of the weight."""
    each = [(gamma ** (len(parts) - 1 - k), parts[t]) for k, t in enumerate(sorted(parts))]
    return {n: torch.stack([w * p.total[n] / p.count for w, p in each]).sum(0) for n in each[0][1].total}
