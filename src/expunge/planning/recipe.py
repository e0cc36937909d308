"""Recipes: one flat TOML file describes one run, so that it can be read, hashed and replayed without executing it.

    model   = "py:models:factory"          weights = "model.safetensors"
    task    = "classification"             train = "csv:train.csv?target=label"
    test    = "csv:test.csv?target=label"  forget  = "class:3"
    methods = ["salun", "ssd"]             references = ["retrained-0.safetensors"]
    [with.salun]                           [gate]
    keep = 0.3                             "accuracy.forget" = "<= 0.05"
    preset = "paper"                       settings as published, under those named beside it
    anyway = true                          goes on where the model, as it is fed, is near chance on what must stay
    memory = "2G"                          most bytes of inputs held, and of gradients of single examples at once
    twins = 10                             planted controls: evidence without references, of plants = "csv:..." or half of validation

    task    = "causal-lm"                  model   = "model"                       texts: a folder that save_pretrained wrote, and files of JSON lines
    forget  = "forget.jsonl"               retain  = "retain.jsonl"
    test    = "test.jsonl"                 validation = "validation.jsonl"

Which keys there are besides model, task, forget, methods, references, seed, retrain_epochs, minutes, out, require, twins, anyway, with and gate follows from
the task's modality (`Modality.options`). Paths are relative to the recipe and may not leave its folder.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from expunge.core.errors import RecipeError, SettingError, first_line, suggest
from expunge.core.files import inside
from expunge.core.machine.bounds import seed_of, size_of
from expunge.core.modality import MODALITIES, Option, Request, meant, named
from expunge.core.registry import METHODS
from expunge.core.types import bytes_of
from expunge.planning import plan, sanity
from expunge.planning.folders import fit
from expunge.planning.releasing import finished


@dataclass(frozen=True)
class Recipe:
    """One run. `options` are those of the task's modality, all of them; `forget` is what must go: a selector, a file, a concept."""

    model: str
    forget: str
    folder: Path
    task: str = "classification"
    methods: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    seed: int = 0
    retrain_epochs: float = 0.0
    out: str = "out"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: dict[str, str] = field(default_factory=dict)
    require: str = ""
    minutes: float = 0.0
    twins: int = 0
    anyway: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def options() -> dict[str, list[Option]]:
    """Key -> what each modality means by it, for all options that recipes know."""
    found: dict[str, list[Option]] = {}
    for m in MODALITIES.values():
        for option in m.options:
            if m.filed and option.recipe:
                found.setdefault(option.name, []).append(option)
    return found


def read(path: Path | str) -> Recipe:
    """Parse and check; raises RecipeError with the nearest known key or task for an unknown one."""
    path = Path(path)
    try:
        if path.stat().st_size > 1 << 20:
            raise RecipeError(f"{path.name} is larger than 1 MiB")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path.name}: {error.strerror}") from None
    except RecursionError:
        raise RecipeError(f"{path.name} is not TOML: it is nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, a number of thousands of digits
        raise RecipeError(f"{path.name} is not TOML: {first_line(error)}") from None
    common, further = {f.name: f for f in fields(Recipe) if f.name not in ("folder", "options")}, options()
    raw["settings"] = raw.pop("with", {})
    kinds = {name: str(f.type).split("[")[0] for name, f in common.items()} | {name: type(found[0].default).__name__ for name, found in further.items()}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in kinds:
            raise RecipeError(suggest(f"{path.name} has an unknown key", key, [k if k != "settings" else "with" for k in kinds]))
        allowed = {"str": str, "int": int, "float": (int, float), "list": list, "dict": dict, "bool": bool}[kinds[key]]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kinds[key] != "bool"):
            raise RecipeError(f"{key} in {path.name} must be of type {kinds[key]}, not {value!r}")
        values[key] = _typed(f"{key} in {path.name}", key, value)
    try:
        modality = meant(values.get("task", ""), values.get("model", ""), path.parent)
    except SettingError as error:
        raise RecipeError(f"{path.name}: {error}") from None
    mine = {o.name: o for o in modality.options if o.recipe}
    if missing := [k for k in ("model", *(n for n, o in mine.items() if o.required), "forget") if k not in values]:
        raise RecipeError(f"{path.name} lacks {', '.join(missing)}")
    if other := [k for k in values if k in further and k not in mine]:
        homes = " and ".join(m.what for m in MODALITIES.values() if m.filed and other[0] in [o.name for o in m.options])
        raise RecipeError(f"{other[0]} in {path.name} is not for task {modality.spelling}: it is for {homes}")
    if odd := [m for m, given in values["settings"].items() if not isinstance(given, dict)]:
        raise RecipeError(f"with.{odd[0]} in {path.name} must be a table of settings, not {values['settings'][odd[0]]!r}")
    given = {o.name: values.get(o.name, o.default) for o in modality.options}
    return Recipe(folder=path.parent.resolve(), options=given, **{k: v for k, v in values.items() if k in common} | {"task": modality.spelling})


