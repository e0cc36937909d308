"""CLPU-DER++: a stream of tasks that are remembered, learned for a time, or forgotten; forgetting detaches a side network and is exact.

    e = begin(model, task, folder="stream")              # or load("stream", model, task)
    e.learn("a", data)                                   # R  into the main network, with replay of what it remembers
    e.learn("b", more, how="temporary")                  # T  into a side network and a memory of its own; the main network stays as it is
    e.plan("b"); e.forget("b")                           # F  both are deleted: nothing else had seen b
    e.learn("b", how="remember")                         #    or consolidate: the memory of b, with the logits of its side network, is distilled into main
    e.predict("a", x)

    R            mean_B CE(f(x), y) + (1/P) sum over the P remembered tasks t' of mean_m [ alpha MSE(f(x_m), z_m) + beta CE(f(x_m), y_m) ]
    T            mean_B CE(f(x), y)
    R after T    mean_m [ alpha MSE(f(x_m), z_m) + beta CE(f(x_m), y_m) ] over the memory of t, plus the same (1/P) sum as in R

f gives the logits of the classes of the task at hand, and of no others; z are the logits that stood when a record entered the memory (`data.memory`).

Law: after any stream, the main network and the memories of remembered tasks are bit for bit, files too, those of the stream without the tasks that were
forgotten. Every network and memory is named by a key made of all that it depends on (its parent, the records, the memories replayed, classes, task id,
settings), and its seed is made of the key: no random number that a temporary task draws reaches another. What the guarantee leaves out: the book keeps the
ids of forgotten tasks, so that forgetting twice can be told from a mistake; records that stand in a remembered task too stay there; folders that `save` wrote,
and models taken from here, are copies that no `forget` reaches.

Paper    Liu, Liu and Stone, "Continual Learning and Private Unlearning", CoLLAs 2022, arXiv:2203.12817.
Code     Cranial-XIX/Continual-Learning-Private-Unlearning, MIT.
Card     clpu-der; the loss of replay: continual-retention, loss 3 (`losses.continual.derpp`).
Differs  Other tasks' logits are left out; the code writes -1e11 over them in `.data`: the same loss, without an alias. Records are offered to the memory
         once, in the last epoch of learning, with inputs and logits as training saw them; the code offers them in every epoch, and on a rejection writes
         over the last slot. A temporary task starts from a copy of the main network (use_pretrain) or from fresh weights. Records of a task are
         sorted by id, so that their order does not matter; an augmentation counts in the key as there or not. Consolidation takes as many steps as
         learning the task took, unless `iterations` says else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge import guard
from expunge.data.memory import Memory
from expunge.errors import Diverged, ModelError, SettingError, SplitError, StoreError, suggest
from expunge.exact.adapters import Start
from expunge.exact.adapters import load as fill
from expunge.exact.build import Training, limited, seeded, start_digest
from expunge.exact.store import VERSION, Store
from expunge.losses.continual import derpp
from expunge.patch import write
from expunge.session import scratch
from expunge.training import fresh, outputs
from expunge.types import Batch, Batches, Examples, Out, Paired, Task, device_of
from expunge.updates.descend import descend

HOW = ("remember", "temporary")
DEFAULTS = {"lr": 0.01, "momentum": 0.0, "weight_decay": 5e-4}
"""Of `build.Training`, where the paper's differ from its own."""


