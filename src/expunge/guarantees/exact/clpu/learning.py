"""R and T: what trains the networks of a stream and fills its memories. Every random number comes from the key of what is made."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import Diverged, SplitError
from expunge.core.machine.devices import reseeded
from expunge.core.modality import of
from expunge.core.session import scratch
from expunge.core.types import Batch, Batches, Out, Paired, Records
from expunge.data.records.memory import Memory
from expunge.guarantees.exact.build import limited, seeded
from expunge.guarantees.exact.clpu.parts import Parts
from expunge.guarantees.exact.clpu.state import Entry, State
from expunge.parts.losses.continual import derpp
from expunge.parts.reading import outputs
from expunge.parts.training import fresh
from expunge.parts.updates.descend import descend


def restricted(out: Out, classes: Tensor) -> Out:
    """The same pass with the logits (B, K) of these K classes, sorted, alone; labels count from 0 among them. `out` is not written to.

    >>> out = Out(nll=torch.ones(1), count=torch.ones(1), logits=torch.tensor([[9.0, 2.0, 9.0, 1.0]]), labels=torch.tensor([1]))
    >>> round(float(restricted(out, torch.tensor([1, 3])).nll), 6)   # ln(1 + e^-1)
    0.313262
    """
    logits = out.logits.index_select(1, classes.to(out.logits.device))
    labels = torch.searchsorted(classes.to(out.labels.device), out.labels)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return Out(nll=nll, count=torch.ones_like(nll), logits=logits, labels=labels)


def replayed(out: Out, z: Tensor, *, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
    """(B,) alpha MSE(f(x_m), z_m) + beta CE(f(x_m), y_m) on one draw, MSE being the mean over classes.

    >>> out = Out(nll=torch.tensor([0.313262]), count=torch.ones(1), logits=torch.tensor([[2.0, 1.0]]))
    >>> replayed(out, torch.tensor([[1.0, 3.0]]), beta=0.0), replayed(out, torch.tensor([[1.0, 3.0]]))
    (tensor([1.2500]), tensor([1.5633]))
    """
    return derpp(out, z, out, alpha=alpha, beta=beta)


def learned(parts: Parts, name: str, data: Records, how: str, classes: tuple[int, ...]) -> None:
    """R or T of a new task: train its network, fill its memory, and put both in force. Raises SplitError for bad records, Diverged."""
    rows, chosen = _ready(parts, data, classes)
    kept = how == "remember"
    parent = parts.state.main if kept or parts.rule.use_pretrain else ""
    facts = [rows.ids.tolist(), rows.digest, rows.augment is not None, chosen]
    key = parts.key(how, name, parent, *facts, *(parts.past() if kept else ()))
    memory = parts.key("memory", name, key)
    numbers = _trained(parts, name, key, memory, parent, rows, chosen, replaying=kept)
    tasks = {**parts.state.tasks, name: Entry(how, chosen, "" if kept else key, memory, numbers)}
    parts.commit(replace(parts.state, main=key if kept else parts.state.main, tasks=tasks, forgotten=parts.state.forgotten - {name}))


def settle(parts: Parts) -> None:
    """R after T: carry out the consolidation that is pending, if one is. Raises Diverged, and then it is withdrawn."""
    name = parts.state.pending
    if not name:
        return
    held, past = parts.state.tasks[name], parts.past()
    key = parts.key("consolidate", name, parts.state.main, held.network, held.memory, *past)
    if not parts.store.has(key):
        memory, at = parts.memory(name), torch.tensor(held.classes)
        model, mine = copy.deepcopy(parts.net(parts.state.main)), memory.rows()
        steps = parts.rule.iterations or parts.rule.epochs * -(-memory.num_seen // parts.training.batch_size)
        new = _rounds(parts, mine, parts.training.batch_size, steps, seeded(key))
        try:
            _descend(parts, model, key, new, lambda b: _replay(parts, model, b, memory, at), parts.memories())
        except Diverged:
            parts.commit(replace(parts.state, pending=""))
            raise
        parts.put(key, model, name, parts.state.main)
    others = {n: entry for n, entry in parts.state.tasks.items() if n != name}
    parts.commit(State(key, {**others, name: replace(held, how="remember", network="")}, parts.state.forgotten))


def _ready(parts: Parts, data: Records, classes: tuple[int, ...]) -> tuple[Records, tuple[int, ...]]:
    """(records sorted by id, classes sorted)."""
    ids = data.ids.tolist()
    if not ids:
        raise SplitError("the task has no records")
    if len(set(ids)) < len(ids):
        raise SplitError("ids must be unique within a task")
    if data.y.ndim != 1 or data.y.is_floating_point():
        raise SplitError(f"labels must be whole numbers of shape (N,), not {str(data.y.dtype).removeprefix('torch.')} of shape {tuple(data.y.shape)}")
    rows, found = data.take(sorted(range(len(ids)), key=ids.__getitem__)), set(data.y.tolist())
    chosen = tuple(sorted({int(c) for c in classes} or found))
    if outside := sorted(found - set(chosen)):
        raise SplitError(f"a record has label {outside[0]}, which is not among the classes of the task: {', '.join(map(str, chosen))}")
    width = outputs(parts.model, parts.task, of(parts.task).rows(rows.x[:1], torch.zeros(1, dtype=torch.long), rows.ids[:1])).shape[-1]
    if chosen[0] < 0 or chosen[-1] >= width:
        raise SplitError(f"the model has classes 0 to {width - 1}; the task names {chosen[0] if chosen[0] < 0 else chosen[-1]}")
    return rows, chosen


def _trained(parts: Parts, name: str, key: str, memory: str, parent: str, rows: Records, chosen: tuple[int, ...], *, replaying: bool) -> Mapping[str, int]:
    """Train the network `key` on the rows, fill the memory on the way, write both; returns the memory's numbers."""
    model = copy.deepcopy(parts.net(parent)) if parent else fresh(parts.model, seeded(key))
    new = parts.task.batches(rows, parts.training.batch_size, epochs=parts.rule.epochs, seed=seeded(key))
    at, caught, step = torch.tensor(chosen), [], 0

    def first(batch: Batch) -> Tensor:
        nonlocal step
        out, step = restricted(parts.task.forward(model, batch), at), step + 1
        if step > len(new) - new.per_epoch:
            caught.append((batch["x"].detach().cpu(), batch["i"], out.logits.detach().cpu()))
        return out.mean.mean()

    _descend(parts, model, key, new, first, parts.memories() if replaying else {})
    x, i, z = (torch.cat(column) for column in zip(*caught, strict=True))
    seen = of(parts.task).rows(x.contiguous(), rows.y[i], rows.ids[i])
    held = Memory(parts.rule.memory).add(seen, z, generator=torch.Generator().manual_seed(seeded(memory)))
    tensors, numbers = held.packed()
    parts.store.put(memory, tensors, part=f"memory of {name}", parent=key)
    parts.put(key, model, name, parent)
    return numbers


