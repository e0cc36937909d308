"""Models from a short spec: `py:module:factory` or `timm:name?num_classes=10` and a safetensors state dict, or a folder of transformers. Code is only run where
the user names it; weights are never pickles."""

from __future__ import annotations

import copy
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from expunge.core.digest import distinct
from expunge.core.errors import ExpungeError, ModelError, SettingError, first_line, printable
from expunge.core.errors import plain as told
from expunge.core.files import write
from expunge.core.machine import devices
from expunge.core.patch import Patch
from expunge.modalities.files import folders

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
    except (Exception, SystemExit) as problem:
        at = traceback.extract_tb(problem.__traceback__)[-1]
        raise error(f"{spec} raised {told(problem)} ({Path(at.filename).name}, line {at.lineno})") from None
    finally:
        sys.path.remove(place)


UNTRAINED = "none"
"""What --weights says where the factory loads the weights itself."""


def load(spec: str, weights: Path | str | None = None, folder: Path | None = None, *, finite: bool = True, dtype: str = "auto") -> nn.Module:
    """The model of a spec, in eval mode, with the state dict of a safetensors file if one is named.

    spec   py:module:factory, timm:NAME?num_classes=10, or a folder that save_pretrained wrote with an image classifier in it
    dtype  auto (as the factory and the file have it), or the floating type that it is cast to (`core.machine.devices`)
    Raises ModelError for a factory that fails, a pickle, a damaged file, names or shapes that do not fit, or weights that are not
    finite (unless `finite` is False: then the audit says so).
    """
    if folders.is_folder(spec, folder):
        place = folder / spec if folder else Path(spec)
        model = folders.load(place, finite=finite or weights is not None)
    else:
        model = _timm(spec) if spec.startswith("timm:") else call(spec, folder=folder)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned {type(model).__name__}, not a torch module")
    if weights is not None:
        model.load_state_dict(read_state(Path(weights), model, finite=finite), strict=False)
    kind = devices.dtype(dtype)
    return (model if kind is None else model.to(kind)).eval()


def chosen(spec: str, weights: str, folder: Path | None = None) -> str:
    """What --weights names: a file, or "" where the model brings its own. Raises SettingError where that must be said and is not."""
    if weights == UNTRAINED:
        return ""
    if not weights and not folders.is_folder(spec, folder):
        raise SettingError(
            f"--weights is missing: {printable(spec)} alone gives a network whose numbers are drawn at random; name --weights FILE.safetensors, or "
            f"--weights {UNTRAINED} where the factory loads its own"
        )
    return weights


def _timm(spec: str) -> nn.Module:
    """A model of timm by name, without weights: its settings stand after a question mark."""
    name, _, query = spec.removeprefix("timm:").partition("?")
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModelError("timm: models need timm: pip install timm") from None
    settings = dict(parse_qsl(query))
    if odd := set(settings) - {"num_classes", "in_chans", "img_size"} or {n for n, v in settings.items() if not v.isdigit()}:
        raise ModelError(f"timm: takes num_classes, in_chans and img_size, whole numbers, not '{min(odd)}'")
    try:
        return timm.create_model(name, pretrained=False, **{n: int(v) for n, v in settings.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(printable(f"timm cannot make {name}: {first_line(error)}")) from None


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


def release(model: nn.Module, patch: Patch, folder: Path | str) -> Path:
    """Write the state dict with the patch in it to WEIGHTS in a folder, which is returned."""
    twin = copy.deepcopy(model)
    patch.apply(twin)
    save_state(twin, Path(folder) / WEIGHTS)
    return Path(folder)


def plain(model: nn.Module, folder: Path | str) -> nn.Module:
    """A copy of the model with the released weights, as `load_state_dict` of safetensors' `load_file` puts them there."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(read_state(Path(folder) / WEIGHTS, twin), strict=False)
    return twin.eval()
