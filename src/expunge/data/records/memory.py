"""What a model that learns on keeps of the past: a reservoir of records with their logits, and Fisher sums that records can be taken out of.

    memory = memory.add(rows, logits, part=3, generator=g)        # reservoir sampling: every record seen is in it with the same chance
    memory = memory.without(ids)                                  # rows gone; memory.stale: logits made by a model that had seen them
    memory = memory.relabelled(memory.stale, logits)              # the same rows, their logits made anew

Reservoir: record number t (from 0) of those seen goes to slot t while there is room, else to a random slot r in 0..t if r < size, and nowhere
otherwise. The reference code writes such a record to slot -1, over the last one; here it is dropped. After deletions the next insertions make up
for them by random pairing: with h deletions that hit the sample and m that missed it not yet made up for, a new record enters with chance
h / (h + m). So the memory stays a uniform sample of what was seen and not deleted.

Papers   Buzzega et al., arXiv:2004.07211 (DER++); Vitter 1985 (reservoir); Gemulla, Lehner, Haas, VLDB 2006 (random pairing).
Card     continual-retention, loss 3 and pitfalls; clpu-der (index bug).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import DataError, SettingError
from expunge.core.files import file_digest, verified, write
from expunge.core.types import Out, Task
from expunge.modalities.examples import Examples
from expunge.parts.updates.gradients import squares

MAX_BYTES = 1 << 34
"""Largest memory file that is read: 16 GiB."""
FORMAT = 1
COLUMNS = ("y", "ids", "logits", "part", "made", "stale")


@dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """At most `size` records: x (M, ...), y (M,), ids (M,), logits (M, C), part (M,) they came with, made (M,) clock when their logits were made.

    stale    (M,) bool: logits that a model made which had seen a record deleted since
    seen     id -> clock when it was first offered, of all records offered and not deleted, in the memory or not
    hits, misses    deletions, in the memory or not, that insertions have not made up for
    clock    counts calls of `add` and `relabelled`: logits made at clock c come from a model that had seen what was offered up to c
    """

    size: int
    x: Tensor | None = None
    y: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    part: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    made: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    stale: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    seen: Mapping[int, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    clock: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingError(f"a memory holds at least 1 record, not {self.size}")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Memory({len(self)} of at most {self.size} records, {len(self.seen):,} seen)"

    @property
    def num_seen(self) -> int:
        """Records offered and not deleted: the population that the memory is a sample of."""
        return len(self.seen)

    def rows(self, part: int | None = None) -> Examples:
        """The records as data for training, of one part or of all."""
        if self.x is None:
            raise DataError("the memory is empty: nothing was offered yet")
        whole = Examples(self.x, self.y, self.ids)
        return whole if part is None else whole.take((self.part == part).nonzero().squeeze(1))

    def add(self, rows: Examples, logits: Tensor, *, part: int = 0, generator: torch.Generator) -> Memory:
        """Offer records one by one with the logits (N, C) that the model of this moment has for them.

        Raises DataError for ids seen before and logits that do not fit.
        """
        if len(logits) != len(rows) or logits.ndim != 2 or (len(self) and logits.shape[1] != self.logits.shape[1]):
            raise DataError(f"logits of shape {tuple(logits.shape)} do not fit {len(rows)} records and a memory of {tuple(self.logits.shape)}")
        names = rows.ids.tolist()
        first = {i: k for k, i in reversed(list(enumerate(names)))}
        if twice := [i for k, i in enumerate(names) if i in self.seen or first[i] < k]:
            raise DataError(f"record {twice[0]} was offered twice; a memory takes each record once")
        slots, hits, misses = [(-1, k) for k in range(len(self))], self.hits, self.misses
        for k in range(len(rows)):
            t = self.num_seen + k
            if hits + misses:
                if int(torch.randint(hits + misses, (), generator=generator)) < hits:
                    slots.append((0, k))
                    hits -= 1
                else:
                    misses -= 1
            elif len(slots) < self.size:
                slots.append((0, k))
            elif (r := int(torch.randint(t + 1, (), generator=generator))) < self.size:
                slots[r] = (0, k)
        old = torch.tensor([k for where, k in slots if where < 0], dtype=torch.long)
        new = torch.tensor([k for where, k in slots if where == 0], dtype=torch.long)
        order = torch.tensor([where for where, _ in slots]).argsort(stable=True).argsort()  # rows of old first, then new: back into their slots
        tick = self.clock + 1

        def joined(mine: Tensor | None, theirs: Tensor) -> Tensor:
            theirs = theirs.detach().cpu()[new]
            return (theirs if mine is None or not len(mine) else torch.cat([mine[old], theirs]))[order]

        fresh = {"x": rows.x, "y": rows.y, "ids": rows.ids, "logits": logits.float(), "part": torch.full((len(rows),), part)}
        fresh |= {"made": torch.full((len(rows),), tick), "stale": torch.zeros(len(rows), dtype=torch.bool)}
        columns = {name: joined(getattr(self, name), value) for name, value in fresh.items()}
        return replace(self, **columns, hits=hits, misses=misses, clock=tick, seen={**self.seen, **dict.fromkeys(names, tick)})

    def without(self, ids: Tensor) -> Memory:
        """Less these records; `stale` marks the logits that a model made which had seen one of them. Ids never offered are passed over."""
        gone = [i for i in ids.tolist() if i in self.seen]
        keep = ~torch.isin(self.ids, torch.tensor(gone, dtype=torch.long))
        lost = int((~keep).sum())
        since = min((self.seen[i] for i in gone), default=self.clock + 1)
        kept = {n: getattr(self, n)[keep] for n in COLUMNS}
        seen = {i: t for i, t in self.seen.items() if i not in set(gone)}
        x = None if self.x is None else self.x[keep]
        less = replace(self, x=x, **kept, seen=seen, hits=self.hits + lost, misses=self.misses + len(set(gone)) - lost)
        return replace(less, stale=less.stale | (less.made >= since))

    def relabelled(self, which: Tensor, logits: Tensor) -> Memory:
        """The same records; those where `which` (M,) is True get logits (K, C), made now."""
        if which.shape != self.ids.shape or logits.shape != self.logits[which].shape:
            raise DataError(f"{tuple(logits.shape)} logits for {int(which.sum())} of {len(self)} records of a memory with {tuple(self.logits.shape)}")
        fresh, made = self.logits.clone(), self.made.clone()
        fresh[which], made[which] = logits.detach().cpu().float(), self.clock + 1
        return replace(self, logits=fresh, made=made, stale=self.stale & ~which, clock=self.clock + 1)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that make up the memory."""
        tensors = {n: getattr(self, n) for n in COLUMNS} | ({} if self.x is None else {"x": self.x})
        tensors |= {"seen.ids": torch.tensor(list(self.seen), dtype=torch.long), "seen.clock": torch.tensor(list(self.seen.values()), dtype=torch.long)}
        return tensors, {n: getattr(self, n) for n in ("size", "hits", "misses", "clock")} | {"format": FORMAT}

    @staticmethod
    def unpacked(tensors: Mapping[str, Tensor], doc: Mapping[str, Any]) -> Memory:
        """What `packed` gave, checked. Raises DataError."""
        try:
            if doc["format"] != FORMAT:
                raise DataError(f"the memory has format {doc['format']}, this version reads {FORMAT}")
            found = {n: tensors[n] for n in COLUMNS} | {"x": tensors.get("x")}
            seen = dict(zip(tensors["seen.ids"].tolist(), tensors["seen.clock"].tolist(), strict=True))
            memory = Memory(seen=seen, **found, **{n: int(doc[n]) for n in ("size", "hits", "misses", "clock")})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the memory is not well-formed ({type(error).__name__}: {error})") from None
        lengths = {len(t) for t in found.values() if t is not None}
        if len(lengths) > 1 or len(memory) > memory.size or not set(memory.ids.tolist()) <= set(seen):
            raise DataError("the memory is not well-formed: its columns do not fit together")
        return memory

    def save(self, path: str | Path) -> Path:
        """One safetensors file with a SHA-256 over content and header, written whole or not at all. It holds records: guard it as the data itself."""
        from safetensors.torch import save

        tensors, doc = self.packed()
        tensors = {n: t.contiguous().clone() for n, t in tensors.items()}
        body = json.dumps(doc, sort_keys=True)
        return write(path, save(tensors, {"memory": body, "sha256": file_digest(body, tensors)}))

    @staticmethod
    def load(path: str | Path) -> Memory:
        """Read and verify what `save` wrote. Raises DataError for anything damaged, foreign or larger than MAX_BYTES."""
        return Memory.unpacked(*reversed(checked(Path(path), "memory")))


