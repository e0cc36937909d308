"""Options that modalities bring to the command line: added to a command's own, and handed to it as one mapping."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from expunge.core.errors import SettingError
from expunge.core.modality import MODALITIES, Modality, Option, named

TASK = "classification"


def known() -> dict[str, list[tuple[Modality, Option]]]:
    """Name -> the modalities that have an option of that name, each with what it means there."""
    found: dict[str, list[tuple[Modality, Option]]] = {}
    for m in MODALITIES.values():
        for option in m.options if m.filed else ():
            found.setdefault(option.name, []).append((m, option))
    return found


def tasks() -> str:
    """The tasks whose models are read from files."""
    *most, last = [m.spelling for m in MODALITIES.values() if m.filed]
    return f"{', '.join(most)} or {last}"


def explained(homes: Iterable[tuple[Modality, Option]]) -> str:
    """What an option means, with the models it is for; those that mean the same by it are named together."""
    same: dict[str, list[str]] = {}
    for m, option in homes:
        same.setdefault(option.help, []).append(m.what)
    said = [f"{', '.join(what)}: {text}" for text, what in same.items()]
    return " ".join(line[0].upper() + line[1:] for line in said)


def with_options(*only: str, leave: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose keyword `options` holds the values of all modalities' options (or of `only` these, but for those to `leave`), each of which is an option
    of the command. Where one of its own options is called the same, that one stays, and its value is in the mapping as well."""

    def made(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "options"]
        further = {n: homes for n, homes in known().items() if (not only or n in only) and n not in leave}
        added = [
            inspect.Parameter(
                n,
                inspect.Parameter.KEYWORD_ONLY,
                default=homes[0][1].default,
                annotation=Annotated[type(homes[0][1].default), typer.Option(help=explained(homes))],
            )
            for n, homes in further.items()
            if n not in signature.parameters
        ]

        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            command(**{p.name: given[p.name] for p in own}, options={n: given[n] for n in further})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapped.__signature__ = signature.replace(parameters=[*parameters, *added])  # pyright: ignore[reportAttributeAccessIssue]
        wrapped.__annotations__ = {p.name: p.annotation for p in [*parameters, *added]}
        del wrapped.__wrapped__
        return wrapped

    return made


def asked(task: str, given: Mapping[str, Any], forget: str = "") -> tuple[Modality, str, dict[str, Any]]:
    """(modality, what must go, its options). Raises SettingError for an unknown task, for options that it does not take, and where nothing says what must
    go."""
    modality, homes = named(task), known()
    mine = {o.name: o for o in modality.options}
    for name, value in given.items():
        if name not in mine and value != homes[name][0][1].default:
            why = next((f": {o.elsewhere}" for _, o in homes[name] if o.elsewhere), "")
            raise SettingError(f"--{name} is not for --task {modality.spelling}{why}")
    options = {n: given.get(n, o.default) for n, o in mine.items()}
    what = {**options, "forget": forget}[modality.asks]
    if forget and modality.asks != "forget":
        raise SettingError(modality.refuses["forget"])
    if not what and modality.asks == "forget":
        raise SettingError("--forget is missing")
    return modality, what, options
