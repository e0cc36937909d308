"""Methods and checks, found by folder and by entry point; a method's signature is its configuration.

@method(paper="arXiv:...", tasks=("classification",), needs=("forget",), cost=..., toy={...})
def salun(model, task, split, *, keep: float = 0.5, ..., seed: int = 0) -> Patch: ...

METHODS["salun"](model, task, split, keep=0.3) -> Patch
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import nn

from expunge.core import guard
from expunge.core.errors import SettingError, SplitError, suggest
from expunge.core.lookup import Registry
from expunge.core.machine.bounds import ranged, seed_of
from expunge.core.machine.devices import reseeded
from expunge.core.modality import of
from expunge.core.patch import Patch
from expunge.core.types import Split, Task

ASSURANCES = ("exact", "certified", "approximate", "suppression")
PRESETS = ("paper",)
"""Names that `Method.preset` knows: the defaults overlaid with what was published."""


def retaining(settings: Mapping[str, Any]) -> dict[str, str]:
    """What settings with a retain loss ask of the split: retain data, and what to say where there is none.

    >>> list(retaining({"retain": "kl", "alpha": 1.0})), list(retaining({"retain": "none", "alpha": 1.0})), list(retaining({"keep": 0.5}))
    (['retain'], [], [])
    """
    kind = settings.get("retain", "none")
    if kind == "none" or not settings.get("alpha"):
        return {}
    return {"retain": f"retain={kind} needs retain data; give some, or set retain=none (on the command line --METHOD.retain none)"}


@dataclass(frozen=True)
class Method:
    """One published method: its function, and what it declares about itself.

    needs       parts of the split that must be there
    forgets     kinds of request it is made for: "records", "class", "range"
    assurance   what it can honestly claim, one of ASSURANCES
    cost        (part sizes, settings) -> (examples forward, examples backward); held by a law against the meter
    toy         settings under which it visibly forgets in the toy worlds of the tests
    twin        "moe" for methods that need a mixture of experts: which twin of a world it works on
    accepts     model -> None, or ModelError for a model that is not of the kind it needs
    asks        settings -> parts of the split that a run with these settings reads besides `needs`, each with what to say where it is missing
    published   settings as published, in the paper or else in its code, where they differ from the defaults
    place       where these stand, as far as the method's card tells
    stable      it has a card, the card's checkable cases are tests, it stands in a table of a valid world, and does there what its paper claims
    lacks       which of these is missing, in one sentence that begins small and ends without a stop
    """

    name: str
    function: Callable[..., Patch]
    paper: str
    tasks: tuple[str, ...]
    needs: tuple[str, ...]
    forgets: tuple[str, ...]
    assurance: str
    cost: Callable[[Mapping[str, int], Mapping[str, Any]], tuple[float, float]]
    toy: Mapping[str, Any]
    twin: str = ""
    asks: Callable[[Mapping[str, Any]], Mapping[str, str]] = retaining
    accepts: Callable[[nn.Module], Any] | None = None
    published: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    stable: bool = False
    lacks: str = ""

    @property
    def reason(self) -> str:
        """Why it is experimental; empty for a stable method."""
        return "" if self.stable else self.lacks or "nobody has said that it does what its paper claims"

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings and their defaults, in the order of the signature; `seed` is not one of them. A record of settings (a dataclass that several
        methods share) counts as its fields."""
        return {name: value for default in self._groups().values() for name, value in default.items()}

    def _groups(self) -> dict[str, dict[str, Any]]:
        """Keyword -> the settings it stands for: itself, or the fields of a record."""
        found = [p for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "seed"]
        return {p.name: {f.name: getattr(p.default, f.name) for f in fields(p.default)} if is_dataclass(p.default) else {p.name: p.default} for p in found}

    def _arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Flat settings as the function's keywords."""
        found = inspect.signature(self.function).parameters
        return {
            name: replace(found[name].default, **{n: settings[n] for n in group}) if is_dataclass(found[name].default) else settings[name]
            for name, group in self._groups().items()
        }

    @property
    def manual(self) -> str:
        """The module's docstring: the manual page; a shared record of settings adds its own lines to the section Settings."""
        text = inspect.cleandoc(inspect.getmodule(self.function).__doc__ or "")
        for p in inspect.signature(self.function).parameters.values():
            if p.kind is p.KEYWORD_ONLY and is_dataclass(p.default):
                head, _, tail = text.partition("\nDiffers")
                shared = inspect.cleandoc(type(p.default).__doc__ or "").partition("\n\n")[2]
                text = f"{head.rstrip()}\n{'' if 'Settings' in head else 'Settings' + chr(10)}{textwrap.indent(shared, '    ')}\nDiffers{tail}"
        return text

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults overlaid with `given`, text turned into the default's type. Raises SettingError."""
        out = self.defaults
        for name, value in given.items():
            if name not in out:
                raise SettingError(suggest(f"{self.name} has no setting", name, out))
            what = f"{self.name}'s {name}"
            out[name] = ranged(what, name, convert(what, value, out[name]), out[name])
        return out

    def preset(self, name: str) -> dict[str, Any]:
        """All settings of a preset: `paper` is the defaults overlaid with `published`. Raises SettingError naming those there are."""
        if name not in PRESETS:
            raise SettingError(suggest(f"{self.name} has no preset", str(name), PRESETS))
        return self.settings(self.published)

    def expected(self, split: Split, settings: Mapping[str, Any]) -> tuple[float, float]:
        """Examples forward and backward that a run with these settings will cost. Beside a part's size stands, as PART.different, how many different prompts
        it holds, where it knows."""
        sizes = {name: len(part) for name, part in split.parts().items()}
        return self.cost(sizes | {f"{name}.different": part.different for name, part in split.parts().items() if hasattr(part, "different")}, settings)

    def suits(self, task: Task) -> bool:
        """Whether it works on the task: it names it, or the task's modality adopts it."""
        return suits(self, task)

    def check(self, task: Task, split: Split, settings: Mapping[str, Any] | None = None, model: nn.Module | None = None) -> None:
        """Raises SettingError or SplitError if this method cannot work on this task or split; with all its `settings`, if these ask for a part that is not
        there; with a `model`, ModelError if it is not of the kind that the method needs."""
        if not self.suits(task):
            raise SettingError(f"{self.name} works on {', '.join(self.tasks)}, not on {task.name}")
        try:
            split.require(*self.needs)
        except SplitError as error:
            there = {name for name, part in split.parts().items() if len(part)}
            others = [m.name for m in METHODS.values() if m.suits(task) and set(m.needs) <= there]
            raise SplitError(f"{error}. Methods that can do with that: {', '.join(others) or 'none'}") from None
        if model is not None and self.accepts is not None:
            self.accepts(model)
        for part, why in ({} if settings is None else self.asks(settings)).items():
            if getattr(split, part) is None:
                raise SplitError(why.replace("METHOD", self.name))

    def made_for(self, task: Task, split: Split) -> None:
        """Raises SettingError if the request is of a kind that this method is not made for. Calling the method itself, unguarded, does not ask."""
        asked = of(task).kinds(split)
        if not set(asked) & set(self.forgets):
            others = [m.name for m in METHODS.values() if m.suits(task) and set(asked) & set(m.forgets)]
            raise SettingError(f"{self.name} is made to forget {' or '.join(self.forgets)}, and this request is for {' or '.join(asked)}; methods for that: "
                               f"{', '.join(others) or 'none'}")  # fmt: skip

    def __call__(self, model: nn.Module, task: Task, split: Split, *, seed: int = 0, **given: Any) -> Patch:
        """Run the method; the model and the global RNG are left as they were. See `run.unlearn` for the guarded form."""
        from expunge import __version__

        settings = self.settings(given)
        seed_of(seed)
        self.check(task, split)
        watch = guard.current()
        with reseeded(seed):
            patch = self.function(model, guard.metered(task, split, watch.meter), split, seed=seed, **self._arguments(settings))
        meta = {"method": self.name, "settings": settings, "seed": seed, "assurance": self.assurance, "stable": self.stable, "version": __version__}
        return patch.stamped(model, **meta, asked=split.asked)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