def checked(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON of the header's entry `key`, tensors) of a safetensors file with a SHA-256 over both. Raises DataError."""
    header, tensors = verified(path, key, DataError, f"is no {key} file, or is truncated", f"is a safetensors file but holds no {key}", MAX_BYTES)
    return json.loads(header[key]), tensors


@dataclass(frozen=True, eq=False)
class FisherSum:
    """Sum over `count` records of (d loss / d theta)^2 at one fixed theta*, which `state` (parameters and buffers) holds.

    Kept as sum and count, so that a record can be taken out: exact up to rounding, because its term is computed again at the same theta*.
    theta* itself was trained on what is taken out: drop the whole part where that is not allowed.
    """

    total: Mapping[str, Tensor]
    count: int
    state: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module, task: Task, rows: Examples, *, weighted: bool = False) -> FisherSum:
        """At the model as it is. weighted: each term times p_y, as some codes have it."""
        total, count = squares(model, task, rows, loss=_weighted if weighted else None)
        return FisherSum(total, count, {n: t.detach().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()})

    def without(self, model: nn.Module, task: Task, rows: Examples, *, weighted: bool = False) -> FisherSum:
        """Less the terms of these records, which must be among those summed. Raises DataError if they are more than were summed."""
        if len(rows) > self.count:
            raise DataError(f"cannot take {len(rows)} records out of a sum over {self.count}")
        if not len(rows):
            return self
        then = copy.deepcopy(model)
        with torch.no_grad():
            for n, t in {**dict(then.named_parameters()), **dict(then.named_buffers())}.items():
                t.copy_(self.state[n])
        less, _ = squares(then, task, rows, loss=_weighted if weighted else None)
        return replace(self, total={n: (t - less[n]).clamp(min=0) for n, t in self.total.items()}, count=self.count - len(rows))


def _weighted(out: Out) -> Tensor:
    """Its squared gradient is p_y (d ln p_y / d theta)^2."""
    return (out.mean * (-out.mean).exp().sqrt().detach()).mean()
