"""Designs of exact deletion and streams of requests: what `capacity` simulates. The words are explained there."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from expunge.core.errors import SettingError, suggest
from expunge.guarantees.exact.capacity import costs
from expunge.guarantees.exact.capacity.sequences import Sequences, checkpoints, choose

KINDS, PLACINGS = ("sisa", "s3t", "safe"), ("random", "contiguous", "aware")
PRIORS, STREAMS = ("uniform", "exponential", "pareto"), ("uniform", "exponential", "pareto", "blind", "adversarial", "listed")
PARETO = 1.16

Prior = str | tuple[float, ...]
Floats, Ints = NDArray[np.float64], NDArray[np.int64]


def weights(prior: Prior, n: int) -> Floats:
    """Share of requests per record (n,), sum 1.

    uniform, exponential (rate -ln(.05)/n), pareto (a = 1.16), or shares of equally long stretches of record numbers.

    >>> weights((3.0, 1.0), 4).tolist()
    [0.375, 0.375, 0.125, 0.125]
    """
    if isinstance(prior, tuple):
        shares = np.array(prior, dtype=np.float64)
        if not 0 < len(shares) <= n or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
            raise SettingError(f"a prior in stretches needs 1..{n} finite shares, not negative and not all 0")
        stretch = np.arange(n) * len(shares) // n
        w = (shares / np.bincount(stretch))[stretch]
    elif prior in PRIORS:
        i = np.arange(n, dtype=np.float64)
        w = {"uniform": np.ones(n), "exponential": np.exp(math.log(0.05) / n * i), "pareto": PARETO / (i + 1) ** (PARETO + 1)}[prior]
    else:
        raise SettingError(suggest("no prior", prior, PRIORS))
    return w / w.sum()


def merged(w: Floats, shards: int) -> Ints:
    """Distribution-aware split of SISA, shard per record (n,): the two first clusters of a queue are merged until `shards` are left.

    The queue is ordered by size, then mass, for clusters below 1 % of the records; after these by mass alone: shards of about equal expected requests.
    """
    n = len(w)
    queue = [(0, 1, float(w[i]), i) for i in range(n)] if n >= 200 else [(1, 0, float(w[i]), i) for i in range(n)]
    heapq.heapify(queue)
    parts, sizes, limit, new = {i: [i] for i in range(n)}, dict.fromkeys(range(n), 1), n // 100, n
    while len(queue) > shards:
        a, b = heapq.heappop(queue), heapq.heappop(queue)
        parts[new] = [*parts.pop(a[3]), *parts.pop(b[3])]
        sizes[new] = size = sizes.pop(a[3]) + sizes.pop(b[3])
        heapq.heappush(queue, (0, size, a[2] + b[2], new) if size < limit else (1, 0, a[2] + b[2], new))
        new += 1
    found = np.empty(n, dtype=np.int64)
    for shard, records in enumerate(sorted(parts.values(), key=min)):
        found[records] = shard
    return found


@dataclass(frozen=True)
class System:
    """One system. `kind` sisa, s3t or safe; n `records`; `epochs` e' of an unsliced run.

    sisa: shards, slices. s3t: also budget, floor (1..slices), choice (`sequences.choose`). safe: shards and a graph, by family (`clique`:
    shards per clique) or by edges; no slices. placing: random; contiguous (by record number); aware (`merged` by `prior`, in each shard the
    records least asked for in the first slices). protected: shards of safe data, never asked for. Raises SettingError for what is out of range.
    """

    kind: str
    records: int
    shards: int = 5
    slices: int = 1
    budget: int = 1
    floor: int = 1
    choice: str = "cyclic"
    epochs: int = 20
    placing: str = "random"
    prior: Prior = "uniform"
    graph: str | costs.Graph = "isolated"
    clique: int = 2
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for what, value, known in (("kind of design", self.kind, KINDS), ("placing", self.placing, PLACINGS)):
            if value not in known:
                raise SettingError(suggest(f"no {what}", value, known))
        if self.shards < 1 or self.slices < 1 or self.epochs < 1 or self.records < self.shards * self.slices:
            raise SettingError(f"{self.records} records are too few for {self.shards} shards of {self.slices} slices, or a number is below 1")
        if not 1 <= self.floor <= self.slices:
            raise SettingError(f"floor must be 1..{self.slices} (slices), not {self.floor}")
        if self.kind != "s3t" and (self.budget, self.floor) != (1, 1):
            raise SettingError(f"budget and floor are for s3t, not for {self.kind}")
        if self.kind == "safe" and self.slices != 1:
            raise SettingError(f"safe has no slices, not {self.slices}")
        if bad := [d for d in self.protected if not 0 <= d < self.shards]:
            raise SettingError(f"protected shard {bad[0]} is not one of 0..{self.shards - 1}")
        if self.kind == "safe":
            _ = self.reads
        else:
            choose(self.choice, self.slices, self.budget)

    @property
    def name(self) -> str:
        """One short line that tells the design."""
        graph = (f"cliques of {self.clique}" if self.graph == "cliques" else self.graph) if isinstance(self.graph, str) else "own graph"
        more = {
            "sisa": f" x {self.slices} slices" if self.slices > 1 else "",
            "s3t": f" x {self.slices} slices, budget {self.budget}" + (f", floor {self.floor}" if self.floor > 1 else ""),
            "safe": f", {graph}",
        }[self.kind]
        return f"{self.kind} {self.shards} shards{more}" + {"random": "", "contiguous": ", contiguous", "aware": ", prior known"}[self.placing]

    @cached_property
    def reads(self) -> costs.Graph:
        """Out-neighbours per shard."""
        return costs.checked(costs.graph(self.graph, self.shards, self.clique) if isinstance(self.graph, str) else self.graph, self.shards)

    @cached_property
    def cells(self) -> Ints:
        """Place of each record (n,): shard * slices + slice. With random placing: of each position, which a record holds by chance."""
        n, places = self.records, self.shards * self.slices
        if self.placing != "aware":
            return np.arange(n, dtype=np.int64) * places // n
        w = weights(self.prior, n)
        shard, found = merged(w, self.shards), np.empty(n, dtype=np.int64)
        for d in range(self.shards):
            rows = np.flatnonzero(shard == d)
            rows = rows[np.argsort(w[rows], kind="stable")]
            found[rows] = d * self.slices + np.arange(len(rows)) * self.slices // len(rows)
        return found

    @cached_property
    def sizes(self) -> Ints:
        """Records per place (S, L)."""
        return np.bincount(self.cells, minlength=self.shards * self.slices).reshape(self.shards, self.slices)

    @cached_property
    def orders(self) -> tuple[Sequences, ...]:
        """Sequences per shard. With a prior that is known, `matching` and `sampling` see the shares of requests per slice of all requests."""
        if self.placing != "aware":
            return (choose(self.choice, self.slices, self.budget),) * self.shards
        mass = np.bincount(self.cells, weights(self.prior, self.records), self.shards * self.slices).reshape(self.shards, self.slices)
        return tuple(choose(self.choice, self.slices, self.budget, m.tolist(), seed=d) for d, m in enumerate(mass))

    @property
    def units(self) -> list[list[tuple[int, ...]]]:
        """Per shard its ways to be alive: tuples of places, a way is lost when one of them is hit."""
        if self.kind == "safe":
            return [[(i, *out)] for i, out in enumerate(self.reads)]
        return [list(dict.fromkeys(tuple(d * self.slices + s for s in sorted(one[: self.floor])) for one in o)) for d, o in enumerate(self.orders)]

    @property
    def least(self) -> int:
        """Fewest records that a voting model was trained on at the start."""
        if self.kind == "safe":
            return int(min(self.sizes[[i, *out]].sum() for i, out in enumerate(self.reads)))
        if self.kind == "sisa":
            return int(self.sizes.sum(1).min())
        return min(int(self.sizes[d, list(one[: self.floor])].sum()) for d, o in enumerate(self.orders) for one in o)

    @property
    def checkpoints(self) -> int:
        """Checkpoints stored at the start. sisa: models; s3t: heads with one block of adapters; safe: adapters."""
        return self.shards if self.kind == "safe" else sum(len(checkpoints(o)) for o in self.orders)

    @property
    def setup(self) -> int:
        """Sample passes of the first training."""
        if self.kind == "safe":
            return self.epochs * int(sum(self.sizes[[i, *out]].sum() for i, out in enumerate(self.reads)))
        return sum(int(trained(self.sizes[d][None], *steps(o, self.epochs))[0]) for d, o in enumerate(self.orders))


def steps(order: Sequences, epochs: int) -> tuple[Ints, Ints]:
    """Sequences (B, L) and epochs (B, L): 0 where an earlier sequence has trained that prefix."""
    e, seen = costs.epochs(epochs, len(order[0])), set()
    table = np.zeros((len(order), len(order[0])), dtype=np.int64)
    for b, one in enumerate(order):
        for k in range(len(one)):
            if one[: k + 1] not in seen:
                seen.add(one[: k + 1])
                table[b, k] = e[k]
    return np.array(order, dtype=np.int64), table


def trained(sizes: Ints, order: Ints, epochs: Ints) -> Ints:
    """Sample passes (N,) of training shards whose slices hold `sizes` (N, L), every sequence, every prefix once."""
    return (sizes[:, order].cumsum(-1) * epochs).sum((-1, -2))


@dataclass(frozen=True)
class Stream:
    """Requests. `kind` of STREAMS; `shares` replace a named prior; `ids` for listed; `batches`: how many requests arrive together, over and over."""

    kind: str = "uniform"
    shares: tuple[float, ...] = ()
    ids: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.kind not in STREAMS:
            raise SettingError(suggest("no stream of requests", self.kind, STREAMS))
        if not self.batches or min(self.batches) < 1:
            raise SettingError("batches must be numbers of 1 or more")
        if (self.kind == "listed") != bool(self.ids) or len(set(self.ids)) < len(self.ids):
            raise SettingError("listed requests, and no others, need ids, each once: a record is deleted once")

    def adaptive(self, design: System) -> bool:
        """Whether the requester sees the places in this design and chooses by them: nothing is left to chance."""
        return self.kind == "adversarial" or (self.kind == "blind" and design.placing != "random")


UNIFORM = Stream()
"""Any record is as likely as any other, one request at a time."""
