"""Inputs that are read as they are needed: what an image folder or a data set holds beyond what memory should.

    data.x[index]      the rows at `index`, a tensor, read now (`workers` at a time)
    data.take(index)   other rows of the same source; nothing is read

What must be known of every record (that it can be read, its shape, its digest, the ends of its values) was read once, when the source was opened, and stands in
`facts`; for an image folder in a file beside it, so that a later run reads only what changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expunge.core.machine.bounds import size_of

WORKERS = 2
"""Records of a batch that are read side by side."""


def room(said: str = "") -> int:
    """Bytes of inputs that are held in memory: what --memory says (4G, 512M), else a quarter of the machine's. Raises SettingError for what is no size.

    >>> room("2K")
    2048
    """
    if not said:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        except (AttributeError, ValueError, OSError):
            return 1 << 33
    return size_of("memory", said)


@dataclass(frozen=True)
class Fact:
    """What is known of a record: the digest of its input, of input and label together as `Examples.keys` has it, that label, and the ends of its values."""

    inputs: bytes
    key: bytes
    label: int | float
    low: float
    high: float


def fact(x: Tensor, y: Tensor) -> Fact:
    """Of one input (...) and its target, a number."""
    raw = _raw(x)
    return Fact(hashlib.blake2b(raw, digest_size=12).digest(), _key(raw, y), y.item(), float(x.min()), float(x.max()))


@dataclass(frozen=True, repr=False)
class Stored:
    """Inputs (N, ...) of a source, which `fetch` reads by number.

    fetch   number of a record of the source -> its input (...), the same at every call
    rows    (N,) numbers of the records that stand here
    one     shape of an input
    dtype   of the inputs
    facts   of every record of the source, by number
    """

    fetch: Callable[[int], Tensor]
    rows: Tensor
    one: tuple[int, ...]
    dtype: torch.dtype
    facts: Sequence[Fact]
    workers: int = WORKERS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int):
            return self.fetch(int(self.rows[index]))
        numbers = self.rows[index].tolist()
        if not numbers:
            return torch.zeros((0, *self.one), dtype=self.dtype)
        if self.workers < 2 or len(numbers) < 2:
            return torch.stack([self.fetch(k) for k in numbers])
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self.fetch, numbers)))

    def __repr__(self) -> str:
        return f"Stored({len(self):,} inputs of shape {self.one}, read as they are needed)"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.one))

    @property
    def ndim(self) -> int:
        return 1 + len(self.one)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def take(self, index: Tensor) -> Stored:
        """The rows at `index`; nothing is read."""
        return replace(self, rows=self.rows[index])

    def keys(self, y: Tensor | None = None) -> list[bytes]:
        """Digests of the inputs, or of each with its target, as of tensors in memory. Where the target is not the one of the source, the input is read."""
        facts = [self.facts[k] for k in self.rows.tolist()]
        if y is None:
            return [f.inputs for f in facts]
        known = [y.ndim == 1 and f.label == y[i].item() for i, f in enumerate(facts)]
        return [f.key if same else _key(_raw(self[i]), y[i]) for i, (f, same) in enumerate(zip(facts, known, strict=True))]


def _raw(x: Tensor) -> bytes:
    return x.contiguous().numpy().tobytes()


def _key(raw: bytes, y: Tensor) -> bytes:
    return hashlib.blake2b(raw + y.numpy().tobytes(), digest_size=12).digest()


def rows_at(x: Any, index: Tensor) -> Any:
    """The rows of inputs at `index`, read only where they are held in memory."""
    return x.take(index) if isinstance(x, Stored) else x[index]


def together(parts: Sequence[Any]) -> Any:
    """Inputs of several parts, one after another: a tensor where all are, else read as they are needed."""
    if not any(isinstance(x, Stored) for x in parts):
        return torch.cat(list(parts))
    first = next(x for x in parts if isinstance(x, Stored))
    if all(isinstance(x, Stored) and x.fetch is first.fetch for x in parts):
        return replace(first, rows=torch.cat([x.rows for x in parts]))
    sources = [x if isinstance(x, Stored) else held(x) for x in parts]
    places = [(source, i) for source in sources for i in range(len(source))]

    def fetch(k: int) -> Tensor:
        source, i = places[k]
        return source[i]

    facts = [source.facts[int(source.rows[i])] for source, i in places]
    return Stored(fetch, torch.arange(len(places)), first.one, first.dtype, facts, first.workers)


def held(x: Tensor) -> Stored:
    """A tensor in memory as such inputs, whose labels are not known."""
    return Stored(lambda k: x[k], torch.arange(len(x)), tuple(x.shape[1:]), x.dtype, [replace(fact(row, torch.tensor(0)), label=float("nan")) for row in x])
