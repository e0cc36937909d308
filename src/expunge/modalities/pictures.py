"""Images with their prompts, or prompts alone: what diffusion models and dual encoders learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import SplitError


@dataclass(frozen=True, repr=False)
class Pictures:
    """Images with their prompts held in memory; a request that names a concept alone has prompts without images.

    x        (N, C, H, W) images (latents, in a latent model) in [-1, 1], or None
    tokens   (N, L) int64 tokens of the prompts
    ids      (N,) that name each record for good
    rows     N raw records: `prompt`, and the concepts it shows by domain, as {"prompt": "a striped ring", "style": "striped", "object": "ring"}
    encode   list of prompts -> (N, L) tokens, so that other prompts can be put in
    """

    x: Tensor | None
    tokens: Tensor
    ids: Tensor
    rows: tuple[Mapping[str, Any], ...]
    encode: Callable[[Sequence[str]], Tensor] | None = None
    augment: None = None

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.ids), len(self.rows), len(self.tokens if self.x is None else self.x)}
        if len(lengths) > 1:
            raise SplitError(f"images, tokens, ids and rows must be equally long; found {', '.join(map(str, sorted(lengths)))}")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[Tensor | None, Tensor]:
        return None if self.x is None else self.x[i], self.tokens[i]

    def __repr__(self) -> str:
        what = "prompts" if self.x is None else f"images of shape {tuple(self.x.shape[1:])} with prompts"
        return f"Pictures({len(self):,} {what}, {len({r.get('prompt') for r in self.rows}):,} different)"

    @property
    def prompts(self) -> list[str]:
        """The prompts as text."""
        return [str(row.get("prompt", "")) for row in self.rows]

    @property
    def different(self) -> int:
        """How many different prompts there are."""
        return len({row.numpy().tobytes() for row in self.tokens})

    @property
    def bare(self) -> bool:
        """Whether these are prompts alone, which have no loss."""
        return self.x is None

    def joined(self, *others: Pictures) -> Pictures:
        """These records and those of the others, one after another; prompts alone if any of them are."""
        parts = (self, *others)
        x = None if any(p.x is None for p in parts) else torch.cat([p.x for p in parts])
        rows = sum((p.rows for p in parts), ())
        return replace(self, x=x, tokens=torch.cat([p.tokens for p in parts]), ids=torch.cat([p.ids for p in parts]), rows=rows)

    def take(self, index: Tensor | Sequence[int]) -> Pictures:
        """The rows at `index`, in that order."""
        at = torch.as_tensor(index, dtype=torch.long)
        x = None if self.x is None else self.x[at]
        return replace(self, x=x, tokens=self.tokens[at], ids=self.ids[at], rows=tuple(self.rows[k] for k in at.tolist()))

    def prompted(self, prompts: Sequence[str]) -> Pictures:
        """The same records with other prompts. Raises SplitError without `encode`."""
        if self.encode is None:
            raise SplitError("these pictures have no tokenizer: other prompts cannot be put in")
        rows = tuple({**row, "prompt": p} for row, p in zip(self.rows, prompts, strict=True))
        return replace(self, tokens=self.encode(list(prompts)), rows=rows)

    @cached_property
    def keys(self) -> list[bytes]:
        """One digest per row over image and tokens: equal rows have equal keys."""
        x = self.tokens if self.x is None else self.x.detach().cpu().contiguous().flatten(1)
        pairs = zip(x.cpu().numpy(), self.tokens.cpu().numpy(), strict=True)
        return [hashlib.blake2b(a.tobytes() + b.tobytes(), digest_size=12).digest() for a, b in pairs]

    @cached_property
    def inputs(self) -> list[bytes]:
        """The same over the image alone; empty for prompts alone."""
        x = [] if self.x is None else self.x.detach().cpu().contiguous().flatten(1).numpy()
        return [hashlib.blake2b(a.tobytes(), digest_size=12).digest() for a in x]

    @cached_property
    def digest(self) -> str:
        """Digest of all rows in order: names the data in patches, caches and reports."""
        return hashlib.sha256(b"".join(self.keys)).hexdigest()[:16]
