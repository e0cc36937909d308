"""Recipes: one flat TOML file describes one run, so that it can be read, hashed and replayed without executing it.

    model   = "py:models:factory"          weights = "model.safetensors"
    task    = "classification"             train = "csv:train.csv?target=label"
    test    = "csv:test.csv?target=label"  forget  = "class:3"
    methods = ["salun", "ssd"]             references = ["retrained-0.safetensors"]
    [with.salun]                           [gate]
    keep = 0.3                             "accuracy.forget" = "<= 0.05"

Paths are relative to the recipe and may not leave its folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from expunge.errors import RecipeError, suggest


@dataclass(frozen=True)
class Recipe:
    """One run. `validation` is a data spec, or "share:0.3" to take that share of test."""

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
    if missing := [k for k in ("model", "train", "forget") if k not in values]:
        raise RecipeError(f"{path.name} lacks {', '.join(missing)}")
    return Recipe(**values)


def run(recipe: Recipe, *, progress: Callable[[str, int, int], None] | None = None):
    """Load, unlearn, audit, gate; writes report.html, report.json and patch.safetensors to `out`. Returns the Verdict and its document."""
    from expunge import models, plan

    def near(name: str) -> Path:
        return models.inside(name, recipe.folder)

    model = models.load(recipe.model, near(recipe.weights) if recipe.weights else None, recipe.folder)
    task, split = prepare(recipe)
    references = [models.load(recipe.model, near(r), recipe.folder) for r in recipe.references]
    passes = 2 * recipe.retrain_epochs * len(split.retain) if recipe.retrain_epochs else None
    verdict = plan.forget(
        model, task, split, references=references, methods=recipe.methods, settings=recipe.settings, rules=recipe.gate or None, seed=recipe.seed,
        folder=near(recipe.out) / "checkpoints", retrain_passes=passes, progress=progress,
    )  # fmt: skip
    return verdict, verdict.save(near(recipe.out), f"Forget {recipe.forget}")


def prepare(recipe: Recipe, *, inside: bool = True):
    """Task and Split of a recipe."""
    import torch

    from expunge.data import load, selectors
    from expunge.tasks.classification import classification
    from expunge.tasks.regression import regression
    from expunge.types import Split

    tasks = {"classification": classification, "regression": regression}
    if recipe.task not in tasks:
        raise RecipeError(suggest("no task", recipe.task, tasks))
    parts: dict[str, Any] = {n: load.load(s, recipe.task, recipe.folder, inside=inside) for n, s in (("train", recipe.train), ("test", recipe.test)) if s}
    forget, retain = selectors.resolve(recipe.forget, parts["train"], recipe.folder)
    test, validation = parts.get("test"), None
    if recipe.validation.startswith("share:"):
        if test is not None:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
            cut = int(float(recipe.validation[6:]) * len(test))
            test, validation = test.take(order[cut:]), test.take(order[:cut])
    elif recipe.validation:
        validation = load.load(recipe.validation, recipe.task, recipe.folder, inside=inside)
    return tasks[recipe.task](), Split(forget, retain, test, validation, asked=recipe.forget)