def _typed(what: str, key: str, value: Any) -> Any:
    """The value, if what it is made of fits too: lists of texts, gates of rules, numbers in their range. Raises RecipeError."""
    if "\0" in str(value):
        raise RecipeError(f"{what} holds a character that no path or name can")
    if isinstance(value, list) and (odd := [v for v in value if not isinstance(v, str)]):
        raise RecipeError(f"{what} must list texts, not {odd[0]!r}")
    if key == "gate" and isinstance(value, dict) and (odd := [(k, v) for k, v in value.items() if not isinstance(v, str)]):
        raise RecipeError(f'{what} must map rows to rules such as "<= 0.05"; {odd[0][0]} is {odd[0][1]!r}')
    if key in ("seed", "memory"):
        try:
            return seed_of(value) if key == "seed" else value if size_of(key, value) else ""
        except SettingError as error:
            raise RecipeError(f"{what}: {error}") from None
    if isinstance(value, (int, float)) and key in ("minutes", "retrain_epochs", "twins") and not (math.isfinite(value) and value >= 0):
        raise RecipeError(f"{what} must be a finite number, 0 or more, not {value!r}")
    return value


def run(recipe: Recipe, *, progress: Callable[[str, int, int], None] | None = None):
    """Load, unlearn, audit, gate; writes a folder of its own in `out` (`planning.releasing.finished`): the report, and, where a try passed, the patch and
    `released`, which loads without expunge. Returns the Verdict and its document."""

    def near(name: str) -> Path:
        return inside(name, recipe.folder)

    out = fit(near(recipe.out))
    request = Request(recipe.model, recipe.forget, recipe.options, tuple(recipe.references), folder=recipe.folder, inside=True, progress=progress)
    opened = named(recipe.task).open(request)
    fit(out, bytes_of(opened.model))
    passes = 2 * recipe.retrain_epochs * len(opened.split.retain) if recipe.retrain_epochs else None
    verdict = plan.forget(
        opened.model, opened.task, opened.split, references=opened.references, methods=recipe.methods, settings=_placed(recipe.settings, near),
        rules=recipe.gate or None, seed=recipe.seed, folder=out / "checkpoints", retrain_passes=passes, progress=progress, require=recipe.require,
        minutes=recipe.minutes or math.inf, twins=recipe.twins, memory=recipe.options.get("memory", ""),
        ready=lambda: sanity.checked(opened.model, opened.task, opened.split, anyway=recipe.anyway),
    )  # fmt: skip
    return finished(verdict, opened, out, f"Forget {opened.split.asked}")


def _placed(settings: dict[str, dict[str, Any]], near: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """The settings over those of their preset, with the one that names weights (`tool_free`) as a path from the recipe."""
    settings = {m: {**METHODS[m].preset(given["preset"]), **{n: v for n, v in given.items() if n != "preset"}} if "preset" in given else given
                for m, given in settings.items()}  # fmt: skip
    return {m: {n: str(near(v)) if n == "tool_free" and v and isinstance(v, str) else v for n, v in given.items()} for m, given in settings.items()}
