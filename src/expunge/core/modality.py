"""Modalities: what the rest of the package asks of a kind of model, as a record of functions, one per folder of `expunge.modalities`.

    of(task).rules(probe)                     the default gate
    MODALITIES["causal_lm"].options           its part of the command line and of recipes

A folder's `modality.py` makes the record and registers it with `modality(...)`. It names functions by `later("package.module:function")`, so that a
record, whose options the command line reads, is there without PyTorch. A package of someone else's brings one through the entry-point group
`expunge.modalities`: loading the entry point must register it. Outside a modality's folder nothing asks which modality it is; what differs between them is
a field here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError, SettingError, printable, suggest
from expunge.core.lookup import Registry


@dataclass(frozen=True)
class Later:
    """A function that is imported when it is first called. `where` is package.module:function."""

    where: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.found(*args, **options)

    @property
    def found(self) -> Callable:
        """The function itself."""
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(module), name)


def later(where: str) -> Later:
    """`Later(where)`, for the fields of a record."""
    return Later(where)


@dataclass(frozen=True)
class Option:
    """One option of the command line, and key of recipes: --name with a default whose type is the option's.

    elsewhere   what else is said where it is given for a modality that has it not
    recipe      whether recipes know it
    required    whether a recipe must have it
    """

    name: str
    default: Any
    help: str
    elsewhere: str = ""
    recipe: bool = True
    required: bool = False


DEVICE = Option("device", "auto", "Where the models run: auto (CUDA, else MPS, else cpu), cpu, cuda, cuda:N or mps.")
"""The option of every modality whose models are read from files."""


@dataclass(frozen=True)
class Request:
    """What is asked of a model that stands in files, in words.

    what        what must go: a selector, a file, a concept
    options     values of the modality's options, all of them
    references  models retrained without it, as `model` or as files of weights
    after       another model of the same kind, that is to be audited
    folder      where relative paths start; with `inside` they may not leave it
    audit       whether it is to be audited alone
    progress    called as progress(text, done, total), or None
    """

    model: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    references: tuple[str, ...] = ()
    after: str = ""
    folder: Path = field(default_factory=Path)
    inside: bool = False
    audit: bool = False
    progress: Callable[[str, int, int], None] | None = None

    def path(self, name: str) -> Path:
        """`name` as a path. Raises DataError for one that leaves a folder that it may not leave."""
        full = (self.folder / name).resolve() if self.inside else self.folder / name
        if self.inside and not full.is_relative_to(self.folder.resolve()):
            raise DataError(f"path '{name}' leaves the folder {self.folder.resolve().name}")
        return full


def _unwritten(model: Any, path: Path) -> Path:
    raise SettingError("models of this kind cannot be written by the command line")


@dataclass(frozen=True)
class Opened:
    """A request read: model, task, split, references, the model that is to be audited (or None), and what writes the result.

    release   (verdict, folder, form) -> the folder that was written, or None where there is nothing to write
    forms     the forms that a run releases, the first that is loaded back as what was audited
    reload    folder that `release` wrote -> the model that its own library loads from it, for the task's `forward`; None where it cannot be loaded back
    answers   (model, part of the split, positions) -> what a released model is compared by, a tensor; None: the logits of the task's batch, or what it predicts
    write     (model, path without suffix) -> the file or folder that was written: a model of this kind in its own form
    read      lines that say how the request was understood
    """

    model: Any
    task: Any
    split: Any
    references: list[Any] = field(default_factory=list)
    after: Any = None
    release: Callable[[Any, Path, str], Path | None] = lambda verdict, folder, form: None
    forms: tuple[str, ...] = ("",)
    reload: Callable[[Path], Any] | None = None
    answers: Callable[[Any, Any, list[int]], Any] | None = None
    write: Callable[[Any, Path], Path] = _unwritten
    read: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parted:
    """A request as the autopilot reads it: what methods and their validation are given, what the audit reads, and what a report says about that."""

    trained: Any
    audited: Any
    notes: tuple[str, ...] = ()


def _whole(model: Any, task: Any, split: Any, seed: int = 0) -> Parted:
    """Both read all of it."""
    return Parted(split, split)


@dataclass(frozen=True)
class Search:
    """How the autopilot looks for the strength of a method.

    factor    between two strengths that stand side by side in the search
    most      strengths of a method that are tried at most
    tuned     settings -> whether they are those of a method that is run by `recipe`, at multiples of `stride`
    recipe    (settings, split) -> what is changed of the published settings
    stride    (settings, task, model) -> the step size that suits the model
    strengths settings that set how hard a method pushes, in order of preference: the first that a method has as a number above 0 is scaled, where the method is
              not one that is `tuned`; `other` names the setting of methods for which it is another than that
    longer    settings -> what is changed for a front-runner, which runs longer
    screened  whether the validation score cannot tell what is gone from what is hidden, so that tries are also compared by the gate's own rules, read on
              validation in place of test
    parts     (model, task, split, seed) -> Parted
    told      the recipe in short, for tables; empty where methods run as published
    """

    factor: float = 3.0
    most: int = 5
    strengths: tuple[str, ...] = ("lr", "scale", "alpha")
    other: Mapping[str, str] = field(default_factory=dict)
    longer: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda settings: {"epochs": 3 * settings["epochs"]} if "epochs" in settings else {}
    screened: bool = False
    parts: Callable[..., Parted] = _whole
    tuned: Callable[[Mapping[str, Any]], bool] = lambda settings: False
    recipe: Callable[[Mapping[str, Any], Any], dict[str, Any]] = lambda settings, split: {}
    stride: Callable[[Mapping[str, Any], Any, Any], float] = lambda settings, task, model: settings["lr"]
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Level:
    """How good a model is on n records: `what` is read, its value, what the best constant answer reads, and how far above that the model is, on a scale of
    the modality's own from 0 (as the constant) to 1 (no error)."""

    what: str
    value: float
    chance: float
    above: float
    n: int