@dataclass(frozen=True)
class Rule:
    """How tasks are learned and remembered.

    epochs        passes over a task's records                     use_pretrain   side networks start from the main network, else from fresh weights
    memory        most records kept of each task                   iterations     steps of a consolidation; 0: as many as learning the task took
    replay        records of the memories per step, shared by the remembered tasks
    alpha, beta   weights of the distance to the old logits, and of the loss on the old labels
    """

    epochs: int = 10
    memory: int = 200
    replay: int = 32
    alpha: float = 0.5
    beta: float = 1.0
    use_pretrain: bool = True
    iterations: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("memory", 1), ("replay", 1), ("iterations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingError(f"{name} must be a whole number of {least} or more, not {value}")
        for name in ("alpha", "beta"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise SettingError(f"{name} must be a finite number of 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Entry:
    """A task that stands: remember or temporary, its classes, the keys of its side network ("" once it is remembered) and memory, the memory's numbers."""

    how: str
    classes: tuple[int, ...]
    network: str
    memory: str
    numbers: Mapping[str, int]


@dataclass(frozen=True)
class State:
    """What is in force: the key of the main network, the tasks that stand (remembered ones in their order), ids of forgotten ones.

    pending    a temporary task whose consolidation began: cut short by a kill, it is finished on loading
    """

    main: str
    tasks: Mapping[str, Entry] = field(default_factory=dict)
    forgotten: frozenset[str] = frozenset()
    pending: str = ""

    def files(self) -> dict[str, str]:
        """Part -> key: `main`, `network of b`, `memory of b`."""
        out = {"main": self.main}
        for name, entry in self.tasks.items():
            out |= {f"network of {name}": entry.network} if entry.network else {}
            out[f"memory of {name}"] = entry.memory
        return out


@dataclass(frozen=True)
class Removal:
    """What forgetting a task removes: no network is trained for it.

    already    it was forgotten before: nothing happens
    parts      parts that go, each with the SHA-256 of its file          bytes, weights, records    of them: on disk, of the side network, in the memory
    seen       records the task was learned from
    """

    task: str
    already: bool
    parts: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    weights: int = 0
    records: int = 0
    seen: int = 0

    def __str__(self) -> str:
        if self.already:
            return f"nothing to do: task {self.task} was forgotten before"
        return f"task {self.task}: a side network of {self.weights:,} weights and {self.records} records in memory go ({self.bytes:,} bytes); no training"


@dataclass(frozen=True)
class Forgotten:
    """What a forgetting did. before, after: part -> {"key", "sha256"} of its file."""

    removal: Removal
    before: Mapping[str, Mapping[str, str]]
    after: Mapping[str, Mapping[str, str]]
    removed: int
    assurance: str = "exact"

    @property
    def holds(self) -> bool:
        """All that stood is what it was, in key and bytes, but for what was to go, and that is gone."""
        return dict(self.after) == {n: f for n, f in self.before.items() if n not in self.removal.parts}

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        return str(self.removal) if self.removal.already else f"{self.removal}; {len(self.after)} part(s) equal to the bit"


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


class Clpu:
    """A stream over a store. Made by `begin` or `load`."""

    def __init__(self, store: Store, model: nn.Module, task: Task, rule: Rule, training: Training, config: Mapping[str, Any], state: State) -> None:
        self.store, self.task, self.rule, self.training, self.state = store, task, rule, training, state
        self._model, self._config = model, config
        self._nets: dict[str, nn.Module] = {}

    def __repr__(self) -> str:
        return f"Clpu({len(self.of('remember'))} tasks remembered, {len(self.of('temporary'))} temporary, {len(self.state.forgotten)} forgotten)"

    def of(self, how: str) -> list[str]:
        """Ids of the tasks in that state, in order."""
        return [n for n, entry in self.state.tasks.items() if entry.how == how]

    # ---------------------------------------------------------------- R and T

    def learn(self, task_id: str | int, data: Examples | None = None, how: str = "remember", *, classes: tuple[int, ...] = ()) -> None:
        """R or T: learn a task; R of a temporary task, without data, consolidates it.

        data       Examples with unique ids, labels (N,)
        how        remember: in the main network, for good; temporary: in a side network, until it is forgotten or consolidated
        classes    the classes that the task chooses among; those in the data when empty

        Cut short by a kill, learning from data left nothing: call it again, and the bits are the same. A consolidation is finished on loading. A task
        that was forgotten may be learned again. Raises SettingError for a task that stands already, SplitError for bad records, Diverged.
        """
        name = _name(task_id)
        if how not in HOW:
            raise SettingError(suggest("no way to learn", how, HOW))
        self._settle()
        held = self.state.tasks.get(name)
        if held is not None:
            if held.how == "remember" or how == "temporary":
                raise SettingError(
                    f"task {name} stands already ({held.how}); learn another task id" + ("" if held.how == "remember" else ", or forget it first")
                )
            if data is not None:
                raise SettingError(f"task {name} was learned temporarily: consolidating reads its memory alone, so leave out data (or forget it first)")
            self._commit(replace(self.state, pending=name))
            return self._settle()
        if data is None:
            raise SettingError(f"task {name} is new: learning it needs data; only a temporary task is consolidated without")
        rows, chosen = self._ready(data, classes)
        kept = how == "remember"
        parent = self.state.main if kept or self.rule.use_pretrain else ""
        facts = [rows.ids.tolist(), rows.digest, rows.augment is not None, chosen]
        key = self._key(how, name, parent, *facts, *(self._past() if kept else ()))
        memory = self._key("memory", name, key)
        numbers = self._learned(name, key, memory, parent, rows, chosen, replaying=kept)
        entry = Entry(how, chosen, "" if kept else key, memory, numbers)
        tasks = {**self.state.tasks, name: entry}
        self._commit(replace(self.state, main=key if kept else self.state.main, tasks=tasks, forgotten=self.state.forgotten - {name}))

    def _learned(self, name: str, key: str, memory: str, parent: str, rows: Examples, chosen: tuple[int, ...], *, replaying: bool) -> Mapping[str, int]:
        """Train the network `key` on the rows, fill the memory on the way, write both; returns the memory's numbers."""
        model = copy.deepcopy(self._net(parent)) if parent else fresh(self._model, seeded(key))
        new = self.task.batches(rows, self.training.batch_size, epochs=self.rule.epochs, seed=seeded(key))
        at, caught, step = torch.tensor(chosen), [], 0

        def first(batch: Batch) -> Tensor:
            nonlocal step
            out, step = restricted(self.task.forward(model, batch), at), step + 1
            if step > len(new) - new.per_epoch:
                caught.append((batch["x"].detach().cpu(), batch["i"], out.logits.detach().cpu()))
            return out.mean.mean()

        self._descend(model, key, new, first, self._memories() if replaying else {})
        x, i, z = (torch.cat(column) for column in zip(*caught, strict=True))
        seen = Examples(x.contiguous(), rows.y[i], rows.ids[i])
        held = Memory(self.rule.memory).add(seen, z, generator=torch.Generator().manual_seed(seeded(memory)))
        tensors, numbers = held.packed()
        self.store.put(memory, tensors, part=f"memory of {name}", parent=key)
        self._put(key, model, name, parent)
        return numbers

    def _settle(self) -> None:
        """R after T: carry out the consolidation that is pending."""
        name = self.state.pending
        if not name:
            return
        held, past = self.state.tasks[name], self._past()
        key = self._key("consolidate", name, self.state.main, held.network, held.memory, *past)
        if not self.store.has(key):
            memory, at = self._memory(name), torch.tensor(held.classes)
            model, mine = copy.deepcopy(self._net(self.state.main)), memory.rows()
            steps = self.rule.iterations or self.rule.epochs * -(-memory.num_seen // self.training.batch_size)
            new = self._rounds(mine, self.training.batch_size, steps, seeded(key))
            try:
                self._descend(model, key, new, lambda b: self._replay(model, b, memory, at), self._memories())
            except Diverged:
                self._commit(replace(self.state, pending=""))
                raise
            self._put(key, model, name, self.state.main)
        others = {n: entry for n, entry in self.state.tasks.items() if n != name}
        self._commit(State(key, {**others, name: replace(held, how="remember", network="")}, self.state.forgotten))

    def _descend(self, model: nn.Module, key: str, new: Batches, first: Callable[[Batch], Tensor], past: Mapping[str, tuple[Memory, Tensor]]) -> None:
        """Train `model` on first(new batch) + (1/P) sum of the replayed losses of the P past tasks. All randomness is that of the key."""
        share = max(1, self.rule.replay // max(1, len(past)))
        streams = [self._rounds(memory.rows(), share, len(new), _seed(key, name)) for name, (memory, _) in past.items()]

        def loss(batch: tuple[Batch, ...]) -> Tensor:
            value = first(batch[0])
            old = [self._replay(model, b, memory, at) for b, (memory, at) in zip(batch[1:], past.values(), strict=True)]
            return value + torch.stack(old).mean() if old else value

        with _alone(model, seeded(key), self.training.threads):
            session = scratch(model)
            session.train()
            descend(session, loss, Paired(new, *streams), **self.training.options())
        model.eval()
        if not all(bool(torch.isfinite(t).all()) for t in session.tensors().values() if t.is_floating_point()):
            raise Diverged("the network holds values that are not finite after learning; lower lr")

    def _replay(self, model: nn.Module, batch: Batch, memory: Memory, classes: Tensor) -> Tensor:
        out = restricted(self.task.forward(model, batch), classes)
        return replayed(out, memory.logits[batch["i"]], alpha=self.rule.alpha, beta=self.rule.beta).mean()

    def _rounds(self, rows: Examples, size: int, steps: int, seed: int) -> Batches:
        """`steps` batches over the rows, round after round in a new order."""
        return self.task.batches(rows, size, epochs=steps / -(-len(rows) // size), seed=seed)

    # ---------------------------------------------------------------- F

    def plan(self, task_id: str | int) -> Removal:
        """What `forget` would remove. Raises SplitError for a task that was never learned, or is remembered."""
        name = _name(task_id)
        if name in self.state.forgotten:
            return Removal(name, True)
        held = self._held(name)
        if held.how == "remember":
            raise SplitError(
                f"task {name} is remembered: the main network holds it and nothing can be detached; only tasks learned with how='temporary' are forgotten "
                f"exactly. Way out: an approximate method on module('{name}') ({_approximate()}), or learn all but this task in a new folder"
            )
        keys = {f"network of {name}": held.network, f"memory of {name}": held.memory}
        memory, weights = self._memory(name), sum(p.numel() for p in self._model.parameters())
        size = sum(self.store.path(k).stat().st_size for k in keys.values())
        return Removal(name, False, {n: self.store.digest(k) for n, k in keys.items()}, size, weights, len(memory), memory.num_seen)

    def forget(self, task_id: str | int) -> Forgotten:
        """F: delete side network and memory of a temporary task, also one whose consolidation was cut short. A second time nothing happens, and the
        answer says so (`removal.already`).

        True from the moment the book no longer names them; files that a kill left behind are removed on loading. Raises SplitError as `plan` does.
        """
        removal, before = self.plan(task_id), self._digests()
        if removal.already:
            return Forgotten(removal, before, before, 0)
        name = removal.task
        tasks = {n: entry for n, entry in self.state.tasks.items() if n != name}
        pending = "" if self.state.pending == name else self.state.pending
        removed = self._commit(State(self.state.main, tasks, self.state.forgotten | {name}, pending))
        return Forgotten(removal, before, self._digests(), removed)

    # ---------------------------------------------------------------- use

    def module(self, task_id: str | int) -> Masked:
        """(B, ...) inputs -> (B, C) log probabilities, those of other tasks' classes the least number: a copy for audits, reports and approximate methods.
        Raises SplitError for a task that was forgotten or never learned.
        """
        held = self._held(_name(task_id))
        return Masked(copy.deepcopy(self._net(held.network or self.state.main)), held.classes).eval()

    def predict(self, task_id: str | int, x: Tensor) -> Tensor:
        """(B, ...) inputs -> (B, C) probabilities, 0 for classes of other tasks. A temporary task is answered by its side network. Raises as `module`."""
        held = self._held(_name(task_id))
        net = self._net(held.network or self.state.main)
        zeros = torch.zeros(len(x), dtype=torch.long)
        with limited(self.training.threads):
            logits = outputs(net, self.task, Examples(x, zeros, zeros))
        return masked(logits, held.classes).exp()

    def save(self, folder: Path | str) -> Path:
        """Write what predicts and no record: one safetensors file per network, and `clpu.json` with the classes of each task. Networks of tasks that
        stand no more are removed from a folder that was written before. Returns the folder.
        """
        from safetensors.torch import save

        folder = Path(folder)
        tasks = {n: {"file": f"network-{n if e.network else 'main'}.safetensors", "classes": list(e.classes)} for n, e in self.state.tasks.items()}
        nets = {"network-main.safetensors": self.state.main} | {f"network-{n}.safetensors": e.network for n, e in self.state.tasks.items() if e.network}
        write(folder / "clpu.json", json.dumps({"tasks": tasks}, indent=1))
        for path in folder.glob("network-*.safetensors"):
            if path.name not in nets:
                path.unlink()
        for file, key in nets.items():
            write(folder / file, save(_tensors(self._net(key)), {"format": "pt"}))
        return folder

    def check(self) -> int:
        """Read every part in force and compare it with its digest; returns how many. Raises StoreError with the name of the first that was changed."""
        for part, key in self.state.files().items():
            self._get(part, key)
        return len(self.state.files())

    # ---------------------------------------------------------------- the store

    def _commit(self, state: State) -> int:
        """Put a state in force; returns how many files that it does not name were removed."""
        tasks = [{"task": n, **asdict(entry)} for n, entry in state.tasks.items()]
        doc = {"config": dict(self._config), "main": state.main, "tasks": tasks, "forgotten": sorted(state.forgotten), "pending": state.pending}
        self.store.write_book(doc)
        self.state = state
        keys = set(state.files().values())
        self._nets = {k: net for k, net in self._nets.items() if k in keys}
        return self.store.keep(keys)

    def _get(self, part: str, key: str) -> dict[str, Tensor]:
        if not self.store.has(key):
            raise StoreError(f"{part}: checkpoint {key[:12]} is missing from {self.store.folder.name}, and what it was learned from is not kept here")
        try:
            return self.store.get(key)
        except StoreError as error:
            raise StoreError(f"{part}: {error}") from None

    def _put(self, key: str, model: nn.Module, name: str, parent: str) -> None:
        self.store.put(key, _tensors(model), part=f"network after {name}", parent=parent)

    def _net(self, key: str) -> nn.Module:
        """The network of a key in force, in eval mode; not to be written to."""
        if key not in self._nets:
            part = next(n for n, k in self.state.files().items() if k == key)
            net = copy.deepcopy(self._model)
            fill(net, self._get(part, key))
            self._nets[key] = net.eval()
        return self._nets[key]

    def _memory(self, name: str) -> Memory:
        entry = self.state.tasks[name]
        return Memory.unpacked(self._get(f"memory of {name}", entry.memory), entry.numbers)

    def _memories(self) -> dict[str, tuple[Memory, Tensor]]:
        """Memory and classes of every remembered task: what is replayed. Temporary tasks never are."""
        return {n: (self._memory(n), torch.tensor(self.state.tasks[n].classes)) for n in self.of("remember")}

    def _past(self) -> list[list[str]]:
        return [[n, self.state.tasks[n].memory] for n in self.of("remember")]

    def _key(self, kind: str, name: str, parent: str, *facts: Any) -> str:
        return hashlib.sha256(json.dumps([VERSION, "clpu", kind, name, parent, facts, self._config], sort_keys=True).encode()).hexdigest()

    def _digests(self) -> dict[str, dict[str, str]]:
        return {n: {"key": k, "sha256": self.store.digest(k)} for n, k in self.state.files().items()}

    def _held(self, name: str) -> Entry:
        if name in self.state.forgotten:
            raise SplitError(f"task {name} was forgotten: no network of it is left to predict with")
        if name not in self.state.tasks:
            raise SplitError(suggest("no task", name, self.state.tasks))
        return self.state.tasks[name]

    def _ready(self, data: Examples, classes: tuple[int, ...]) -> tuple[Examples, tuple[int, ...]]:
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
        width = outputs(self._model, self.task, Examples(rows.x[:1], torch.zeros(1, dtype=torch.long), rows.ids[:1])).shape[-1]
        if chosen[0] < 0 or chosen[-1] >= width:
            raise SplitError(f"the model has classes 0 to {width - 1}; the task names {chosen[0] if chosen[0] < 0 else chosen[-1]}")
        return rows, chosen


class Masked(nn.Module):
    """A network restricted to some classes, as `masked` does."""

    def __init__(self, net: nn.Module, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.net: nn.Module = net
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, C)."""
        return masked(self.net(x), self.classes)


def masked(logits: Tensor, classes: tuple[int, ...]) -> Tensor:
    """(B, C) log probabilities among these classes; the others have the least number of the type, whose exponential is 0. `logits` is not written to.

    >>> masked(torch.tensor([[9.0, 1.0, 1.0]]), (1, 2)).exp()
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    at = torch.tensor(classes, device=logits.device)
    least = torch.full_like(logits, torch.finfo(logits.dtype).min)
    return least.index_copy(1, at, logits.index_select(1, at).log_softmax(-1))


def begin(model: nn.Module, task: Task, *, folder: Path | str, seed: int = 0, **settings: Any) -> Clpu:
    """Begin a stream in a folder, from the model's weights; on a folder where this very stream began, go on with it.

    model       what the main network starts as; it is copied, and not changed
    task        classification
    settings    fields of `Rule` (epochs 10, memory 200, replay 32, alpha .5, beta 1, use_pretrain True, iterations 0) and of `build.Training` (batch_size 32,
                lr .01, momentum 0, weight_decay 5e-4, optimizer, schedule, threads)
    Raises StoreError where the folder holds something else, SettingError, ModelError.
    """
    from expunge.run import model_digest

    mine = {f.name for f in fields(Rule)}
    known = [*mine, *(f.name for f in fields(Training) if f.name != "stacked")]
    for name in settings:
        if name not in known:
            raise SettingError(suggest("clpu has no setting", name, sorted(known)))
    rule = Rule(**{n: v for n, v in settings.items() if n in mine})
    training = Training(**{**DEFAULTS, **{n: v for n, v in settings.items() if n not in mine}})
    shape = _shape(model, task)
    config = {"clpu": asdict(rule), "training": asdict(training), "seed": int(seed), "model": shape, "start": model_digest(model)}
    store = Store(Path(folder))
    book = store.read_book()
    if book is not None:
        if book.get("config") != config:
            raise StoreError(f"{store.folder.name} holds something else (another stream, model, start or settings); load it, or use an empty folder")
        return load(folder, model, task)
    made = Clpu(store, copy.deepcopy(model).eval(), task, rule, training, config, State(""))
    made.state = State(made._key("start", "", ""))
    store.put(made.state.main, _tensors(model), part="start", parent="")
    made._commit(made.state)
    return made


def load(folder: Path | str, model: nn.Module, task: Task) -> Clpu:
    """The stream of a folder; `model` gives the architecture, its weights are not read. No data are needed.

    A consolidation that was cut short is finished, files that a kill left behind are removed. Raises StoreError for a damaged or foreign store.
    """
    store = Store(Path(folder))
    book = store.read_book()
    if book is None:
        raise StoreError(f"{store.folder.name} holds no stream: there is no book.json in it")
    try:
        config = book["config"]
        rule, training = Rule(**config["clpu"]), Training(**config["training"])
        tasks = {
            e["task"]: Entry(e["how"], tuple(map(int, e["classes"])), e["network"], e["memory"], {n: int(v) for n, v in e["numbers"].items()})
            for e in book["tasks"]
        }
        state = State(book["main"], tasks, frozenset(book["forgotten"]), book["pending"])
        shape = config["model"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"book.json of {store.folder.name} is not that of a stream: {str(error).splitlines()[0][:80]}") from None
    if _shape(model, task) != shape:
        raise StoreError(f"{store.folder.name} was begun with another model: names, types or shapes differ")
    made = Clpu(store, copy.deepcopy(model).eval(), task, rule, training, config, state)
    for part, key in state.files().items():
        if not store.has(key):
            made._get(part, key)
    made._settle()
    store.keep(made.state.files().values())
    return made


def _shape(model: nn.Module, task: Task) -> str:
    if task.name != "classification":
        raise ModelError(f"clpu learns classifiers; the task is {task.name}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("all weights of the model are frozen: nothing could be learned")
    return start_digest(Start(model))


def _name(task_id: str | int) -> str:
    name = str(task_id)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name == "main":
        raise SettingError(f"a task id is 1 to 64 letters, digits, '.', '_' or '-', and not main; found '{name[:80]}'")
    return name


def _approximate() -> str:
    """Names of methods that could be tried on what cannot be detached."""
    from expunge.registry import METHODS

    fit = [n for n, m in METHODS.items() if m.assurance == "approximate" and "classification" in m.tasks and set(m.needs) == {"forget", "retain"}]
    return f"{', '.join(fit[:4])} and {len(fit) - 4} more"


def _seed(key: str, name: str) -> int:
    """Seed of the replay of one task while `key` is trained."""
    return seeded(hashlib.sha256(f"{key}/{name}".encode()).hexdigest())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().cpu().contiguous().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}


@contextmanager
def _alone(model: nn.Module, seed: int, threads: int) -> Iterator[None]:
    """Inside: `threads` threads, global generators seeded (dropout), and a guard of its own, so that nothing around decides what is learned."""
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with limited(threads), torch.random.fork_rng(devices=devices), guard.watching(guard.Guard(label="learning", max_loss=1e6)):
        torch.manual_seed(seed)
        yield
