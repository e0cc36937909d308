"""Options that modalities bring to the command line: added to a command's own, and handed to it as one mapping."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer

from expunge.core.errors import SettingError, printable
from expunge.core.modality import MODALITIES, Modality, Option, meant

TASK = ""
TASK_HELP = "What kind of model it is, where its folder does not say so (a factory is a classifier): {}."


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
    homes = list(homes)
    if len(homes) == sum(m.filed for m in MODALITIES.values()) and len({o.help for _, o in homes}) == 1:
        return homes[0][1].help
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


def told(words: Sequence[str]) -> Modality | None:
    """The modality that the words of a command name by --task, --model or MODEL, for its help; None where they name none."""
    given = dict(pairwise(words)) | dict(w.split("=", 1) for w in words if w.startswith("--") and "=" in w)
    model = given.get("--model", words[0] if words and not words[0].startswith("-") else "")
    try:
        return meant(given.get("--task", ""), model) if model or "--task" in given else None
    except SettingError:
        return None


def fitted(command: Any, name: str, modality: Modality | None) -> None:
    """The help of a command that takes options of modalities, made to fit one: with its options alone, or, for None, with those that all have."""
    homes, said = known(), f"expunge {name} MODEL --help (or --task NAME --help) shows the options of a kind of model, too."
    many = [m for m in MODALITIES.values() if m.filed]
    parameters = [p for p in command.params if p.name in homes and p.help == explained(homes[p.name])]
    for p in parameters:
        mine = [(m, o) for m, o in homes[p.name] if modality in (None, m)]
        p.hidden = not mine or (modality is None and len(mine) < len(many))
        p.help = explained(mine) if modality is None else mine[0][1].help if mine else p.help
    if parameters:
        command.epilog = said if modality is None else f"These are the options for {modality.what} (--task {modality.spelling})."


def asked(task: str, model: str, given: Mapping[str, Any], forget: str = "", words: Sequence[str] = ()) -> tuple[Modality, str, str, dict[str, Any]]:
    """(modality, model, what must go, options of the modality).

    words    MODEL and REQUEST as they were written without --model and --forget (or what the modality has in its place, as --concept)
    Raises SettingError for a word too many, no model, an unknown task, a folder that does not say what it holds, options that its kind of model does not take,
    and where nothing says what must go.
    """
    left = list(words)
    model = model or (left.pop(0) if left else "")
    if not model:
        raise SettingError("the model is missing: name it first (a folder, timm:NAME or py:module:factory), or with --model")
    modality, homes = meant(task, model), known()
    mine = {o.name: o for o in modality.options}
    for name, value in given.items():
        if name not in mine and value != homes[name][0][1].default:
            why = next((f": {o.elsewhere}" for _, o in homes[name] if o.elsewhere), "")
            raise SettingError(f"--{name.replace('_', '-')} is not for {modality.what} (--task {modality.spelling}){why}")
    options = {n: given.get(n, o.default) for n, o in mine.items()}
    if forget and modality.asks != "forget":
        raise SettingError(modality.refuses["forget"])
    what = {**options, "forget": forget}[modality.asks]
    if not what and left:
        what = left.pop(0)
        options |= {modality.asks: what} if modality.asks in options else {}
    if left:
        raise SettingError(f"cannot read '{printable(left[0])}': model and request are named already, and settings are written as --name value")
    if not what and modality.asks == "forget":
        raise SettingError("what must go is missing: name it after the model, or with --forget")
    return modality, model, what, options
