"""What a patch is made of: edits of weights and buffers, guards, and the raw bits of tensors. New values, never differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import PatchError

MAX_CONFIG = 1 << 20
"""Largest configuration of one guard, as JSON: 1 MiB. What is larger belongs into its tensors."""


_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The tensor's raw bits as integers of the same width: a view, exact for -0.0, inf and nan."""
    return t.detach().view(_INTS[t.element_size()])


@dataclass(frozen=True, eq=False)
class Replace:
    """New values of one parameter or buffer: all of it (`mask` None, values of its shape) or at the True places of `mask` (K,)."""

    name: str
    values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LowRank:
    """W += scale * up @ down for one matrix (O, I): up (O, r), down (r, I); of a stack of matrices (E, O, I): up (E, O, r), down (E, r, I)."""

    name: str
    up: Tensor
    down: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Hook:
    """An inference-time guard: a kind that `core.hooks` registers, under a name of its own, with tensors and JSON values, never code.

    Weights stay as they are: a suppression, no deletion. The kind "none" takes the guard of that name off; it is what the inverse holds.
    Raises PatchError for a configuration that is no JSON object, or too large, and for tensors that are none.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name and isinstance(self.kind, str) and self.kind):
            raise PatchError(f"a guard needs a name and a kind, not {self.name!r} and {self.kind!r}")
        if not (isinstance(self.tensors, Mapping) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in self.tensors.items())):
            raise PatchError(f"guard {self.name}: tensors must map names to tensors")
        if not isinstance(self.config, Mapping) or not all(isinstance(n, str) for n in self.config):
            raise PatchError(f"guard {self.name}: config must map names to JSON values")
        try:
            size = len(self.listed)
        except (TypeError, ValueError) as error:
            raise PatchError(f"guard {self.name}: config is no JSON ({error})") from None
        if size > MAX_CONFIG:
            raise PatchError(f"guard {self.name}: config is {size} bytes long, more than {MAX_CONFIG}")

    @property
    def listed(self) -> str:
        """The configuration as JSON with sorted names: equal configurations give equal texts."""
        return json.dumps(dict(self.config), sort_keys=True, allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 over name, kind, configuration and tensors: the policy that is in force."""
        h = hashlib.sha256()
        feed(h, "guard", self.name, self.kind, self.listed)
        for name in sorted(self.tensors):
            feed(h, name, *facts(self.tensors[name]))
        return h.hexdigest()


Edit = Replace | LowRank | Hook


def raw(t: Tensor) -> bytes:
    """The tensor's bytes in logical order."""
    return bits(t.detach().cpu().contiguous()).numpy().tobytes()


def facts(t: Tensor) -> tuple[str, bytes]:
    """Type and shape, and the bytes: two tensors with the same facts are the same to the bit."""
    return f"{t.dtype}{tuple(t.shape)}", raw(t)


def feed(h: Any, *parts: str | bytes) -> None:
    """Update a hash with each part after its length (8 bytes), so that no other parts feed it the same."""
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        h.update(len(content).to_bytes(8, "little"))
        h.update(content)
