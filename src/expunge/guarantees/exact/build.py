"""Training components: the key of each, its seed, and the jobs that make what is missing.

key = SHA-256(version, name, epochs, block, key of the parent, start, training settings, (id, content) of every record); the seed is made of the key. So a
component is a function of what is named in its key, whoever trains it, in which order and after which deletions. Differs from the published code, which sets
no seeds (card sisa, pitfalls).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import raw
from expunge.core.errors import SettingError
from expunge.core.machine.devices import reseeded
from expunge.core.session import Session, scratch
from expunge.core.types import Records, Task
from expunge.engine.jobs import map_jobs
from expunge.guarantees.exact.adapters import Start, load
from expunge.guarantees.exact.design import Component, Design
from expunge.guarantees.exact.store import VERSION, Store
from expunge.parts.training import fresh
from expunge.parts.updates.descend import OPTIMIZERS, descend


@dataclass(frozen=True)
class Training:
    """How every component is trained. threads: torch threads per component, part of its identity since sums round by them."""

    batch_size: int = 32
    lr: float = 0.05
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    stacked: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise SettingError("batch_size and threads must be 1 or larger")
        if not self.lr > 0:
            raise SettingError(f"lr must be above 0, not {self.lr}")
        if self.optimizer not in OPTIMIZERS:
            raise SettingError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not '{self.optimizer}'")

    def options(self) -> dict[str, Any]:
        """What the loop takes."""
        return {n: getattr(self, n) for n in ("lr", "optimizer", "momentum", "weight_decay", "schedule")}


def start_digest(start: Start) -> str:
    """What components start from: names, types and shapes, and the values too where the model's own weights are used."""
    h = hashlib.sha256()
    for name, t in sorted({**dict(start.model.named_parameters()), **dict(start.model.named_buffers())}.items()):
        h.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        if start.blocks:
            h.update(raw(t))
    return h.hexdigest()


def keyed(design: Design, rows: Mapping[str, Sequence[int]], data: Records, training: Training, start: str) -> dict[str, str]:
    """Component name -> key. `rows`: positions of each component's records in `data`, sorted by id."""
    records = [int(i).to_bytes(8, "big", signed=True) + key for i, key in zip(data.ids.tolist(), data.keys, strict=True)]
    how, out = asdict(training), {}
    for c in design.components:
        facts = [VERSION, design.name, c.name, c.epochs, c.block, out.get(c.parent, ""), start, how]
        out[c.name] = hashlib.sha256(json.dumps(facts).encode() + b"".join([records[k] for k in rows[c.name]])).hexdigest()
    return out


@dataclass(frozen=True)
class Work:
    """One job: components of one shard, parents first, and the records that they learn from."""

    folder: Path
    start: Start
    task: Task
    training: Training
    data: Records
    steps: tuple[tuple[Component, str, str, tuple[int, ...]], ...]
    """(component, key, key of its parent or "", positions in data)"""


