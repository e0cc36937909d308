"""Devices and float types: the one place of the package that names them. Everything else follows the model: `core.types.device_of`.

    model = placed(model, "cuda:1", "bfloat16")
    with reseeded(3): ...                    # global random numbers of all devices from seed 3; outside, they are what they were

A device is written auto (CUDA where there is one, else Apple's MPS, else the CPU), cpu, cuda, cuda:N or mps; a type auto (as stored), float32, bfloat16,
float16 or float64.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError, suggest

M = TypeVar("M", bound=nn.Module)

HOST = torch.device("cpu")
EMPTY = torch.device("meta")
"""Where tensors have shapes and no values."""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def device(name: str = "auto") -> torch.device:
    """The device that a command names. Raises SettingError for a name that is none, and for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else torch.device("mps") if torch.backends.mps.is_available() else HOST
    found = re.fullmatch(r"(cpu|mps|cuda)(?::(\d{1,4}))?", name)
    if not found or (found[1] != "cuda" and found[2]):
        raise SettingError(suggest("no device", name, ("auto", "cpu", "cuda", "cuda:0", "mps")))
    if found[1] == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(found[2] or 0) >= n:
            raise SettingError(f"no device '{name}' on this machine: PyTorch sees {n} CUDA device(s); --device auto takes what there is")
    if found[1] == "mps" and not torch.backends.mps.is_available():
        raise SettingError("no device 'mps' on this machine: PyTorch sees none; --device auto takes what there is")
    return torch.device(name)


def dtype(name: str = "auto") -> torch.dtype | None:
    """The float type of that name, None for auto. Raises SettingError for a name that is none."""
    if name not in DTYPES:
        raise SettingError(suggest("no dtype", name, DTYPES))
    return DTYPES[name]


def placed(model: M, where: str = "auto", kind: str = "auto") -> M:
    """The model, moved in place to the device and cast to the type of these names. Raises SettingError for a name that is none, and where there is no room."""
    there, float_type = device(where), dtype(kind)
    if any(p.is_meta for p in model.parameters()):
        raise SettingError("the model has weights that are not loaded (on the meta device, as offloading leaves them): load all of it, without device_map")
    try:
        return model.to(there) if float_type is None else model.to(there, float_type)
    except torch.OutOfMemoryError:
        size = sum(p.nbytes for p in model.parameters()) / 2**30
        raise SettingError(f"the model does not fit on {there}: its weights take {size:.1f} GiB; take --device cpu or --dtype bfloat16") from None


def _accelerator() -> tuple[str, Any]:
    """(name, module) of the accelerators that PyTorch was built for and this machine has; ("", None) without."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return ("", None) if found is None else (found.type, torch.get_device_module(found))


def drawn() -> dict[str, Tensor]:
    """State of the global random numbers by device: "cpu", and "cuda.0" and the like for every accelerator of the machine."""
    name, module = _accelerator()
    return {HOST.type: torch.get_rng_state(), **{f"{name}.{k}": module.get_rng_state(k) for k in range(module.device_count() if module else 0)}}


def redrawn(states: Mapping[str, Tensor]) -> None:
    """Put back what `drawn` gave; states of devices that are not here are left out."""
    name, module = _accelerator()
    torch.set_rng_state(states[HOST.type])
    for k in range(module.device_count() if module else 0):
        if f"{name}.{k}" in states:
            module.set_rng_state(states[f"{name}.{k}"], k)


@contextlib.contextmanager
def reseeded(seed: int | None = None) -> Iterator[None]:
    """Inside, the global random numbers of all devices start from the seed (None: go on as they are); outside, also after an exception, they are what they
    were."""
    kept = drawn()
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        redrawn(kept)


def peak_begun(where: torch.device) -> bool:
    """Count the device's peak of memory from now on; False where it does not count."""
    module = None if where == HOST else torch.get_device_module(where)
    if module is None or not hasattr(module, "max_memory_allocated") or not hasattr(module, "reset_peak_memory_stats"):
        return False
    module.reset_peak_memory_stats(where)
    return True


def peak(where: torch.device) -> int:
    """Bytes at the peak since `peak_begun`."""
    return int(torch.get_device_module(where).max_memory_allocated(where))
