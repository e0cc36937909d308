"""The face of a stream, and how one is begun and opened again."""

from __future__ import annotations

import copy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError, StoreError, suggest
from expunge.core.modality import of
from expunge.core.types import Records, Task
from expunge.guarantees.exact.adapters import Start
from expunge.guarantees.exact.build import Training, start_digest
from expunge.guarantees.exact.clpu import answers, deletion
from expunge.guarantees.exact.clpu.learning import learned, settle
from expunge.guarantees.exact.clpu.parts import Parts, tensors
from expunge.guarantees.exact.clpu.state import DEFAULTS, HOW, Rule, State, named, stated
from expunge.guarantees.exact.store import Store


class Clpu:
    """A stream over a store. Made by `begin` or `load`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.store, self.task, self.rule, self.training = parts.store, parts.task, parts.rule, parts.training

    def __repr__(self) -> str:
        return f"Clpu({len(self.of('remember'))} tasks remembered, {len(self.of('temporary'))} temporary, {len(self.state.forgotten)} forgotten)"

    @property
    def state(self) -> State:
        """What is in force."""
        return self.parts.state

    def of(self, how: str) -> list[str]:
        """Ids of the tasks in that state, in order."""
        return self.state.of(how)

    def learn(self, task_id: str | int, data: Records | None = None, how: str = "remember", *, classes: tuple[int, ...] = ()) -> None:
        """R or T: learn a task; R of a temporary task, without data, consolidates it.

        data       Records with unique ids, labels (N,)
        how        remember: in the main network, for good; temporary: in a side network, until it is forgotten or consolidated
        classes    the classes that the task chooses among; those in the data when empty

        Cut short by a kill, learning from data left nothing: call it again, and the bits are the same. A consolidation is finished on loading. A task
        that was forgotten may be learned again. Raises SettingError for a task that stands already, SplitError for bad records, Diverged.
        """
        name = named(task_id)
        if how not in HOW:
            raise SettingError(suggest("no way to learn", how, HOW))
        settle(self.parts)
        held = self.state.tasks.get(name)
        if held is not None:
            if held.how == "remember" or how == "temporary":
                raise SettingError(
                    f"task {name} stands already ({held.how}); learn another task id" + ("" if held.how == "remember" else ", or forget it first")
                )
            if data is not None:
                raise SettingError(f"task {name} was learned temporarily: consolidating reads its memory alone, so leave out data (or forget it first)")
            self.parts.commit(replace(self.state, pending=name))
            return settle(self.parts)
        if data is None:
            raise SettingError(f"task {name} is new: learning it needs data; only a temporary task is consolidated without")
        learned(self.parts, name, data, how, classes)

    def plan(self, task_id: str | int) -> deletion.Removal:
        """What `forget` would remove. Raises SplitError for a task that was never learned, or is remembered."""
        return deletion.plan(self.parts, named(task_id))

    def forget(self, task_id: str | int) -> deletion.Forgotten:
        """F: delete side network and memory of a temporary task, also one whose consolidation was cut short. A second time nothing happens, and the
        answer says so (`removal.already`).

        True from the moment the book no longer names them; files that a kill left behind are removed on loading. Raises SplitError as `plan` does.
        """
        return deletion.forget(self.parts, named(task_id))

    def module(self, task_id: str | int) -> answers.Masked:
        """(B, ...) inputs -> (B, C) log probabilities, those of other tasks' classes the least number: a copy for audits, reports and approximate methods.
        Raises SplitError for a task that was forgotten or never learned.
        """
        return answers.module(self.parts, named(task_id))

    def predict(self, task_id: str | int, x: Tensor) -> Tensor:
        """(B, ...) inputs -> (B, C) probabilities, 0 for classes of other tasks. A temporary task is answered by its side network. Raises as `module`."""
        return answers.predict(self.parts, named(task_id), x)

    def save(self, folder: Path | str) -> Path:
        """Write what predicts and no record: one safetensors file per network, and `clpu.json` with the classes of each task. Networks of tasks that
        stand no more are removed from a folder that was written before. Returns the folder.
        """
        return answers.save(self.parts, folder)

    def check(self) -> int:
        """Read every part in force and compare it with its digest; returns how many. Raises StoreError with the name of the first that was changed."""
        return self.parts.check()


def begin(model: nn.Module, task: Task, *, folder: Path | str, seed: int = 0, **settings: Any) -> Clpu:
    """Begin a stream in a folder, from the model's weights; on a folder where this very stream began, go on with it.

    model       what the main network starts as; it is copied, and not changed
    task        classification
    settings    fields of `Rule` (epochs 10, memory 200, replay 32, alpha .5, beta 1, use_pretrain True, iterations 0) and of `build.Training` (batch_size 32,
                lr .01, momentum 0, weight_decay 5e-4, optimizer, schedule, threads)
    Raises StoreError where the folder holds something else, SettingError, ModelError.
    """
    from expunge.core.digest import model_digest

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
    parts = Parts(store, copy.deepcopy(model).eval(), task, rule, training, config, State(""))
    main = parts.key("start", "", "")
    store.put(main, tensors(model), part="start", parent="")
    parts.commit(State(main))
    return Clpu(parts)


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
        state = stated(book)
        shape = config["model"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"book.json of {store.folder.name} is not that of a stream: {str(error).splitlines()[0][:80]}") from None
    if _shape(model, task) != shape:
        raise StoreError(f"{store.folder.name} was begun with another model: names, types or shapes differ")
    parts = Parts(store, copy.deepcopy(model).eval(), task, rule, training, config, state)
    for part, key in state.files().items():
        if not store.has(key):
            parts.get(part, key)
    settle(parts)
    store.keep(parts.state.files().values())
    return Clpu(parts)


def _shape(model: nn.Module, task: Task) -> str:
    if not of(task).labelled:
        raise ModelError(f"clpu learns classifiers; the task is {task.name}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("all weights of the model are frozen: nothing could be learned")
    return start_digest(Start(model))