"""A number as people write it: Python itself would read 1_0 as ten, and digits of any script."""


def convert(what: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`; raises SettingError when it is not one."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        if isinstance(value, str) and kind is not str and not _NUMBER.fullmatch(value):
            raise ValueError
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (ValueError, KeyError, OverflowError):
        raise SettingError(f"{what} must be {kind.__name__}, not {value!r}") from None


METHODS: Registry = Registry("expunge.methods", "method")
CHECKS: Registry = Registry("expunge.audits", "check")


def method(
    *,
    paper: str,
    tasks: tuple[str, ...],
    needs: tuple[str, ...],
    cost: Callable,
    toy: Mapping[str, Any],
    forgets: tuple[str, ...] = ("records", "class"),
    assurance: str = "approximate",
    twin: str = "",
    asks: Callable[[Mapping[str, Any]], Mapping[str, str]] = retaining,
    accepts: Callable[[nn.Module], Any] | None = None,
    published: Mapping[str, Any] | None = None,
    place: str = "",
    stable: bool = False,
    lacks: str = "",
) -> Callable:
    """Register a method; the function's name is the method's name."""

    def wrap(function: Callable[..., Patch]) -> Method:
        record = Method(
            function.__name__, function, paper, tasks, needs, forgets, assurance, cost, toy, twin, asks, accepts, published or {}, place, stable, lacks
        )
        METHODS.add(record)
        return record

    return wrap


@dataclass(frozen=True)
class Check:
    """One measurement of an audit: (Probe) -> rows. `reference`: needs at least one retrained model; `slow`: trains;
    `pool`: needs shadow models."""

    name: str
    function: Callable
    tasks: tuple[str, ...]
    needs: tuple[str, ...]
    reference: bool
    slow: bool
    pool: bool

    def __call__(self, probe: Any) -> list:
        return self.function(probe)

    def suits(self, task: Task) -> bool:
        """Whether it reads models of the task."""
        return suits(self, task)


def suits(record: Any, task: Task) -> bool:
    """Whether a method or check names the task, or its modality adopts it."""
    kind = task.name
    return kind in record.tasks or of(task).adopts(record)


@dataclass(frozen=True)
class Picture:
    """Data of pictures for the report: (Probe) -> {name: JSON}, for models of the tasks it names."""

    name: str
    function: Callable
    tasks: tuple[str, ...]

    def suits(self, task: Task) -> bool:
        """Whether it shows models of the task."""
        return suits(self, task)


PICTURES: Registry = Registry("expunge.audits", "picture")


def picture(name: str, *, tasks: tuple[str, ...]) -> Callable:
    """Register data of pictures under a name."""

    def wrap(function: Callable) -> Callable:
        PICTURES.add(Picture(name, function, tasks))
        return function

    return wrap


def check(*, tasks: tuple[str, ...], needs: tuple[str, ...], reference: bool = False, slow: bool = False, pool: bool = False) -> Callable:
    """Register a check; the function's name is the check's name."""

    def wrap(function: Callable) -> Check:
        record = Check(function.__name__, function, tasks, needs, reference, slow, pool)
        CHECKS.add(record)
        return record

    return wrap
