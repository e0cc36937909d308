"""Image classifiers of transformers in folders that `save_pretrained` wrote. Weights are safetensors alone, no code of a folder is run, none is drawn."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.errors import ModelError, first_line, printable
from expunge.core.files import json_object, whole
from expunge.modalities.quietly import fitting, quietly

ENDING = "ForImageClassification"
"""How the architecture of an image classifier ends."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def is_folder(spec: str, folder: Path | None = None) -> bool:
    """Whether --model names a folder with a config.json."""
    return bool(spec) and not spec.startswith(("py:", "timm:")) and ((folder or Path.cwd()) / spec / "config.json").is_file()


def configured(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError where it is none of an image classifier."""
    found = json_object(folder / "config.json", ModelError)
    kinds = found.get("architectures")
    if not isinstance(kinds, list) or not any(str(k).endswith(ENDING) for k in kinds):
        said = printable(str(kinds[0])) if isinstance(kinds, list) and kinds else "no model that its configuration names"
        raise ModelError(f"{folder.name} holds {said}, no image classifier ({ENDING}): its head would be drawn at random")
    return found


def load(folder: Path, *, finite: bool = True) -> nn.Module:
    """The classifier in eval mode, its weights in the type they are stored in.

    Raises ModelError for a folder that holds none, pickled weights, weights that lack some of the model's or have others, or that are not finite (unless
    `finite` is False: then the audit says so).
    """
    configured(folder)
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ModelError(f"models of transformers need {error.name}: pip install 'expunge[text]'") from None
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder.name} holds no safetensors weights (pickles can run code and are not read): save it with save_pretrained")
    try:
        with quietly():
            found: Any = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, dtype="auto", output_loading_info=True, **LOCAL)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        raise ModelError(printable(f"cannot load {folder.name}: {first_line(error)}")) from None
    model, info = found
    fitting(folder.name, info)
    for name, p in model.named_parameters():
        if finite and not torch.isfinite(p).all():
            raise ModelError(f"{folder.name} holds values of {name} that are not finite")
    return model.eval()


TRAVELS = ("preprocessor_config.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
"""Files of a folder that go with the model that is made of it."""


def save(model: nn.Module, source: Path, out: Path) -> Path:
    """Write the model as a folder that transformers loads, with what travels along from `source`, whole or not at all. Raises ModelError for a folder that is
    there already."""
    with whole(out) as made:
        with quietly():
            model.save_pretrained(made)  # pyright: ignore
        for name in TRAVELS:
            if (source / name).is_file():
                shutil.copy(source / name, made / name)
    return out


def release(model: nn.Module, source: Path, patch: Any, out: Path) -> tuple[Path, Any]:
    """(folder with the patch in its weights, inverse patch). `model` is not changed."""
    twin = copy.deepcopy(model)
    inverse = patch.apply(twin)
    return save(twin, source, out), inverse


def class_names(model: Any) -> tuple[str, ...]:
    """Names of a model's classes by number, of its configuration (`config.id2label`); nothing where it has none but LABEL_0, LABEL_1, ..."""
    found = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(found, Mapping) or not found:
        return ()
    try:
        named = {int(k): str(v) for k, v in found.items()}
    except (TypeError, ValueError):
        return ()
    generic = all(v in (f"LABEL_{k}", str(k)) for k, v in named.items())
    fits = set(named) == set(range(len(named))) and len(set(named.values())) == len(named)
    return () if generic or not fits else tuple(named[k] for k in range(len(named)))
