"""A device that is elsewhere: tensors that say they are on `away:0` and are computed on the CPU, so that a wrong device is noticed without a GPU.

    with Away() as device:
        model.to(DEVICE)            # any nn.Module
        ...                         # what a GPU would refuse is refused here, in the same words; values are those of the CPU, bit for bit
    device.syncs                    # how often a value came back to the host

Refused: an operation over tensors of two devices (a CPU tensor of one element without a dimension, indices on the CPU, and copies are let through, as on a
GPU), a generator of another device, `.numpy()`. Not seen: kernels, memory, asynchrony, differences of rounding, AMP, two devices at once. Wrongly refused: a
generator that was made on the device, which is used there. Built on torch's PrivateUse1 as a Python backend; importing this file registers the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "away"
aten: Any = torch.ops.aten


class Backend:
    """What torch asks of a device's module (`torch.away`): one device with random numbers of its own."""

    def __init__(self) -> None:
        self.draws = torch.Generator()

    def is_available(self) -> bool:
        return True

    is_initialized = is_bf16_supported = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        self.draws.manual_seed(int(seed) ^ 0x5EED)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return self.draws.get_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        self.draws.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


BACKEND = Backend()
_setup_privateuseone_for_python_backend(NAME, BACKEND)
DEVICE = torch.device(NAME, 0)
Plain = torch.Generator
ACTIVE: list[Away] = []


class Elsewhere(Plain):
    """A generator of the device."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE


class Made(Plain):
    """What stands for `torch.Generator` while the device is there."""

    def __new__(cls, device: Any = "cpu") -> Any:  # pyright: ignore
        return Plain.__new__(Elsewhere) if torch.device(device).type == NAME else Plain.__new__(Plain, device)


class There(Tensor):
    """A tensor of the device; `inner` holds its values on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout, device=DEVICE,
            requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        synced()
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.inner.numpy(force=True)
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, dtype: Any = None) -> Any:  # pyright: ignore
        return self.numpy()

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **_: Any) -> str:  # pyright: ignore
        return f"There({self.inner.detach()!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return There, (self.inner.detach(),)

    def data_ptr(self) -> int:
        return 0

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> There:
        return There(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        return step(func, args, kwargs or {})


FREE = {aten._to_copy.default, aten.copy_.default, aten.copy.default, aten._copy_from.default, aten.lift_fresh.default, aten.lift.default,
        aten.lift_fresh_copy.default, aten.set_.source_Tensor}  # fmt: skip
"""Operations between devices that a GPU allows."""
READ = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEX = READ | {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default}
HOST = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default,
        aten.unique_dim.default, aten._unique2.default, aten._unique.default}  # fmt: skip
"""Operations whose result the host waits for."""


def synced() -> None:
    for device in ACTIVE[-1:]:
        device.syncs += 1


def two(a: Any, b: Any, where: Any) -> RuntimeError:
    return RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {a} and {b}! (in {where})")


def allowed(func: Any, args: Any, there: list[Tensor], here: list[Tensor]) -> None:
    """Raises RuntimeError, as a GPU does, for an operation over tensors of both devices."""
    if not there or not here or func in FREE:
        return
    if func in INDEX:
        if not isinstance(args[0], There):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if func not in READ and isinstance(args[2], Tensor) and not isinstance(args[2], There) and args[2].dim() > 0:
            raise two(DEVICE, "cpu", "the values of index_put_")
        return
    if any(t.dim() > 0 for t in here):
        raise two(DEVICE, "cpu", func)
    if func._schema.is_mutable and args and isinstance(args[0], Tensor) and not isinstance(args[0], There):
        raise two("cpu", DEVICE, func)


def step(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: refused, or computed on the CPU and wrapped."""
    flat, spec = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, There)]
    allowed(func, args, there, [t for t in flat if isinstance(t, Tensor) and not isinstance(t, There)])
    wanted, generator = kwargs.get("device"), kwargs.get("generator")
    to_there = wanted is not None and torch.device(wanted).type == NAME
    result_there = to_there if wanted is not None else bool(there)
    if isinstance(generator, Plain) and isinstance(generator, Elsewhere) is not result_there:
        raise RuntimeError(f"Expected a '{NAME if result_there else 'cpu'}' device type for generator but found '{'cpu' if result_there else NAME}'")
    if there and (func in HOST or (func is aten._to_copy.default and wanted is not None and not to_there)):
        synced()
    if there and func is aten.copy_.default and not isinstance(args[0], There):
        synced()
    a, k = tree_unflatten([t.inner if isinstance(t, There) else t for t in flat], spec)
    k = {**k, **({"device": torch.device("cpu")} if to_there else {}), **({"pin_memory": False} if "pin_memory" in k else {})}
    real = aten.zeros.default if func is aten._efficientzerotensor.default else func  # a wrapper cannot be a symbolic zero
    own = result_there and generator is None and torch.Tag.nondeterministic_seeded in func.tags and bool(ACTIVE) and ACTIVE[-1].own
    with drawing() if own else contextlib.nullcontext():
        out = real(*a, **k)
    if not result_there and (wanted is not None or not there):
        return out
    wrapped = tree_map(lambda t: There(t) if isinstance(t, Tensor) and not isinstance(t, There) else t, out)
    if func is aten.equal.default or not there:
        return wrapped
    if not isinstance(args[0], There) and func in FREE:
        return args[0] if func is aten.copy_.default else wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The device's own random numbers."""
    kept = torch.get_rng_state()
    torch.set_rng_state(BACKEND.draws.get_state())
    try:
        yield
    finally:
        BACKEND.draws.set_state(torch.get_rng_state())
        torch.set_rng_state(kept)


class Away(TorchDispatchMode):
    """While active, `device="away"` gives tensors of the device. `own`: it draws random numbers of its own, as a GPU; else the CPU's, for equal patches."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.own, self.syncs, self.before = own, 0, (False, False)

    def __enter__(self) -> Any:
        self.before = torch._C._only_lift_cpu_tensors(), torch._C._is_multithreading_enabled()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) reaches the mode
        torch.Generator = Made
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        ACTIVE.pop()
        torch.Generator = Plain
        torch._C._set_only_lift_cpu_tensors(self.before[0])
        torch._C._set_multithreading_enabled(self.before[1])  # pyright: ignore
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return step(func, args, kwargs or {})