def build(
    store: Store, design: Design, start: Start, task: Task, data: Records, rows: Mapping[str, Sequence[int]], keys: Mapping[str, str], names: Sequence[str],
    training: Training, *, workers: int = 1, engine: str = "local", progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:  # fmt: skip
    """Train those of `names` whose checkpoints are missing, with the parents that they need; returns what was trained. One job per shard; stacked, one job
    per depth.
    """
    by = {c.name: c for c in design.components}
    missing: dict[str, None] = {}
    for name in names:
        chain = [name]
        while by[chain[-1]].parent and not store.has(keys[by[chain[-1]].parent]):
            chain.append(by[chain[-1]].parent)
        missing |= {n: None for n in reversed(chain) if not store.has(keys[n]) and rows[n]}
    steps = [(by[n], keys[n], keys[by[n].parent] if by[n].parent and rows[by[n].parent] else "", tuple(rows[n])) for n in missing]
    if training.stacked:
        _stacked(Work(store.folder, start, task, training, data, tuple(steps)), progress)
        return list(missing)
    jobs = []
    for shard in dict.fromkeys(c.shard for c, _, _, _ in steps):
        mine = [s for s in steps if s[0].shard == shard]
        used = sorted({k for _, _, _, at in mine for k in at})
        new = {k: j for j, k in enumerate(used)}
        local = tuple((c, key, up, tuple(new[k] for k in at)) for c, key, up, at in mine)
        jobs.append(Work(store.folder, start, task, training, data.take(used), local))
    map_jobs(train, jobs, workers=workers, engine=engine, progress=progress)
    return list(missing)


def train(work: Work) -> int:
    """Do one job: every step from its parent's checkpoint, or from the start, to a checkpoint of its own. Returns how many components were trained."""
    store, done = Store(work.folder), 0
    with limited(work.training.threads):
        for component, key, parent, at in work.steps:
            if store.has(key):
                continue
            model = begin(work.start, store, component, parent, key)
            session = scratch(model) if component.block < 0 else _blocks(model, work.start.names(component.block))
            if component.block < 0:
                session.train()
            batches = work.task.batches(work.data.take(at), work.training.batch_size, epochs=component.epochs, seed=seeded(key))
            with reseeded(seeded(key)):  # dropout draws from the global generator
                descend(session, lambda b, m=model: work.task.forward(m, b).mean.mean(), batches, **work.training.options())
            _finish(store, work.start, model, component, key, parent, len(at))
            done += 1
    return done


def _stacked(work: Work, progress: Callable[[str, int, int], None] | None) -> None:
    """All components of one depth in one stack (`expunge.engine.stacked`)."""
    from expunge.core import guard
    from expunge.engine import stacked

    store, left, done = Store(work.folder), list(work.steps), 0
    if work.start.blocks:
        raise SettingError("adapter blocks differ from component to component and cannot be trained in a stack; leave out stacked")
    with limited(work.training.threads), guard.watching(guard.Guard(progress=progress, label="training", max_loss=1e6)):
        while left:
            now = [s for s in left if not s[2] or store.has(s[2])]
            for epochs in sorted({c.epochs for c, _, _, _ in now}):
                wave = [s for s in now if s[0].epochs == epochs]
                models = [begin(work.start, store, c, parent, key) for c, key, parent, _ in wave]
                parts = [work.data.take(at) for _, _, _, at in wave]
                seeds = [seeded(key) for _, key, _, _ in wave]
                options: dict[str, Any] = work.training.options()
                stacked.train(models, work.task, parts, epochs=epochs, batch_size=work.training.batch_size, seeds=seeds, alike=True, **options)
                for model, (c, key, parent, at) in zip(models, wave, strict=True):
                    _finish(store, work.start, model, c, key, parent, len(at))
            done += len(now)
            left = [s for s in left if not store.has(s[1])]


def _finish(store: Store, start: Start, model: nn.Module, component: Component, key: str, parent: str, records: int) -> None:
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    store.put(key, {n: mine[n] for n in start.held(component.block)}, component=component.name, parent=parent, records=records)


def begin(start: Start, store: Store, component: Component, parent: str, key: str) -> nn.Module:
    """The model that a component starts from: its parent's, or weights drawn from the seed, or the given ones where only adapters move."""
    if parent:
        return standing(start, store, parent)
    return copy.deepcopy(start.model) if component.block >= 0 else fresh(start.model, seeded(key))


def standing(start: Start, store: Store, key: str) -> nn.Module:
    """The model of a checkpoint: with adapters, those of its ancestors are loaded first."""
    model, chain = copy.deepcopy(start.model), [key]
    if start.blocks:
        while up := store.parent(chain[-1]):
            chain.append(up)
    for k in reversed(chain):
        load(model, store.get(k))
    return model.eval()


def seeded(key: str) -> int:
    """The seed of a component.

    >>> seeded("00000000000000ff" + 48 * "0")
    15
    """
    return int(key[:15], 16)


def _blocks(model: nn.Module, names: list[str]) -> Session:
    named = dict(model.named_parameters())
    for n, p in named.items():
        p.requires_grad_(n in set(names))
    return Session(model, {n: named[n] for n in names}, dict.fromkeys(names), buffers="freeze", judged=False)


@contextmanager
def limited(n: int) -> Iterator[None]:
    """`n` torch threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
