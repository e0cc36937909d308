"""Requests over records in files: a factory and its weights, tables, image folders or worlds, and a selector. What the command line and recipes start from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.errors import RecipeError, SettingError
from expunge.core.modality import Opened, Request, named
from expunge.core.types import Split, Task
from expunge.modalities.files import models, readers, selectors
from expunge.modalities.records import mislabelled
from expunge.parts.provenance import referred


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


def split(request: Request, task: str) -> Split:
    """Forget and retain of the training data by the selector, test and validation."""
    given = request.options
    load = partial(readers.load, task=task, folder=request.folder, inside=request.inside)
    parts: dict[str, Any] = {n: load(given[n]) for n in ("train", "test") if given[n]}
    forget, retain = selectors.resolve(request.what, parts["train"], request.folder)
    test, validation = parts.get("test"), None
    given_share = share(given["validation"])
    if given["validation"].startswith("share:"):
        if test is not None:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
            cut = int(given_share * len(test))
            test, validation = test.take(order[cut:]), test.take(order[:cut])
    elif given["validation"]:
        validation = load(given["validation"])
    plants = given.get("plants") or None
    if plants == "wrong":
        if validation is None or forget.y.is_floating_point():
            raise SettingError("--plants wrong needs validation data with labels: of its inputs under other labels plants are made")
        plants = mislabelled(validation, int(parts["train"].y.max()) + 1, torch.Generator().manual_seed(0))
    elif plants:
        plants = load(plants)
    return Split(forget, retain, test, validation, plants=plants, asked=request.what, corrected=bool(given.get("corrected")))


def read(request: Request, task: str) -> Opened:
    """Models from their factory, and the split."""
    for name in ("weights", "train") if request.audit else ("train",):
        if not request.options[name]:
            raise SettingError(f"--{name} is missing")
    model = load(replace(request, after=""))
    after = load(request) if request.audit or request.after else None
    made: Task = named(task).task()
    references = [referred(load(replace(request, after=r)), request.path(r)) for r in request.references]

    def release(verdict: Any, folder: Path, form: str = "") -> Path | None:
        return None if verdict.chosen is None else models.release(model, verdict.chosen.attempt.patch, folder)

    return Opened(
        model, made, split(request, task), references, after, release, ("weights",), lambda folder: models.plain(model, folder),
        write=lambda net, path: models.save_state(net, path.with_suffix(".safetensors")),
    )  # fmt: skip


def load(request: Request) -> nn.Module:
    """The model of the factory with the weights after, where the request names them, or those before."""
    weights = request.after or request.options["weights"]
    return models.load(request.model, request.path(weights) if weights else None, request.folder if request.inside else None, finite=not request.after)


def sized(request: Request, task: str) -> tuple[Task, Split, Any]:
    """Task and split for planning."""
    if request.model:
        raise SettingError("--model is the folder of a language model, for --task causal-lm")
    return named(task).task(), split(request, task), None


def holds(model: str) -> int:
    """Perhaps, where it is no folder."""
    return 0 if Path(model).is_dir() else 1


def apply(patch: Any, model: str, out: str, key: bytes | None, options: dict[str, Any]) -> list[str]:
    """What was written: the weights with the patch in them, and the inverse patch beside it."""
    net = models.load(model, Path(options["weights"]) if options["weights"] else None)
    inverse = patch.apply(net)
    return [str(models.save_state(net, out)), str(inverse.save(Path(out).with_suffix(".undo.safetensors"), key))]


def revert(patch: Any, model: str, out: str, options: dict[str, Any]) -> list[str]:
    """What was written: the weights before."""
    if not options["weights"]:
        raise SettingError("--weights is missing")
    net = models.load(model, Path(options["weights"]))
    patch.apply(net)
    return [str(models.save_state(net, out))]