def _descend(parts: Parts, model: nn.Module, key: str, new: Batches, first: Callable[[Batch], Tensor], past: Mapping[str, tuple[Memory, Tensor]]) -> None:
    """Train `model` on first(new batch) + (1/P) sum of the replayed losses of the P past tasks. All randomness is that of the key."""
    share = max(1, parts.rule.replay // max(1, len(past)))
    streams = [_rounds(parts, memory.rows(), share, len(new), _seed(key, name)) for name, (memory, _) in past.items()]

    def loss(batch: tuple[Batch, ...]) -> Tensor:
        value = first(batch[0])
        old = [_replay(parts, model, b, memory, at) for b, (memory, at) in zip(batch[1:], past.values(), strict=True)]
        return value + torch.stack(old).mean() if old else value

    with _alone(model, seeded(key), parts.training.threads):
        session = scratch(model)
        session.train()
        descend(session, loss, Paired(new, *streams), **parts.training.options())
    model.eval()
    if not all(bool(torch.isfinite(t).all()) for t in session.tensors().values() if t.is_floating_point()):
        raise Diverged("the network holds values that are not finite after learning; lower lr")


def _replay(parts: Parts, model: nn.Module, batch: Batch, memory: Memory, classes: Tensor) -> Tensor:
    out = restricted(parts.task.forward(model, batch), classes)
    return replayed(out, memory.logits[batch["i"]], alpha=parts.rule.alpha, beta=parts.rule.beta).mean()


def _rounds(parts: Parts, rows: Records, size: int, steps: int, seed: int) -> Batches:
    """`steps` batches over the rows, round after round in a new order."""
    return parts.task.batches(rows, size, epochs=steps / -(-len(rows) // size), seed=seed)


def _seed(key: str, name: str) -> int:
    """Seed of the replay of one task while `key` is trained."""
    return seeded(hashlib.sha256(f"{key}/{name}".encode()).hexdigest())


@contextmanager
def _alone(model: nn.Module, seed: int, threads: int) -> Iterator[None]:
    """Inside: `threads` threads, global generators seeded (dropout), and a guard of its own, so that nothing around decides what is learned."""
    with limited(threads), reseeded(seed), guard.watching(guard.Guard(label="learning", max_loss=1e6)):
        yield