def _nothing(*_: Any) -> None:
    """What a modality does where it has nothing to do."""


def _no_files(request: Request) -> Any:
    raise SettingError("models of this kind are read by the library alone, not by the command line")


EXAMPLES = later("expunge.modalities.examples:Examples")


@dataclass(frozen=True)
class Modality:
    """A kind of model.

    name        that of its task; `what` the models in words ("language models")
    task        (...) -> Task
    rows        (x, y, ids) -> records held in memory
    adopts      record of a method or check -> whether it also works here, besides those that name the task
    labelled    whether a record has one class, in `y`: what exact deletion, streams of requests and choosing records stand on
    shadows     whether shadow models can be trained, for per-example attacks
    relative    whether losses have no natural unit, so that a drop is read relative to the reference
    stops       whether a model that is near chance on what must stay, as it is fed, stops a command
    alone       whether what was kept can be read without retain, since a request removes no class

    removed     split -> classes that the request removes
    kinds       split -> kinds of the request, of which a method must be made for one ("records", "class", "range")
    near        split -> (forget id, kept id, likeness up to 1) of kept records that are near copies of one to forget, each once, the most alike first; None
                where that cannot be told
    preflight   (model, task, split): raises SplitError for data that the model cannot take
    fits        (model, split, which): the same for another model, named by `which`
    kept        (model, task, split) -> how good the model is at what must stay, from 0 (chance, or a constant) to 1, read on at most some hundred records of
                validation, else of retain; None where it cannot be read. A run that loses half of it is `harmed`
    level       (probe, model, part) -> Level: how good the model is on a part of the split that must stay, without removed classes, in a measure that a reader
                knows; None where there is none
    validation  (model, task, split) -> (model -> score, larger is better, 0 at best, read on validation), or None: no tuning
    search      how the autopilot looks for the strength of a method
    rules       probe -> rules of the default gate, by row
    pace        model -> how an attacker trains it
    trivial     (model, task, split, seed) -> trivial baselines by label, where those of records do not work on it
    talk        (probe, model after) -> questions and answers for the report
    families    of evidence that its checks can give (`audits.grade`)
    bench       checks of a cell of a table (all where empty) and how many retrained models it is read against, both unless all are asked for

    options     its part of the command line and of recipes; `asks` the option that says what must go, `stays` the one for what must stay (TRAIN of `plan`)
    refuses     option of commands that it does not take -> why
    open        Request -> Opened
    load        Request -> the model alone: the one that is to be audited where the request names one, else the one before
    sized       Request -> (task, split, model or None) for planning, as light as can be
    holds       what --model says -> 0 no, 1 perhaps, 2 surely a model of this kind
    apply       (patch, model, out, key, options) -> what was written; `revert` (patch, model, out, options) the same
    told        (verdict, document, out) -> closing lines for the terminal
    worlds      names of its worlds; `world` makes the one of a name
    """

    name: str
    what: str
    task: Callable[..., Any]
    rows: Callable[[Any, Any, Any], Any] = EXAMPLES
    adopts: Callable[[Any], bool] = lambda record: False
    labelled: bool = False
    shadows: bool = False
    relative: bool = False
    alone: bool = False
    stops: bool = False

    removed: Callable[[Any], list[int]] = lambda split: []
    kinds: Callable[[Any], tuple[str, ...]] = lambda split: ("records",)
    near: Callable[[Any], list[tuple[int, int, float]] | None] = _nothing
    preflight: Callable[[Any, Any, Any], None] = _nothing
    fits: Callable[[Any, Any, str], None] = _nothing
    kept: Callable[[Any, Any, Any], float | None] = _nothing
    level: Callable[[Any, Any, str], Level | None] = _nothing
    validation: Callable[[Any, Any, Any], Callable[[Any], float] | None] = _nothing
    search: Search = field(default_factory=Search)
    rules: Callable[[Any], dict[str, str]] = lambda probe: {}
    pace: Callable[[Any], dict[str, Any]] = lambda model: {"lr": 0.01, "momentum": 0.9, "clip": 10.0}
    trivial: Callable[..., Mapping[str, Any]] = lambda model, task, split, seed=0: {}
    talk: Callable[[Any, Any], list[dict[str, str]]] = lambda probe, after: []
    families: tuple[str, ...] = ("output", "closeness", "return", "utility")
    bench: tuple[tuple[str, ...], int] = ((), 3)

    options: tuple[Option, ...] = ()
    asks: str = "forget"
    stays: str = "train"
    refuses: Mapping[str, str] = field(default_factory=dict)
    open: Callable[[Request], Opened] = _no_files
    load: Callable[[Request], Any] = _no_files
    sized: Callable[[Request], tuple[Any, Any, Any]] = _no_files
    holds: Callable[[str], int] = lambda model: 0
    apply: Callable[..., list[str]] = _nothing  # pyright: ignore[reportAssignmentType]
    revert: Callable[..., list[str]] = _nothing  # pyright: ignore[reportAssignmentType]
    told: Callable[[Any, Mapping[str, Any], str], list[str]] = lambda verdict, document, out: []
    worlds: tuple[str, ...] = ()
    world: Callable[[str], Any] = _nothing

    @property
    def spelling(self) -> str:
        """The name as the command line writes it."""
        return self.name.replace("_", "-")

    @property
    def filed(self) -> bool:
        """Whether its models are read from files."""
        return self.open is not _no_files


