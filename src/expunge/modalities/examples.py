"""Records as rows of a tensor: what classifiers, regressors, GANs and image-to-image models learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from expunge.core.errors import SplitError


@dataclass(frozen=True, repr=False)
class Examples:
    """Data held in memory: inputs x (N, ...), targets y (N,) or (N, K), ids (N,) that name each record for good.

    `augment(x, generator)` is applied to whole batches (vectorised) when a batch is drawn for training; audits never see it.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.y) == len(self.ids):
            raise SplitError(f"x, y and ids must be equally long; found {len(self.x)}, {len(self.y)} and {len(self.ids)}")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]

    def __repr__(self) -> str:
        return f"Examples({len(self):,} of shape {tuple(self.x.shape[1:])}, targets {str(self.y.dtype).removeprefix('torch.')})"

    @property
    def fault(self) -> str:
        """What is wrong with the inputs, or nothing."""
        return "" if bool(torch.isfinite(self.x.float()).all()) else "holds inputs that are not finite"

    def joined(self, *others: Examples) -> Examples:
        """These records and those of the others, one after another."""
        parts = (self, *others)
        return replace(self, x=torch.cat([p.x for p in parts]), y=torch.cat([p.y for p in parts]), ids=torch.cat([p.ids for p in parts]))

    def take(self, index: Tensor | Sequence[int]) -> Examples:
        """The rows at `index`, in that order."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return replace(self, x=self.x[rows], y=self.y[rows], ids=self.ids[rows])

    @cached_property
    def keys(self) -> list[bytes]:
        """One digest per row over input and target: equal rows have equal keys."""
        x, y = self.x.detach().cpu().contiguous(), self.y.detach().cpu().contiguous()
        pairs = zip(x.reshape(len(x), -1).numpy(), y.reshape(len(y), -1).numpy(), strict=True) if len(x) else ()
        return [hashlib.blake2b(a.tobytes() + b.tobytes(), digest_size=12).digest() for a, b in pairs]

    @cached_property
    def digest(self) -> str:
        """Digest of all rows in order: names the data in patches, caches and reports."""
        return hashlib.sha256(b"".join(self.keys)).hexdigest()[:16]
