"""Models from a short spec: `py:module:factory` and a safetensors state dict. Code is only run where the user names it; weights are never pickles."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.digest import distinct
from expunge.core.edits import Hook
from expunge.core.errors import ExpungeError, ModelError
from expunge.core.files import write
from expunge.core.patch import Patch

MAX_BYTES = 1 << 36
"""Largest weight file that is read: 64 GiB."""


def call(spec: str, error: type[ExpungeError] = ModelError, folder: Path | None = None) -> Any:
    """The result of `py:module:function` called without arguments; the module is looked for in `folder` and on the import path."""
    parts = spec.split(":")
    if len(parts) != 3 or parts[0] != "py":
        raise error(f"'{spec}' must be written py:module:function")
    place = str(folder or Path.cwd())
    sys.path.insert(0, place)
    importlib.invalidate_caches()  # a file that was written a moment ago is found
    try:
        return getattr(importlib.import_module(parts[1]), parts[2])()
    except (ImportError, AttributeError) as problem:
        raise error(f"cannot call {spec}: {problem}") from None
    finally:
        sys.path.remove(place)


def load(spec: str, weights: Path | str | None = None, folder: Path | None = None, *, finite: bool = True) -> nn.Module:
    """The module that `py:module:factory` returns, in eval mode, with the state dict of a safetensors file if one is named.

    Raises ModelError for a factory that fails, a pickle, a damaged file, names or shapes that do not fit, or weights that are not
    finite (unless `finite` is False: then the audit says so).
    """
    model = call(spec, folder=folder)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned {type(model).__name__}, not a torch module")
    if weights is not None:
        model.load_state_dict(read_state(Path(weights), model, finite=finite), strict=False)
    return model.eval()


def read_state(path: Path, model: nn.Module, *, finite: bool = True) -> dict[str, torch.Tensor]:
    """A state dict that fits the model exactly."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise ModelError(f"{path.name} is a pickle, which can run code; convert it with safetensors.torch.save_file(state_dict, 'x.safetensors')")
    if not path.is_file():
        raise ModelError(f"no weight file {path.name}")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path.name} is larger than {MAX_BYTES} bytes")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is no safetensors file, or is damaged ({error})") from None
    mine = distinct(model)
    for what, names in (("lacks", mine.keys() - state.keys()), ("has unknown", state.keys() - mine.keys())):
        if names:
            raise ModelError(f"{path.name} {what} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name, value in state.items():
        if value.shape != mine[name].shape:
            raise ModelError(f"{path.name} holds {name} as {tuple(value.shape)}, the model has {tuple(mine[name].shape)}")
        if finite and value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"{path.name} holds values of {name} that are not finite")
    return state


def save_state(model: nn.Module, path: Path | str) -> Path:
    """Write the state dict as safetensors, whole or not at all."""
    from safetensors.torch import save

    return write(path, save(distinct(model)))


WEIGHTS = "model.safetensors"
"""Name of the weights in a released folder."""


def release(model: nn.Module, patch: Patch, folder: Path | str) -> Path | None:
    """Write the state dict with the patch in it to WEIGHTS in a folder, which is returned; None for a patch that holds guards, which are no weights."""
    if any(isinstance(e, Hook) for e in patch.edits):
        return None
    twin = copy.deepcopy(model)
    patch.apply(twin)
    save_state(twin, Path(folder) / WEIGHTS)
    return Path(folder)


def plain(model: nn.Module, folder: Path | str) -> nn.Module:
    """A copy of the model with the released weights, as `load_state_dict` of safetensors' `load_file` puts them there."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(read_state(Path(folder) / WEIGHTS, twin), strict=False)
    return twin.eval()