MODALITIES: Registry = Registry("expunge.modalities", "modality", only=r"\.modality$")


@dataclass(frozen=True)
class Placing:
    """`Modality.open` or `load`, whose models then stand on the device that the request's option names."""

    read: Callable[[Request], Any]

    def __call__(self, request: Request) -> Any:
        from expunge.core.machine.devices import device, placed

        where = request.options.get("device", DEVICE.default)
        device(where)  # a wrong name is told before anything is read
        found = self.read(request)
        for net in [found.model, found.after, *found.references] if isinstance(found, Opened) else [found]:
            if net is not None:
                placed(net if hasattr(net, "parameters") else net.model, where)  # a reference brings its record
        return found


def modality(record: Modality) -> Modality:
    """Register a modality; one whose models are read from files gets the option --device."""
    if record.filed:
        record = replace(record, options=(*record.options, DEVICE), open=Placing(record.open), load=Placing(record.load))
    MODALITIES.add(record)
    return record


def of(task: Any) -> Modality:
    """The modality of a task."""
    return MODALITIES[task.name]


def made(task: Any) -> Any:
    """The task itself, or that of a name, with - or _ ("classification"). Raises SettingError for a name that is none, or whose task needs more than its name,
    as a tokenizer."""
    if not isinstance(task, str):
        return task
    if (name := task.replace("-", "_")) not in MODALITIES:
        raise SettingError(suggest("no task", task, [m.spelling for m in MODALITIES.values()]))
    try:
        return MODALITIES[name].task()
    except TypeError:
        raise SettingError(f"the task {task} needs more than its name: call expunge.{name}(...)") from None


def named(task: str) -> Modality:
    """The modality that a command or recipe names, with - or _. Raises SettingError for one whose models are not read from files, or that is none."""
    filed = {m.spelling: m for m in MODALITIES.values() if m.filed}
    if (spelling := task.replace("_", "-")) not in filed:
        raise SettingError(suggest("no task", task, filed))
    return filed[spelling]


def holding(model: str) -> Modality:
    """The modality whose models look most like what --model says."""
    return max((m for m in MODALITIES.values() if m.filed), key=lambda m: m.holds(model))


def meant(task: str, model: str, folder: Path | None = None) -> Modality:
    """The modality of a request: that of `task`, or, where none is named, the one of which `model` surely is. A factory (py:module:name, timm:NAME), or no
    model at all, is of classifiers. Raises SettingError for a task that is none, what is no folder, and a folder that says nothing of its kind."""
    if task:
        return named(task)
    place = Path(folder or "") / model
    filed = [m for m in MODALITIES.values() if m.filed]
    if not model or ":" in model:
        return max(filed, key=lambda m: m.labelled)
    if not place.is_dir():
        what = f"{printable(model)} is a file: the network whose weights it holds" if place.is_file() else f"no folder {printable(model)}: a model"
        raise SettingError(f"{what} is named as py:module:factory (or timm:NAME) with --weights, or as a folder of transformers, PEFT or diffusers")
    found = [m for m in filed if m.holds(str(place)) == 2]
    if not found:
        kinds = ", ".join(m.spelling for m in filed)
        raise SettingError(
            f"{printable(place.name)} does not say what kind of model it holds (a model_index.json, a config.json that names its architecture, or an "
            f"adapter_config.json): name it with --task ({kinds})"
        )
    return found[0]
