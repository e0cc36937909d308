"""`fit / forget / predict / save`: an ensemble that records can be taken out of, exactly.

Law: after `forget(S)` every component is bit for bit what a fresh `fit` without S makes of it, in the same layout. That is shown, not claimed: keys name all
that a component depends on, and a `Proof` lists keys and file digests before and after. What the guarantee leaves out: weights that were given (a backbone
and its own training data), and requests that were made after looking at released models (card sisa, pitfalls; card forget-unlearning-noisy-gd says why).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import DataError, ModelError, SettingError, SplitError, StoreError
from expunge.core.files import write
from expunge.core.guard import quiet
from expunge.core.modality import of
from expunge.core.types import Records, Task
from expunge.guarantees.exact import layout as layouts
from expunge.guarantees.exact.adapters import Start, start
from expunge.guarantees.exact.build import Training, build, keyed, limited, standing, start_digest
from expunge.guarantees.exact.design import Cell, Component, Design, design
from expunge.guarantees.exact.proof import Proof, Touch
from expunge.guarantees.exact.store import Store

Progress = Callable[[str, int, int], None] | None
AGGREGATES = ("mean", "vote", "logits")


@dataclass(frozen=True)
class State:
    """What is in force: place of every record that was ever there, those that went, components that were detached, and keys of those that stand."""

    places: Mapping[int, Cell]
    gone: frozenset[int] = frozenset()
    detached: frozenset[str] = frozenset()
    keys: Mapping[str, str] = field(default_factory=dict)
    pending: tuple[int, ...] = ()
    """Records that are on their way out: a deletion that a kill cut short is finished on loading."""
    detaching: bool = False
    """Whether the pending deletion detaches."""


class Exact:
    """An ensemble over a store. Made by `fit` or `load`.

    aggregate   mean of the members' probabilities, vote (each member's class counts one), or logits (mean of logits, as S3T does)
    """

    def __init__(
        self, store: Store, plan: Design, task: Task, data: Records, first: Start, training: Training, state: State, config: Mapping[str, Any],
        backbone: nn.Module | None, aggregate: str, workers: int, engine: str,
    ) -> None:  # fmt: skip
        self.store, self.design, self.task, self.training, self.state, self.aggregate = store, plan, task, training, state, aggregate
        self._data, self._start, self._config, self._backbone, self._workers, self._engine = data, first, config, backbone, workers, engine
        self._members: list[nn.Module] | None = None

    def __repr__(self) -> str:
        return (
            f"Exact({self.design.name}: {len(self.state.places) - len(self.state.gone):,} records in {self.design.shards} shards, "
            f"{len(self.state.keys)} of {len(self.design.components)} components stand, {len(self.state.gone)} records deleted)"
        )

    # ---------------------------------------------------------------- what stands

    @property
    def ids(self) -> list[int]:
        """Records that are in, sorted."""
        return sorted(set(self.state.places) - self.state.gone)

    def records(self, name: str) -> list[int]:
        """Ids of the records that a component learns from: the data-to-parameter map."""
        found = {c.name: c for c in self.design.components}
        if name not in found:
            raise SettingError(f"no component '{name}'; the first is '{self.design.components[0].name}'")
        cells = set(found[name].cells)
        return [i for i in self.ids if self.state.places[i] in cells]

    def tips(self) -> dict[int, Component]:
        """Shard -> the component that predicts for it: of those that stand, the one with the most cells."""
        out: dict[int, Component] = {}
        for c in self.design.components:
            if c.name in self.state.keys and (c.shard not in out or len(c.cells) > len(out[c.shard].cells)):
                out[c.shard] = c
        return out

    # ---------------------------------------------------------------- deletion

    def plan(self, ids: Iterable[int], *, detach: bool | None = None) -> Touch:
        """What `forget(ids)` would touch, train and cost. Raises SplitError for a record that was never there or whose shard was declared safe."""
        asked = list(dict.fromkeys(int(i) for i in ids))
        self._known(asked)
        already = tuple(i for i in asked if i in self.state.gone)
        going = tuple(i for i in asked if i not in self.state.gone)
        touched = self._touched(going)
        after = replace(self.state, gone=self.state.gone | set(going))
        away = touched if self._detaches(detach) else []
        retrain = [] if self._detaches(detach) else [n for n in touched if n not in self.state.detached]
        if away and not self._left(away):
            away, retrain = [], [c.name for c in self.design.components if c.name in {*touched, *self.state.detached}]
        cost = self._cost(after)
        retrain = [n for n in retrain if cost[n]]
        examples = sum(cost[n] for n in retrain)
        return Touch(going, already, tuple(retrain), tuple(away), len(self.state.keys) - len(touched), examples, examples / max(1, sum(cost.values())))

    def forget(self, ids: Iterable[int], *, detach: bool | None = None, progress: Progress = None) -> Proof:
        """Delete records. detach: take touched components away and train later (`refit`); None does what the design does.

        When nothing would be left to predict with, what was detached is trained at once. The request is written down before anything else: killed at any
        moment, it is finished on loading.
        """
        began, touch = time.perf_counter(), self.plan(ids, detach=detach)
        before = self._files()
        if touch.ids:
            self._commit(replace(self.state, pending=touch.ids, detaching=self._detaches(detach)))
        trained, removed = self._settle(progress) if touch.ids else ([], 0)
        after = self._files()
        touched = tuple(n for n in before if before[n] != after.get(n))
        untouched = tuple(n for n in before if before[n] == after.get(n))
        seconds = time.perf_counter() - began
        return Proof(touch.ids, touch.already, touched, untouched, tuple(trained), before, after, touch.examples, touch.share, seconds, removed)

    def refit(self, *, progress: Progress = None) -> list[str]:
        """Train again what deletions detached, on the records that are left; returns the names."""
        again = replace(self.state, detached=frozenset())
        return self._stand(again, progress)

    def _settle(self, progress: Progress) -> tuple[list[str], int]:
        """Carry out the pending deletion."""
        touched, gone, detached = self._touched(self.state.pending), self.state.gone | set(self.state.pending), self.state.detached
        if self.state.detaching:
            detached = detached | set(touched) if self._left(touched) else frozenset()
        self._data = self._data.take([k for k, i in enumerate(self._data.ids.tolist()) if i not in gone])
        trained = self._stand(State(self.state.places, gone, detached), progress)
        return trained, self.store.keep(self.state.keys.values())

    def _stand(self, state: State, progress: Progress) -> list[str]:
        """Train what is missing for `state`, then put it in force."""
        self._members = None
        rows = self._rows(state)
        keys = keyed(self.design, rows, self._data, self.training, self._config["start"])
        names = [c.name for c in self.design.components if c.name not in state.detached and rows[c.name]]
        trained = build(
            self.store,
            self.design,
            self._start,
            self.task,
            self._data,
            rows,
            keys,
            names,
            self.training,
            workers=self._workers,
            engine=self._engine,
            progress=progress,
        )
        self._commit(replace(state, keys={n: keys[n] for n in names}, pending=()))
        return trained

    def _commit(self, state: State) -> None:
        doc = {
            "config": dict(self._config), "places": {str(i): list(c) for i, c in state.places.items()}, "gone": sorted(state.gone),
            "detached": sorted(state.detached), "keys": dict(state.keys), "pending": list(state.pending), "detaching": state.detaching,
        }  # fmt: skip
        self.store.write_book(doc)
        self.state = state

    def _known(self, asked: Sequence[int]) -> None:
        for i in asked:
            if i not in self.state.places:
                raise SplitError(f"record {i} is not in this ensemble and never was; it has {len(self.state.places):,} records")
            if self.state.places[i][0] in self.design.never:
                raise SplitError(
                    f"record {i} lies in shard {self.state.places[i][0]}, which was declared safe: others read it because nobody can ask for its records"
                )

    def _detaches(self, detach: bool | None) -> bool:
        return self.design.detach if detach is None else detach

    def _touched(self, going: Iterable[int]) -> list[str]:
        cells = {self.state.places[i] for i in going}
        return [c.name for c in self.design.components if c.name in self.state.keys and cells & set(c.cells)]

    def _left(self, away: Iterable[str]) -> bool:
        return bool(set(self.state.keys) - set(away))

    def _rows(self, state: State) -> dict[str, list[int]]:
        """Positions in the data of each component's records, by id."""
        held: dict[Cell, list[int]] = {}
        for k, i in enumerate(self._data.ids.tolist()):
            if i in state.places and i not in state.gone:
                held.setdefault(state.places[i], []).append(k)
        return {c.name: sorted(k for cell in c.cells for k in held.get(cell, ())) for c in self.design.components}

    def _cost(self, state: State) -> dict[str, int]:
        """Sample passes of each component."""
        rows = self._rows(state)
        return {c.name: len(rows[c.name]) * c.epochs for c in self.design.components}

    def _files(self) -> dict[str, dict[str, str]]:
        return {n: {"key": k, "sha256": self.store.digest(k)} for n, k in self.state.keys.items()}

    # ---------------------------------------------------------------- use

    def members(self) -> list[nn.Module]:
        """One model per shard that has one, in eval mode."""
        if self._members is None:
            tips = self.tips()
            self._members = [standing(self._start, self.store, self.state.keys[tips[d].name]) for d in sorted(tips)]
        if not self._members:
            raise StoreError("nothing is left to predict with: every record was deleted")
        return self._members

    def module(self) -> nn.Module:
        """The ensemble as one module, (B, ...) inputs -> (B, C) log of what it predicts: for audits, reports and patches, which take any classifier."""
        return Averaged(self.members(), self._backbone, self.aggregate)

    def predict(self, x: Tensor) -> Tensor:
        """(B, ...) inputs -> (B, C) probabilities (shares of votes with `vote`)."""
        module = self.module().eval()
        with torch.no_grad():
            return torch.cat([module(part) for part in x.split(512)]).exp()

    def save(self, folder: Path | str) -> Path:
        """Write what predicts, and nothing that only training needs: one safetensors file per member and `ensemble.json`. Returns the folder."""
        from safetensors.torch import save

        folder, tips = Path(folder), self.tips()
        names = [tips[d].name for d in sorted(tips)]
        for name, member in zip(names, self.members(), strict=True):
            held = {n: t.detach().clone().contiguous() for n, t in {**dict(member.named_parameters()), **dict(member.named_buffers())}.items()}
            write(folder / f"member-{name.replace('/', '-')}.safetensors", save(held, {"format": "pt"}))
        facts = {"aggregate": self.aggregate, "design": self.design.name, "members": [f"member-{n.replace('/', '-')}.safetensors" for n in names]}
        write(folder / "ensemble.json", json.dumps(facts, indent=1))
        return folder

    def check(self) -> int:
        """Read every checkpoint in force and compare it with its digest; returns how many. Raises StoreError with the name of the first that was changed."""
        for key in self.state.keys.values():
            self.store.get(key)
        return len(self.state.keys)


