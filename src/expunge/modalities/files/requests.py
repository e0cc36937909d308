"""Requests over records in files: a factory and its weights, tables, image folders or worlds, and a selector. What the command line and recipes start from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import Hook
from expunge.core.errors import ModelError, RecipeError, SettingError
from expunge.core.files import together, whole
from expunge.core.modality import Opened, Request, named
from expunge.core.types import Split, Task
from expunge.modalities.files import feeding, folders, models, readers, selectors
from expunge.modalities.files import schema as schemas
from expunge.modalities.records import mislabelled
from expunge.parts.provenance import referred

PASSED = {"id_column": "id", "ignore": "ignore", "classes": "classes", "mean": "mean", "std": "std", "size": "size", "channels": "channels", "memory": "memory",
          "target": "target", "x": "x", "columns": "columns"}  # fmt: skip
"""Option of the command line -> what a data spec calls it."""


def share(validation: str) -> float:
    """The share of test that validation is to be; 0 where validation is data of its own. Raises RecipeError for one that is no share.

    >>> share("share:0.3"), share("csv:v.csv?target=y")
    (0.3, 0.0)
    """
    kind, _, value = validation.partition(":")
    if kind != "share":
        return 0.0
    try:
        if 0 <= (found := float(value)) < 1:
            return found
    except ValueError:
        pass
    raise RecipeError(f"validation must be data or share:0.3, with a share from 0 to below 1, not '{validation}'")


def split(request: Request, task: str, model: nn.Module | None = None) -> Split:
    """Forget and retain of the training data by the selector, test and validation, all held to the schema of the training data, which is read from it and from
    the model (names of its classes, how it wants pixels)."""
    return opened(request, task, model)[0]


def opened(request: Request, task: str, model: nn.Module | None = None) -> tuple[Split, tuple[str, ...]]:
    """(split, lines that say how it was read)."""
    given = request.options
    place = request.folder / request.model if folders.is_folder(request.model, request.folder) else None
    wants, names = feeding.wanted(model, place), folders.class_names(model)
    how = {option: str(given[name]) for name, option in PASSED.items() if given.get(name)}
    name = given["train"] if isinstance(given["train"], str) else "the training data"
    old = schemas.read(request.path(given["schema"])) if given.get("schema") else None
    if old is not None and (odd := [n for n in (*feeding.OPTIONS, "classes") if n in how]):
        raise SettingError(f"--{odd[0]} and --schema say two things: leave one out")
    if old is not None and wants is not None and old.feed and replace(feeding.from_record(old.feed), source="") != replace(wants, source=""):
        raise SettingError(f"--schema feeds the model otherwise than {wants.source} says; leave it out")
    if place is not None and wants is None and name.startswith("images:") and old is None and not how.get("mean"):
        why = "so nothing says how it wants pixels; name --mean and --std (--mean 0 --std 1 feeds 0 to 1)"
        raise SettingError(f"{request.model} has no preprocessor_config.json, {why}")
    load = partial(readers.load, task=task, folder=request.folder, inside=request.inside, feed=wants, classes=names)
    always = isinstance(given["train"], str) and "memory" not in readers.KINDS.get(given["train"].partition(":")[0], ("memory",))
    train = load(given["train"], known=old, options={n: v for n, v in how.items() if n != "memory" or not always})
    known = old or train.schema
    kept = {n: v for n, v in how.items() if n in ("id", "ignore", "target", "x", "memory")}

    def other(spec: Any) -> Any:
        takes = readers.KINDS.get(spec.partition(":")[0], ()) if isinstance(spec, str) else readers.KINDS["py"]
        return load(spec, known=known, options={n: v for n, v in kept.items() if n in takes})

    forget, retain = selectors.resolve(request.what, train, request.folder, inside=request.inside)
    test, validation = other(given["test"]) if _there(given["test"]) else None, None
    if isinstance(given["validation"], str) and given["validation"].startswith("share:"):
        given_share = share(given["validation"])
        if test is not None:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
            cut = int(given_share * len(test))
            test, validation = test.take(order[cut:]), test.take(order[:cut])
    elif _there(given["validation"]):
        validation = other(given["validation"])
    plants = given.get("plants", "")
    if isinstance(plants, str) and plants == "wrong":
        if validation is None or forget.y.is_floating_point():
            raise SettingError("--plants wrong needs validation data with labels: of its inputs under other labels plants are made")
        plants = mislabelled(validation, int(train.y.max()) + 1, torch.Generator().manual_seed(0))
    else:
        plants = other(plants) if _there(plants) else None
    lines = [f"forget {request.what}: {selectors.echoed(request.what, train, forget)}"]
    if known is not None:
        lines = [f"read {name}: {known.told()}", *([feeding.from_record(known.feed).told()] if known.feed else []), *lines]
    made = Split(forget, retain, test, validation, plants=plants, asked=request.what, corrected=bool(given.get("corrected")))
    return made, tuple(lines)


def _there(data: Any) -> bool:
    """Whether data is named: no empty word, and not None."""
    return data is not None and not (isinstance(data, str) and not data)


def read(request: Request, task: str) -> Opened:
    """Models from their factory or folder, and the split."""
    if not request.options["train"]:
        raise SettingError("--train is missing")
    model = load(replace(request, after=""))
    after = load(request) if request.audit or request.after else None
    made: Task = named(task).task()
    references = [referred(load(replace(request, after=r)), request.path(r)) for r in request.references]
    parts, lines = opened(request, task, model)
    place = request.folder / request.model if folders.is_folder(request.model, request.folder) else None

    def release(verdict: Any, folder: Path, form: str = "") -> Path | None:
        patch = None if verdict.chosen is None else verdict.chosen.attempt.patch
        if patch is None or any(isinstance(e, Hook) for e in patch.edits):
            return None
        return models.release(model, patch, folder) if place is None else folders.release(model, place, patch, folder)[0]

    def write(net: nn.Module, path: Path) -> Path:
        return models.save_state(net, path.with_suffix(".safetensors"))

    return Opened(
        model, made, parts, references, after, release, ("weights" if place is None else "folder",),
        (lambda folder: models.plain(model, folder)) if place is None else folders.load, write=write, read=lines,
    )  # fmt: skip


def load(request: Request) -> nn.Module:
    """The model of the factory or folder with the weights after, where the request names them, or those before. What is named after may be a folder, too."""
    inside, kind = request.folder if request.inside else None, request.options.get("dtype", "auto")
    if request.after and folders.is_folder(request.after, request.folder):
        request.path(request.after)
        return models.load(request.after, None, request.folder, finite=False, dtype=kind)
    weights = request.after or models.chosen(request.model, request.options["weights"], request.folder)
    if not request.model.startswith(("py:", "timm:")):
        request.path(request.model)
        inside = request.folder
    return models.load(request.model, request.path(weights) if weights else None, inside, finite=not request.after, dtype=kind)


def sized(request: Request, task: str) -> tuple[Task, Split, Any]:
    """Task and split for planning."""
    if request.model:
        raise SettingError("--model is the folder of a language model, for --task causal-lm")
    return named(task).task(), split(request, task), None


def holds(model: str) -> int:
    """Surely, where it is a folder of an image classifier; perhaps, where it is no folder."""
    if folders.is_folder(model):
        try:
            folders.configured(Path(model))
        except ModelError:
            return 0
        return 2
    return 0 if Path(model).is_dir() else 1


def apply(patch: Any, model: str, out: str, key: bytes | None, options: dict[str, Any]) -> list[str]:
    """What was written: the weights (of a folder of transformers: the folder) with the patch in them, and the inverse patch beside it."""
    if folders.is_folder(model):
        undo = Path(out).with_name(f"{Path(out).name}.undo.safetensors")
        with whole(out) as made:
            folders.release(folders.load(Path(model)), Path(model), patch, made)[1].save(undo, key)
        return [out, str(undo)]
    weights = models.chosen(model, options["weights"])
    net = models.load(model, Path(weights) if weights else None, dtype=options.get("dtype", "auto"))
    inverse = patch.apply(net)
    undo = Path(out).with_suffix(".undo.safetensors")
    with together(out, undo) as (weights, other):
        models.save_state(net, weights)
        inverse.save(other, key)
    return [str(out), str(undo)]


def revert(patch: Any, model: str, out: str, options: dict[str, Any]) -> list[str]:
    """What was written: the weights, or the folder, before."""
    if folders.is_folder(model):
        return [str(folders.release(folders.load(Path(model)), Path(model), patch, Path(out))[0])]
    if not options["weights"]:
        raise SettingError("--weights is missing")
    net = models.load(model, Path(options["weights"]), dtype=options.get("dtype", "auto"))
    patch.apply(net)
    return [str(models.save_state(net, out))]
