"""Records as rows of a tensor, or of several by name: what classifiers, regressors, GANs and image-to-image models learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import SplitError
from expunge.core.types import each
from expunge.modalities.stored import Stored, rows_at, together

PASS = 1 << 26
"""Bytes of inputs that are read for one pass where they are not held in memory: 64 MiB."""


@dataclass(frozen=True, repr=False)
class Examples:
    """Records: inputs x (N, ...), held in memory or read as needed (`modalities.stored`), or a mapping of such (token ids, masks); targets y (N,)
    or (N, K), ids (N,) that name each record for good.

    `augment(x, generator)` is applied to whole batches (vectorised) when a batch is drawn for training; audits never see it.
    `names` maps ids to the user's own names of records (file names, an id column of words), where there are such; `schema` is what the data was read as
    (`modalities.files.schema.Schema`), where it was read.
    """

    x: Any
    y: Tensor
    ids: Tensor
    augment: Callable[[Any, torch.Generator], Any] | None = None
    names: Mapping[int, str] | None = None
    schema: Any = None

    def __post_init__(self) -> None:
        sizes = {*each(len, self.x).values()} if isinstance(self.x, Mapping) else {len(self.x)}
        if sizes != {len(self.y)} or len(self.y) != len(self.ids):
            found = " and ".join(map(str, sorted(sizes)))
            raise SplitError(f"x, y and ids must be equally long; found {found}, {len(self.y)} and {len(self.ids)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        return each(lambda t: t[i], self.x), self.y[i]

    def __repr__(self) -> str:
        shape = each(lambda t: tuple(t.shape[1:]), self.x)
        return f"Examples({len(self):,} of shape {shape}, targets {str(self.y.dtype).removeprefix('torch.')})"

    @property
    def _inputs(self) -> list[Tensor]:
        """The tensors of x, by name where they have names."""
        return [self.x[name] for name in sorted(self.x)] if isinstance(self.x, Mapping) else [self.x]

    @property
    def stored(self) -> bool:
        """Whether inputs are read as they are needed (`modalities.stored.Stored`) and not held in memory."""
        return isinstance(self.x, Stored)

    @property
    def at_once(self) -> int:
        """Most records of one pass that reads, as many as PASS bytes hold; only of inputs that are not held in memory (AttributeError else)."""
        if not self.stored:
            raise AttributeError("records in memory are read as many at a time as the reader likes")
        return max(1, PASS // max(1, self.x.nbytes // max(1, len(self.x))))

    @property
    def fault(self) -> str:
        """What is wrong with inputs or targets, or nothing."""
        if not self.stored and not all(bool(torch.isfinite(t.float()).all()) for t in self._inputs):
            return "holds inputs that are not finite"
        if self.y.is_floating_point() and not bool((finite := torch.isfinite(self.y).flatten(1 if self.y.ndim > 1 else 0)).all()):
            rows = (~finite.view(len(self.y), -1).all(1)).nonzero().flatten().tolist()
            return f"holds targets that are not finite: {len(rows)} of {len(self.y)} records, the first with id {int(self.ids[rows[0]])}; leave them out"
        return ""

    def joined(self, *others: Examples) -> Examples:
        """These records and those of the others, one after another."""
        parts = (self, *others)
        x = {n: torch.cat([p.x[n] for p in parts]) for n in self.x} if isinstance(self.x, Mapping) else together([p.x for p in parts])
        names = {i: name for p in parts for i, name in (p.names or {}).items()} or None
        return replace(self, x=x, y=torch.cat([p.y for p in parts]), ids=torch.cat([p.ids for p in parts]), names=names)

    def called(self, i: int) -> str:
        """The user's own name of a record of this id, or the id.

        >>> Examples(torch.zeros(1), torch.zeros(1), torch.tensor([7]), names={7: "cat/1.png"}).called(7)
        'cat/1.png'
        """
        return (self.names or {}).get(int(i), str(int(i)))

    def take(self, index: Tensor | Sequence[int]) -> Examples:
        """The rows at `index`, in that order."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return replace(self, x=each(lambda t: rows_at(t, rows), self.x), y=self.y[rows], ids=self.ids[rows])

    @cached_property
    def keys(self) -> list[bytes]:
        """One digest per row over inputs and target: equal rows have equal keys."""
        return self.x.keys(self.y) if self.stored else _keys([*self._inputs, self.y])

    @cached_property
    def inputs(self) -> list[bytes]:
        """The same over inputs alone, where the target is one value; empty where it is an image or the like, which tells records of equal inputs apart."""
        return [] if self.y.ndim != 1 else self.x.keys() if self.stored else _keys(self._inputs)

    @cached_property
    def digest(self) -> str:
        """Digest of all rows in order: names the data in patches, caches and reports."""
        return hashlib.sha256(b"".join(self.keys)).hexdigest()[:16]


def _keys(tensors: Sequence[Tensor]) -> list[bytes]:
    """One digest per row over these tensors (N, ...)."""
    columns = [t.detach().cpu().contiguous().reshape(len(t), -1).numpy() for t in tensors] if len(tensors[0]) else []
    return [hashlib.blake2b(b"".join(a.tobytes() for a in row), digest_size=12).digest() for row in zip(*columns, strict=True)]