class Averaged(nn.Module):
    """Members side by side; logits are the log of their mean probability, of their shares of votes, or the mean of their logits."""

    def __init__(self, members: Sequence[nn.Module], backbone: nn.Module | None, aggregate: str) -> None:
        super().__init__()
        self.members, self.backbone, self.aggregate = nn.ModuleList(members), backbone, aggregate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, C)."""
        if self.backbone is not None:
            x = self.backbone(x).flatten(1)
        logits = torch.stack([m(x) for m in self.members])
        if self.aggregate == "logits":
            return logits.mean(0).log_softmax(-1)
        if self.aggregate == "vote":
            votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
            return votes.mean(0).clamp_min(1e-12).log()
        return logits.log_softmax(-1).logsumexp(0) - torch.log(torch.tensor(float(len(self.members))))


def fit(
    plan: Design, model: nn.Module, task: Task, data: Records, *, folder: Path | str, backbone: nn.Module | None = None, places: Mapping[int, Cell] | None =
    None, safe: Iterable[int] = (), seed: int = 0, rank: int = 16, aggregate: str = "mean", workers: int = 1, engine: str = "local", progress: Progress = None,
    **training: Any,
) -> Exact:  # fmt: skip
    """Train an ensemble by a design; called again on the folder of a run that was cut short, it trains what is missing.

    model       architecture of a component (sisa, safe: weights are drawn anew), or the frozen model that adapters are put on (s3t: its weights are used)
    data        Records with unique ids
    backbone    frozen module, inputs -> features, that components learn on; None: they learn on the inputs
    places      id -> (shard, slice), for a layout of one's own (`layout.prior`); None hashes ids
    safe        ids of the records in shard 0 of safe(graph="safe"): others read them, nobody may delete them
    training    fields of `build.Training`: batch_size, lr, optimizer, momentum, weight_decay, schedule, stacked, threads
    workers     processes that train shards side by side; engine "ray" uses Ray. Neither changes a bit
    Raises StoreError where the folder holds another ensemble, SplitError for ids that are not unique, SettingError for settings out of range.
    """
    ready, first, how, config = _ready(plan, model, task, data, backbone, seed, rank, aggregate, training)
    store, ids = Store(Path(folder)), ready.ids.tolist()
    where = layouts.checked(places, ids, plan.shards, plan.slices) if places is not None else _spread(plan, ids, [int(i) for i in safe], seed)
    book = store.read_book()
    if book is not None:
        known, gone = {int(i): (int(c[0]), int(c[1])) for i, c in book["places"].items()}, set(book["gone"]) | set(book["pending"])
        if book["config"] != config or where.items() - known.items() or set(known) - gone - set(where):
            raise StoreError(f"{store.folder.name} holds another ensemble (other design, data, model or settings); load it, or use an empty folder")
        return load(folder, model, task, data, backbone=backbone, workers=workers, engine=engine, progress=progress)
    made = Exact(store, plan, task, ready, first, how, State(where), config, backbone, aggregate, workers, engine)
    made._stand(made.state, progress)
    store.keep(made.state.keys.values())
    return made


def load(
    folder: Path | str, model: nn.Module, task: Task, data: Records, *, backbone: nn.Module | None = None, workers: int = 1, engine: str = "local",
    progress: Progress = None,
) -> Exact:  # fmt: skip
    """The ensemble of a folder, over the data that it was fitted on (deleted records may be missing from it, or still be there: they are not read).

    A deletion that was cut short is finished first. Raises StoreError for a damaged or foreign store, DataError for records that are missing or were changed.
    """
    store = Store(Path(folder))
    book = store.read_book()
    if book is None:
        raise StoreError(f"{store.folder.name} holds no ensemble: there is no book.json in it")
    try:
        config = book["config"]
        plan = design(config["design"], config["settings"])
        state = State(
            {int(i): (int(c[0]), int(c[1])) for i, c in book["places"].items()}, frozenset(map(int, book["gone"])), frozenset(book["detached"]),
            dict(book["keys"]), tuple(map(int, book["pending"])), bool(book["detaching"]),
        )  # fmt: skip
        seed, rank, aggregate, training = config["seed"], config["rank"], config["aggregate"], config["training"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StoreError(f"book.json of {store.folder.name} lacks what it should hold: {error}") from None
    out = state.gone | set(state.pending)
    missing = sorted(set(state.places) - out - set(data.ids.tolist()))
    if missing:
        raise DataError(f"{len(missing)} record(s) of the ensemble are not in the data, the first is {missing[0]}")
    keep = [k for k, i in enumerate(data.ids.tolist()) if i in state.places and i not in out]
    ready, first, how, found = _ready(plan, model, task, data.take(keep), backbone, seed, rank, aggregate, training)
    if found["start"] != config["start"]:
        raise StoreError(f"{store.folder.name} was fitted on another model or backbone: names, shapes or frozen weights differ")
    made = Exact(store, plan, task, ready, first, how, state, config, backbone, aggregate, workers, engine)
    if state.pending:
        made._settle(progress)
    else:
        keys = keyed(plan, made._rows(state), ready, how, config["start"])
        changed = next((n for n, k in state.keys.items() if keys.get(n) != k), None)
        if changed is not None:
            raise DataError(f"records of component {changed} are not what it was trained on: data were changed since the ensemble was fitted")
        if any(not store.has(k) for k in state.keys.values()):
            made._stand(state, progress)
        store.keep(made.state.keys.values())
    return made


def _ready(
    plan: Design, model: nn.Module, task: Task, data: Records, backbone: nn.Module | None, seed: int, rank: int, aggregate: str, training: Mapping[str, Any]
):
    """(data sorted by id, behind the backbone; start; training settings; what the book says of all that)."""
    if aggregate not in AGGREGATES:
        raise SettingError(f"aggregate must be one of {', '.join(AGGREGATES)}, not '{aggregate}'")
    try:
        how = Training(**training)
    except TypeError as error:
        raise SettingError(f"exact training: {error}") from None
    ids = data.ids.tolist()
    if len(set(ids)) < len(ids):
        raise SplitError("ids must be unique: a deletion names one record by one id")
    if not of(task).labelled:
        raise ModelError(f"exact ensembles average classifiers; the task is {task.name}")
    data = data.take(sorted(range(len(ids)), key=ids.__getitem__))
    if backbone is not None and len(data):
        if any(p.requires_grad for p in backbone.parameters()):
            raise ModelError("the backbone must be frozen: call backbone.requires_grad_(False), since exact deletion holds for what is trained here alone")
        data = of(task).rows(one_by_one(backbone, data.x, how.threads), data.y, data.ids)
    first = start(model, plan.blocks, rank=rank, seed=seed)
    digest = start_digest(first)
    if backbone is not None:
        from expunge.core.digest import model_digest

        digest = f"{digest}/{model_digest(backbone)}"
    config = {
        "design": plan.name, "settings": json.loads(json.dumps(dict(plan.settings))), "start": digest, "seed": seed, "rank": rank, "aggregate": aggregate,
        "training": asdict(how),
    }  # fmt: skip
    return data, first, how, config


def one_by_one(backbone: nn.Module, x: Tensor, threads: int = 1) -> Tensor:
    """(N, D) features of inputs (N, ...), one pass per record: in a batch, a record's last bits may depend on its neighbours, and so on what was deleted."""
    with limited(threads), quiet(backbone):
        return torch.cat([backbone(x[k : k + 1]).flatten(1) for k in range(len(x))])


def _spread(plan: Design, ids: Sequence[int], safe: Sequence[int], seed: int) -> dict[int, Cell]:
    if not plan.never:
        return layouts.spread(ids, plan.shards, plan.slices, seed)
    if not set(safe) <= set(ids) or not safe:
        raise SplitError("name the records of the safe shard: safe=[ids of the data], which nobody may ask to delete")
    others = layouts.spread([i for i in ids if i not in set(safe)], plan.shards - 1, plan.slices, seed)
    return {**dict.fromkeys(safe, (0, 0)), **{i: (d + 1, s) for i, (d, s) in others.items()}}
