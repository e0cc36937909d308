"""Recipes: one flat TOML file describes one run, so that it can be read, hashed and replayed without executing it.

    model   = "py:models:factory"          weights = "model.safetensors"
    task    = "classification"             train = "csv:train.csv?target=label"
    test    = "csv:test.csv?target=label"  forget  = "class:3"
    methods = ["salun", "ssd"]             references = ["retrained-0.safetensors"]
    [with.salun]                           [gate]
    keep = 0.3                             "accuracy.forget" = "<= 0.05"
    preset = "paper"                       settings as published, under those named beside it

    task    = "causal-lm"                  model   = "model"                       texts: a folder that save_pretrained wrote, and files of JSON lines
    forget  = "forget.jsonl"               retain  = "retain.jsonl"
    test    = "test.jsonl"                 validation = "validation.jsonl"

Paths are relative to the recipe and may not leave its folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from expunge.core.errors import RecipeError, SettingError, suggest

TASKS = ("classification", "regression", "causal-lm", "diffusion")
TEXT = ("causal-lm", "causal_lm")
"""How the task of language models may be written."""
IMAGE = ("diffusion",)
"""The task of diffusion pipelines."""

OF_TEXTS = ("retain", "anchor", "general", "template", "mask", "max_length", "dtype", "form")
OF_IMAGES = ("retain", "anchor", "dtype")
OF_RECORDS = ("train", "weights")
"""Keys for texts alone, those of them for pipelines, and keys for all other tasks alone."""


@dataclass(frozen=True)
class Recipe:
    """One run. `validation` is a data spec (texts: a JSONL file), or "share:0.3" to take that share of test.

    Of pipelines, `model` and `references` are folders, forget is the concept, anchor what to draw instead, retain concepts to keep (a,b,c or @FILE).
    Of texts, `model` and `references` are folders, forget, retain, test, validation, anchor and general are JSONL files, and train and weights are empty; see
    `texts.prepare` for template, mask, max_length and dtype, and `checkpoints.release` for form.
    """

    model: str
    train: str
    forget: str
    folder: Path
    weights: str = ""
    task: str = "classification"
    test: str = ""
    validation: str = "share:0.3"
    methods: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    seed: int = 0
    retrain_epochs: float = 0.0
    out: str = "out"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: dict[str, str] = field(default_factory=dict)
    retain: str = ""
    anchor: str = ""
    general: str = ""
    template: str = "auto"
    mask: str = "answer+eos"
    max_length: int = 0
    dtype: str = "auto"
    form: str = "auto"

    @property
    def share(self) -> float:
        """The share of test that validation is to be; 0 where validation is data of its own. Raises RecipeError for one that is no share."""
        kind, _, value = self.validation.partition(":")
        if kind != "share":
            return 0.0
        try:
            if 0 <= (share := float(value)) < 1:
                return share
        except ValueError:
            pass
        raise RecipeError(f"validation must be data or share:0.3, with a share from 0 to below 1, not '{self.validation}'")


def checked(task: str, form: str) -> None:
    """Raises SettingError for an unknown task, or an unknown form of what is released."""
    from expunge.modalities.diffusion import release as adapters
    from expunge.modalities.language import checkpoints

    if task not in (*TASKS, *TEXT):
        raise SettingError(suggest("no task", task, TASKS))
    forms = adapters.FORMS if task in IMAGE else checkpoints.FORMS
    if form not in forms:
        raise SettingError(f"form must be one of {', '.join(forms)}, not '{form}'")


def read(path: Path | str) -> Recipe:
    """Parse and check; raises RecipeError with the nearest known key for an unknown one."""
    path = Path(path)
    try:
        if path.stat().st_size > 1 << 20:
            raise RecipeError(f"{path.name} is larger than 1 MiB")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path.name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} is not TOML: {error}") from None
    known = {f.name: f for f in fields(Recipe) if f.name != "folder"}
    raw["settings"] = raw.pop("with", {})
    values: dict[str, Any] = {"folder": path.parent.resolve()}
    for key, value in raw.items():
        if key not in known:
            raise RecipeError(suggest(f"{path.name} has an unknown key", key, [k if k != "settings" else "with" for k in known]))
        kind = str(known[key].type).split("[")[0]
        allowed = {"str": str, "int": int, "float": (int, float), "list": list, "dict": dict}[kind]
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise RecipeError(f"{key} in {path.name} must be of type {kind}, not {value!r}")
        values[key] = value
    text, image = values.get("task") in TEXT, values.get("task") in IMAGE
    if missing := [k for k in ("model", *(() if text or image else ("train",)), "forget") if k not in values]:
        raise RecipeError(f"{path.name} lacks {', '.join(missing)}")
    wrong = OF_RECORDS if text else [*OF_RECORDS, "test", "validation", *(k for k in OF_TEXTS if k not in OF_IMAGES)] if image else OF_TEXTS
    if other := [k for k in wrong if k in values]:
        raise RecipeError(
            f"{other[0]} in {path.name} is {'not for task' if text or image else 'for texts, not for task'} {values.get('task', 'classification')}"
        )
    if odd := [m for m, given in values["settings"].items() if not isinstance(given, dict)]:
        raise RecipeError(f"with.{odd[0]} in {path.name} must be a table of settings, not {values['settings'][odd[0]]!r}")
    return Recipe(**{"train": "", **values})


def run(recipe: Recipe, *, progress: Callable[[str, int, int], None] | None = None):
    """Load, unlearn, audit, gate; writes report.html, report.json and patch.safetensors to `out`, and for texts the folder `released`, which loads without
    expunge. Returns the Verdict and its document."""
    from expunge.modalities import models
    from expunge.planning import plan

    def near(name: str) -> Path:
        return models.inside(name, recipe.folder)

    checked(recipe.task, recipe.form)
    out, tokenizer, pipeline = near(recipe.out), None, None
    if recipe.task in TEXT:
        model, tokenizer, task, split, references = _texts(recipe, near)
    elif recipe.task in IMAGE:
        from expunge.modalities.diffusion import request as images

        kept = f"@{near(recipe.retain[1:])}" if recipe.retain.startswith("@") else recipe.retain
        pipeline, split = images.prepare(near(recipe.model), recipe.forget, recipe.anchor, kept, dtype=recipe.dtype)
        model, task = pipeline.model, pipeline.task
        references = [images.opened(pipeline, near(r), recipe.dtype) for r in recipe.references]
    else:
        model = models.load(recipe.model, near(recipe.weights) if recipe.weights else None, recipe.folder)
        task, split = prepare(recipe)
        references = [models.load(recipe.model, near(r), recipe.folder) for r in recipe.references]
    passes = 2 * recipe.retrain_epochs * len(split.retain) if recipe.retrain_epochs else None
    verdict = plan.forget(
        model, task, split, references=references, methods=recipe.methods, settings=_placed(recipe.settings, near), rules=recipe.gate or None, seed=recipe.seed,
        folder=out / "checkpoints", retrain_passes=passes, progress=progress,
    )  # fmt: skip
    document = verdict.save(out, f"Forget {split.asked}")
    if tokenizer is not None:
        from expunge.modalities.language import request as texts

        if (released := texts.released(verdict, model, tokenizer, out / "released", form=recipe.form, base=recipe.model)) is not None:
            document["released"] = str(released)
    return verdict, document


def _texts(recipe: Recipe, near: Callable[[str], Path]):
    """Model, tokenizer, task, split and references of a recipe for texts."""
    from expunge.modalities.language import checkpoints
    from expunge.modalities.language import request as texts

    parts = {n: getattr(recipe, n) for n in texts.PARTS}
    if recipe.validation.startswith("share:"):
        parts["validation"] = ""
    found = texts.prepare(
        near(recipe.model), {n: str(near(f)) for n, f in parts.items() if f}, template=recipe.template, mask=recipe.mask, max_length=recipe.max_length,
        dtype=recipe.dtype, validation=recipe.share, within=recipe.folder,
    )  # fmt: skip
    return *found, [checkpoints.load(near(r), dtype=recipe.dtype, within=recipe.folder)[0] for r in recipe.references]


def _placed(settings: dict[str, dict[str, Any]], near: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """The settings over those of their preset, with the one that names weights (`tool_free`) as a path from the recipe."""
    from expunge.core.registry import METHODS

    settings = {m: {**METHODS[m].preset(given["preset"]), **{n: v for n, v in given.items() if n != "preset"}} if "preset" in given else given
                for m, given in settings.items()}  # fmt: skip
    return {m: {n: str(near(v)) if n == "tool_free" and v and isinstance(v, str) else v for n, v in given.items()} for m, given in settings.items()}


def prepare(recipe: Recipe, *, inside: bool = True):
    """Task and Split of a recipe."""
    import torch

    from expunge.core.types import Split
    from expunge.data import selectors
    from expunge.modalities import readers as load
    from expunge.modalities.classification.task import classification
    from expunge.modalities.regression.task import regression

    tasks = {"classification": classification, "regression": regression}
    if recipe.task not in tasks:
        raise RecipeError(suggest("no task", recipe.task, tasks))
    parts: dict[str, Any] = {n: load.load(s, recipe.task, recipe.folder, inside=inside) for n, s in (("train", recipe.train), ("test", recipe.test)) if s}
    forget, retain = selectors.resolve(recipe.forget, parts["train"], recipe.folder)
    test, validation = parts.get("test"), None
    if recipe.validation.startswith("share:"):
        if test is not None:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
            cut = int(recipe.share * len(test))
            test, validation = test.take(order[cut:]), test.take(order[:cut])
    elif recipe.validation:
        validation = load.load(recipe.validation, recipe.task, recipe.folder, inside=inside)
    return tasks[recipe.task](), Split(forget, retain, test, validation, asked=recipe.forget)
