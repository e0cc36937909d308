"""The records that every other file speaks in: Split, Batch, Out, Task, Scope.

Letters used in shapes: B examples of a batch, N examples of a data set, C classes, T tokens, V vocabulary, D features.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from expunge.core.errors import ScopeError, SplitError
from expunge.core.machine.devices import HOST

Batch = dict[str, Any]
"""`x` inputs, `y` targets, `i` (B,) positions in the data set the batch was drawn from; other tasks add their own keys."""

IGNORE = -100

Data = Any
"""A sequence of records, or None where a part is missing; in memory a record type of the modality."""
BUFFERS = ("move", "freeze", "recompute")


class Records(Protocol):
    """Rows held in memory: inputs x (N, ...) or a mapping of such, targets y (N,) or (N, K), ids (N,); one key per row, equal for equal rows, and a digest of
    all. Where a row is known by its inputs alone, `inputs` has one key per row of them, apart from its target; empty else."""

    x: Any
    y: Any
    ids: Tensor
    augment: Any

    def __len__(self) -> int: ...
    def take(self, index: Any) -> Any: ...
    def joined(self, *others: Any) -> Any: ...
    @property
    def keys(self) -> list[bytes]: ...
    @property
    def digest(self) -> str: ...


def each(function: Callable[[Tensor], Any], x: Any) -> Any:
    """`function` of a tensor, or of every tensor of a mapping, as inputs of records may be.

    >>> each(len, {"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)})
    {'input_ids': 2, 'attention_mask': 2}
    """
    return {name: function(t) for name, t in x.items()} if isinstance(x, Mapping) else function(x)


WHOLE = 1 << 28
"""Most bytes of inputs that are brought into memory together where they are read as they are needed: 256 MiB."""


def measured(x: Any) -> bool:
    """Whether distances between inputs can be taken: a floating tensor, or such inputs that are read as they are needed (`modalities.stored`)."""
    return (isinstance(x, Tensor) or hasattr(x, "fetch")) and x.is_floating_point()


def vectors(data: Any, most: int) -> tuple[Any, Tensor]:
    """(records evenly apart, at most `most` of them, and of inputs that are not held no more than WHOLE bytes; their inputs (n, D) in float32)."""
    if not isinstance(data.x, Tensor):
        most = max(1, min(most, WHOLE * len(data) // max(1, data.x.nbytes)))
    some = data.take(spread(len(data), most))
    return some, (some.x if isinstance(some.x, Tensor) else some.x[:]).flatten(1).float()


def held(data: Any) -> bool:
    """Whether data is held in memory: a record type of a modality, whose rows have keys and ids, as `modalities.examples.Examples` has."""
    return hasattr(type(data), "take") and hasattr(type(data), "keys")


@dataclass(frozen=True)
class Split:
    """What must go and what must stay. Only `forget` must exist.

    test         never trained on: utility, and the source of non-members
    validation   never trained on and apart from test: all tuning and stopping reads this part only
    anchor       what to say instead (neutral concept, refusals, out-of-distribution inputs)
    general      what the model knows besides, read as utility by audits: no method looks at it, and the autopilot keeps apart what it may (`Search.parts`)
    plants       records of the same kind as forget that the model never saw and no method is given: planted controls are made of them
    asked        the request in the words of the selector, as `class:3` or `ids:17,42`
    corrected    retain may hold inputs of forget under another target: records that were taught wrongly, with what is right
    """

    forget: Data
    retain: Data = None
    test: Data = None
    validation: Data = None
    anchor: Data = None
    general: Data = None
    plants: Data = None
    asked: str = ""
    corrected: bool = False

    def parts(self) -> dict[str, Data]:
        """The parts that are there, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("asked", "corrected"))
        return {name: part for name, part in named if part is not None}

    def require(self, *names: str) -> None:
        """Raises SplitError if one of the named parts is missing or empty."""
        have = self.parts()
        for name in names:
            if name not in have:
                raise SplitError(f"split lacks {name}; it has {', '.join(have)}")
            if len(have[name]) == 0:
                raise SplitError(_empty(name))

    def check(self) -> None:
        """Raises SplitError for an empty part, for an id that stands twice in a part or in both forget and retain, or for records that stand in two parts that
        must be apart.

        Rows are compared by content where the parts are held in memory: forget against every other part, and retain against
        test and validation. A record in both forget and test is a leak: the audit would call a trained record unseen. So is one that stands there under
        another target: its input was trained on. In retain that is allowed where `corrected` says so.
        """
        have = self.parts()
        for name, part in have.items():
            if len(part) == 0:
                raise SplitError(_empty(name))
        keys = {name: set(part.keys) for name, part in have.items() if held(part) and name != "anchor"}
        for a, b in (("forget", "retain"), ("forget", "test"), ("forget", "validation"), ("retain", "test"), ("retain", "validation"), ("test", "validation")):
            if a in keys and b in keys and (shared := keys[a] & keys[b]):
                raise SplitError(f"{len(shared)} record(s) of {a} also stand in {b} (a leak); remove them from one of the two")
        rows = {name: have[name] for name in ("forget", "retain", "test", "validation") if name in keys}
        _named_once(rows)
        inputs = set(getattr(self.forget, "inputs", ()))
        for name in [n for n in rows if n != "forget" and not (n == "retain" and self.corrected)]:
            if shared := inputs & set(getattr(rows[name], "inputs", ())):
                ids = [i for i, key in zip(self.forget.ids.tolist(), self.forget.inputs, strict=True) if key in shared]
                leave = ", or say that retain holds corrections (corrected)" if name == "retain" else f" from {name}"
                raise SplitError(
                    f"{len(ids)} record(s) of forget also stand in {name} under another target (a leak), the first has id {_called(self.forget, ids[0])}; "
                    f"remove them{leave}"
                )


def _called(part: Any, i: Any) -> str:
    """The user's own name of a record, where there is one, or its id."""
    return part.called(int(i)) if hasattr(part, "called") else str(int(i))


def _named_once(rows: Mapping[str, Records]) -> None:
    """Raises SplitError for an id that stands more than once in a part, or in both forget and retain."""
    for name, part in rows.items():
        known, count = part.ids.unique(return_counts=True)
        if len(known) < len(part.ids):
            twice = torch.isin(part.ids, known[count > 1])
            first = _called(part, part.ids[twice][0])
            raise SplitError(f"{int((count > 1).sum())} id(s) stand more than once in {name}, the first is {first}: name each record once")
    if {"forget", "retain"} <= rows.keys() and bool((both := torch.isin(rows["forget"].ids, rows["retain"].ids)).any()):
        first = _called(rows["forget"], rows["forget"].ids[both][0])
        raise SplitError(f"{int(both.sum())} id(s) stand in both forget and retain, the first is {first}: name each record once")


def _empty(name: str) -> str:
    if name == "forget":
        return "forget is empty: the selector matched no record"
    if name == "retain":
        return "retain is empty: forgetting everything leaves nothing to keep; delete the model instead"
    return f"{name} is empty; leave it out or give it records"


@dataclass(frozen=True)
class Out:
    """One forward pass in the words that every loss understands. A loss maps it to (B,)."""

    nll: Tensor
    """(B,) training loss per example, summed over its units."""
    count: Tensor
    """(B,) units summed: answer tokens; 1 for an image."""
    logits: Any = None
    """(B, C) or (B, T, V) tensor, already aligned with labels; None where a task has none."""
    labels: Any = None
    """(B,) or (B, T) tensor, IGNORE where a unit does not count."""
    units: Any = None
    """(B, T) loss of each unit, 0 where it does not count; None where an example is one unit."""
    pred: Tensor | None = None
    """(B, ...) value, noise estimate or image."""
    target: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """(B,) training loss per unit."""
        return self.nll / self.count


class Batches(Sequence[Batch]):
    """The batches of some epochs over a data set, each reachable by its number: `batches[k]` never depends on what was read before.

    So a loop can be resumed at any step, and can be read twice. An epoch is a permutation drawn from (seed, epoch); with
    `seed=None` the order is that of the data. Sizes within an epoch differ by at most one (129 examples at size 128 are 65 + 64, never
    128 + 1). `epochs` may be a fraction. Augmentation draws from (seed, k). Texts that are drawn by seed are brought together by length,
    WINDOW batches at a time, so that little of a batch is padding.
    """

    def __init__(self, collate: Callable, data: Data, size: int, epochs: float = 1, seed: int | None = None) -> None:
        if len(data) == 0:
            raise SplitError("cannot draw batches from an empty part")
        if size < 1:
            raise ValueError(f"batch size must be at least 1, not {size}")
        self.collate, self.data, self.epochs, self.seed = collate, data, epochs, seed
        self.per_epoch = -(-len(data) // size)
        self.steps = max(1, round(self.per_epoch * epochs))
        self._order: tuple[int, list[Tensor]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k):
        if not 0 <= k < self.steps:
            raise IndexError(k)
        epoch, j = divmod(k, self.per_epoch)
        generator = None if self.seed is None else torch.Generator().manual_seed(_mix(self.seed, 2 * k + 1))
        return self.collate(self.data, self._epoch(epoch)[j], generator)

    def positions(self) -> Tensor:
        """Positions of all examples that these batches hold, sorted, each once."""
        return torch.cat([self._epoch(k // self.per_epoch)[k % self.per_epoch] for k in range(self.steps)]).unique()

    def _epoch(self, epoch: int) -> list[Tensor]:
        """Positions of every batch of an epoch."""
        if self._order[0] != epoch:
            n, m = len(self.data), self.per_epoch
            generator = torch.Generator().manual_seed(_mix(self.seed or 0, 2 * epoch))
            order = torch.arange(n) if self.seed is None else torch.randperm(n, generator=generator)
            if self.seed is not None and hasattr(self.data, "lengths"):
                order = _together(order, [j * n // m for j in range(m + 1)], self.data.lengths, generator)
            self._order = (epoch, [order[j * n // m : (j + 1) * n // m] for j in range(m)])
        return self._order[1]


WINDOW = 8
"""Batches among which texts are sorted by length."""


def _together(order: Tensor, cuts: list[int], lengths: Tensor, generator: torch.Generator) -> Tensor:
    """`order` with texts of like length side by side: sorted inside windows of WINDOW batches, whose batches then stand in random order."""
    out = []
    for w in range(0, len(cuts) - 1, WINDOW):
        ends = [c - cuts[w] for c in cuts[w : w + WINDOW + 1]]
        rows = order[cuts[w] : cuts[w] + ends[-1]]
        rows = rows[lengths[rows].argsort(stable=True)]
        batches = [rows[a:b] for a, b in itertools.pairwise(ends)]
        out += [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat(out)


def drawn(n: int, size: int, steps: int) -> int:
    """Examples in the first `steps` batches over n examples at that size, epoch after epoch: what they cost.

    >>> drawn(129, 128, 1), drawn(129, 128, 5)
    (64, 322)
    """
    per_epoch = -(-n // size)
    return steps // per_epoch * n + steps % per_epoch * n // per_epoch


class Paired(Sequence):
    """`Paired(a, b)[k] = (a[k], b[k])` up to the longest; the shorter ones start again from their first batch."""

    def __init__(self, *streams: Sequence) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return max(len(s) for s in self.streams)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(k)
        return tuple(s[k % len(s)] for s in self.streams)


def _mix(seed: int, stream: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Task:
    """How one modality is batched and scored. A record of functions: wrap one with `dataclasses.replace`.

    collate(data, index, generator) -> Batch       all randomness lives here; generator None means no augmentation
    forward(model, batch) -> Out                   a pure function of both; device and float type follow the model
    features(model, batch, layer) -> (B, D)        inputs of the last linear layer when `layer` is ""
    tied                                           whether the loss of a record depends on the others of its batch
    """

    name: str
    collate: Callable[[Sequence, Tensor, torch.Generator | None], Batch]
    forward: Callable[[nn.Module, Batch], Out]
    features: Callable[[nn.Module, Batch, str], Tensor]
    sample: Callable[..., Any] | None = None
    tied: bool = False

    def batches(self, data: Sequence, size: int, *, epochs: float = 1, seed: int | None = None) -> Batches:
        """Batches of `data`; shuffled and augmented when a seed is given, in order and plain when not."""
        return Batches(self.collate, data, size, epochs, seed)


@dataclass(frozen=True)
class Scope:
    """Which weights may move: parameter name -> boolean mask of its shape, or None for all of it.

    buffers says what happens to BatchNorm statistics and their like: `move` (they follow training and are part of the patch),
    `freeze` (normalisation layers stay in eval mode, statistics bit-identical), `recompute` (one pass over retain data at the end).
    """

    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    buffers: str = "move"

    def __post_init__(self) -> None:
        if self.buffers not in BUFFERS:
            raise ScopeError(f"buffers must be one of {', '.join(BUFFERS)}, not '{self.buffers}'")

    def __and__(self, other: Scope) -> Scope:
        """Places that both allow."""
        names = [n for n in self.masks if n in other.masks]
        both = {n: _meet(self.masks[n], other.masks[n]) for n in names}
        return Scope(both, self.buffers)

    def count(self, model: nn.Module) -> int:
        """How many single weights may move."""
        named = dict(model.named_parameters())
        return sum(named[n].numel() if m is None else int(m.sum()) for n, m in self.masks.items())


def _meet(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return b
    return a if b is None else a & b


def concat(*parts: Any) -> Any:
    """All rows of the parts, one after another."""
    return parts[0].joined(*parts[1:])


def absent(forget: Tensor, retain: Tensor) -> Tensor:
    """The classes that forget (N,) has and retain (M,) lacks: those that the request removes, sorted.

    >>> absent(torch.tensor([3, 1, 3]), torch.tensor([0, 1]))
    tensor([3])
    """
    classes = forget.unique()
    return classes[~torch.isin(classes, retain)]


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter; CPU for a model without."""
    return next((p.device for p in model.parameters()), HOST)


def float_of(model: nn.Module) -> torch.dtype:
    """Floating type of the model's first parameter; float32 for a model without."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def spread(n: int, most: int) -> list[int]:
    """At most `most` of n positions, evenly apart.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    return list(range(n)) if n <= most else [k * n // most for k in range(most)]
