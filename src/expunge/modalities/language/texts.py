"""Token sequences and the records they were made of: what language models learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.core.errors import SplitError
from expunge.core.modality import Level
from expunge.core.types import Split, Task

GENERAL = ("real_authors", "world_facts")
"""row["set"] of rows that ask for general knowledge: models are trained on it, so they are no non-members, wherever they stand."""


@dataclass(frozen=True, repr=False)
class Texts:
    """Token sequences of unequal length held in memory, with the records they were made of.

    tokens    N int64 vectors (T_i,): prompt and answer, end-of-turn token included
    targets   N bool vectors (T_i,): True where the token is trained and scored; the first token of a sequence never can be
    ids       (N,) that name each record for good
    rows      N raw records: question and answer, or text, and whatever else the file holds
    format    how records became tokens (`modalities.language.records.format.Format`), so that other answers can be put in
    """

    tokens: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    ids: Tensor
    rows: tuple[Mapping[str, Any], ...]
    format: Any = None
    augment: None = None
    at_once: ClassVar[int] = 16
    """Most records of one pass that reads."""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.targets) == len(self.ids) == len(self.rows):
            raise SplitError(
                f"tokens, targets, ids and rows must be equally long; found {len(self.tokens)}, {len(self.targets)}, {len(self.ids)}, {len(self.rows)}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.tokens[i], self.targets[i]

    def __repr__(self) -> str:
        return f"Texts({len(self):,} of {sum(len(t) for t in self.tokens):,} tokens, {sum(int(t.sum()) for t in self.targets):,} of them targets)"

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) tokens of each record: by these `core.types.Batches` brings like texts together."""
        return torch.tensor([len(t) for t in self.tokens])

    def joined(self, *others: Texts) -> Texts:
        """These records and those of the others, one after another."""
        parts = (self, *others)
        sums = {n: sum((getattr(p, n) for p in parts), ()) for n in ("tokens", "targets", "rows")}
        return replace(self, **sums, ids=torch.cat([p.ids for p in parts]))

    def take(self, index: Tensor | Sequence[int]) -> Texts:
        """The rows at `index`, in that order."""
        rows = torch.as_tensor(index, dtype=torch.long).tolist()
        pick = lambda values: tuple(values[k] for k in rows)  # noqa: E731
        return replace(self, tokens=pick(self.tokens), targets=pick(self.targets), rows=pick(self.rows), ids=self.ids[torch.tensor(rows, dtype=torch.long)])

    def called(self, i: int) -> str:
        """The user's own name of the record of that id: its field `id` where it has one, else the id."""
        return next((str(row["id"]) for k, row in zip(self.ids.tolist(), self.rows, strict=True) if k == int(i) and "id" in row), str(int(i)))

    @cached_property
    def reworded(self) -> Texts | None:
        """The same records asked by their `paraphrased_question`; None where one of them has none."""
        if self.format is None or not all(isinstance(row.get("paraphrased_question"), str) and "question" in row for row in self.rows):
            return None
        return self.format.texts([{**row, "question": row["paraphrased_question"]} for row in self.rows], self.ids)

    @cached_property
    def keys(self) -> list[bytes]:
        """One digest per row over tokens and targets: equal rows have equal keys."""
        pairs = zip(self.tokens, self.targets, strict=True)
        return [hashlib.blake2b(a.cpu().numpy().tobytes() + b.cpu().numpy().tobytes(), digest_size=12).digest() for a, b in pairs]

    @cached_property
    def inputs(self) -> list[bytes]:
        """The same over tokens alone, whichever of them are trained."""
        return [hashlib.blake2b(t.cpu().numpy().tobytes(), digest_size=12).digest() for t in self.tokens]

    @cached_property
    def digest(self) -> str:
        """Digest of all rows in order: names the data in patches, caches and reports."""
        return hashlib.sha256(b"".join(self.keys)).hexdigest()[:16]


def preflight(model: nn.Module, task: Task, split: Split) -> None:
    """Raises SplitError for parts that the model cannot take."""
    fits(model, split, "the model")


def fits(model: nn.Module, split: Split, which: str) -> None:
    """Raises SplitError for parts that are no Texts, or that hold tokens or lengths which the model (named by `which`) cannot take."""
    config = getattr(model, "config", None)
    known, context = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    for name, part in split.parts().items():
        if not isinstance(part, Texts):
            raise SplitError(f"{name} must be Texts (see data.text), not {type(part).__name__}")
        top, longest = max(int(t.max()) for t in part.tokens), max(len(t) for t in part.tokens)
        if known is not None and top >= known:
            raise SplitError(f"{name} holds token {top}; {which} knows {known}: is this its tokenizer?")
        if context is not None and longest > context:
            raise SplitError(f"{name} holds a text of {longest} tokens; the context of {which} is {context}: lower max_length")


def level(p: Any, model: nn.Module, part: str) -> Level:
    """Mean probability per token, beside that which each token's own share of the part's targets gives; above it in losses per token: 1 - loss / its loss."""
    nll, data = p.seen(model, part).nll.double(), getattr(p.split, part)
    said = torch.cat([t[where] for t, where in zip(data.tokens, data.targets, strict=True)])
    shares = said.bincount().double() / len(said)
    constant = torch.stack([-shares[t[where]].log().mean() for t, where in zip(data.tokens, data.targets, strict=True)])
    above = 1 - float(nll.mean() / constant.mean().clamp(min=1e-9))
    return Level("probability per token", float((-nll).exp().mean()), float((-constant).exp().mean()), above, len(data))
