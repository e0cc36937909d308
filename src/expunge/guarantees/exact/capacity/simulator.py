"""How many deletion requests a design of exact deletion serves, and what they cost: seeded Monte-Carlo simulation.

Designs  sisa  S shards, R slices; a request retrains its shard from the first slice it hits (R = 1: the whole shard).
         s3t   S shards, L slices, B sequences per shard; a request cuts prefixes and trains nothing. A shard whose longest prefix has
               fewer than `floor` slices is trained again, all its sequences. B = 1: SISA with slices, without retraining.
         safe  S shards of a graph; a request retrains every model that reads the shard.
Served   Nothing is retrained; records are asked for once each. A model dies with its first record: an s3t or sisa prefix, a safe adapter.
         A shard dies when no prefix of `floor` slices is left of any of its sequences; later requests for a dead shard count as served.
         `served.all`: the number of requests up to and including the one with which the last shard dies, the one that forces full
         retraining. `served.first`: the same for the first shard. For S = 5, L = 6, B = 1 the five first slices must be hit:
         30 (1/5 + 1/4 + ... + 1) = 68.5 requests (`costs.expected_served`).
Cost     Sample passes: step k of a sequence trains on its first k slices for e_k epochs (`costs.epochs`). Checkpoints that sequences
         share are trained and stored once.
Streams  uniform, exponential, pareto or shares of requests: a prior over the records, in order of their numbers. listed: numbers.
         adversarial: sees where each record is and always hits the most harmful place. blind: knows the design but not its seed:
         uniform at random places; contiguous and aware places follow from the design and are no secret, so there it is adversarial.
Sources  SISA (S&P 2021), S3T (ICLR 2025), SAFE (ICCV 2023).
Differs  Cost of s3t counts full sample passes although one block of adapters trains at a time: an upper bound. sisa with aware places
         puts the records least asked for in the first slices; the reference code keeps the order of merging.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from expunge.core.errors import SettingError
from expunge.guarantees.exact.capacity.sequences import checkpoints
from expunge.guarantees.exact.capacity.systems import UNIFORM, Floats, Ints, Stream, System, steps, weights

BLOCK = 4_000_000
"""Most records times runs in memory at a time."""


@dataclass(frozen=True)
class Measured:
    """Mean over n runs with one-sided 95 % normal bounds (`core.stats.mean`), and the standard deviation of one run.

    n = 1: one run, or nothing is random; the bounds are equal.
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Floats | Ints) -> Measured:
        """From one value per run."""
        import torch

        from expunge.core import stats

        if len(values) == 1:
            return cls(float(values[0]), float(values[0]), float(values[0]), 0.0, 1)
        return cls(*stats.mean(torch.from_numpy(np.asarray(values, dtype=np.float64))), sd=float(np.std(values, ddof=1)), n=len(values))


@dataclass(frozen=True)
class Served:
    """Requests served without retraining until no shard is left (`all`) and until the first dies (`first`).

    open: share of runs where the stream ended, or what it can ask for, before the last shard died; these count with all their requests.
    """

    all: Measured
    first: Measured
    open: float


def _allowed(design: System) -> NDArray[np.bool_]:
    return ~np.isin(design.cells // design.slices, design.protected)


def _keys(design: System, stream: Stream, runs: int, seed: int) -> Iterator[Floats]:
    """Blocks (some runs, n) of arrival times of each record's request, inf for never.

    An exponential race: drawing by weight without replacement.
    """
    n, rng, allowed = design.records, np.random.default_rng(seed), _allowed(design)
    if stream.kind == "listed" and not all(0 <= i < n for i in stream.ids):
        raise SettingError(f"a listed request is not one of the records 0..{n - 1}")
    even = design.placing == "random" or (stream.kind in ("listed", "uniform") and not stream.shares)  # at random places every record is as good as any other
    w = None if even else weights(stream.shares or stream.kind, n)
    block = max(1, BLOCK // n)
    for start in range(0, runs, block):
        rows = min(block, runs - start)
        if stream.kind == "listed" and design.placing != "random":
            keys = np.full((rows, n), np.inf)
            keys[:, list(stream.ids)] = np.arange(len(stream.ids))
        else:
            keys = rng.standard_exponential((rows, n))
            with np.errstate(divide="ignore"):
                keys = keys if w is None else keys / w
        if stream.kind == "listed" and design.placing == "random":
            keys[keys > np.partition(keys, len(stream.ids) - 1, axis=1)[:, len(stream.ids) - 1 : len(stream.ids)]] = np.inf
        keys[:, ~allowed] = np.inf
        yield keys


def order(design: System, stream: Stream, requests: int, runs: int, seed: int = 0) -> Ints:
    """Places (runs, requests) of the records asked for, in turn. Raises SettingError where the stream cannot ask for that many."""
    can = int(_allowed(design).sum()) if stream.kind != "listed" else len(stream.ids)
    if not 0 < requests <= can:
        raise SettingError(f"{requests} requests: the stream has 1..{can} to ask for")
    if design.placing == "random" and requests * 20 < can and not design.protected and stream.kind != "listed":
        rng = np.random.default_rng(seed)
        return design.cells[np.stack([rng.choice(design.records, requests, replace=False) for _ in range(runs)])]
    found = []
    for keys in _keys(design, stream, runs, seed):
        first = np.argsort(keys, axis=1, kind="stable")[:, :requests]
        if not np.isfinite(np.take_along_axis(keys, first[:, -1:], 1)).all():
            raise SettingError(f"{requests} requests: the prior gives some records no chance; ask for fewer")
        found.append(design.cells[first])
    return np.concatenate(found)


def served(design: System, stream: Stream = UNIFORM, *, runs: int = 1000, seed: int = 0) -> Served:
    """Requests served without retraining (see Served above). Adversarial: the greedy requester of least requests, one run.

    >>> served(System("s3t", 300, 5, 6, 6), Stream("adversarial")).all.mean
    30.0
    """
    if runs < 1:
        raise SettingError(f"runs must be 1 or more, not {runs}")
    if stream.adaptive(design):
        return _attacked(design)
    by_place = np.argsort(design.cells, kind="stable")
    starts = np.searchsorted(design.cells[by_place], np.arange(design.shards * design.slices))
    totals: list[Floats] = []
    firsts: list[Floats] = []
    still = 0
    for keys in _keys(design, stream, runs, seed):
        hit = np.minimum.reduceat(keys if design.placing != "aware" else keys[:, by_place], starts, axis=1)
        death = np.stack([np.stack([hit[:, list(u)].min(1) for u in ways]).max(0) for ways in design.units])
        for ends, found in ((death.max(0), totals), (death.min(0), firsts)):
            found.append((keys <= np.minimum(ends, np.finfo(np.float64).max)[:, None]).sum(1))
        still += int(np.isinf(death.max(0)).sum())
    return Served(Measured.of(np.concatenate(totals)), Measured.of(np.concatenate(firsts)), still / runs)


def _attacked(design: System) -> Served:
    """Greedy: hit the place that most ways depend on, until none is left that can be hit."""
    safe = set(design.protected)

    def fewest(ways: list[tuple[int, ...]]) -> int:
        count, left = 0, [w for u in ways if (w := [c for c in u if c // design.slices not in safe])]
        while left:
            tally = np.bincount([c for u in left for c in u])
            left, count = [u for u in left if int(tally.argmax()) not in u], count + 1
        return count

    alone = [fewest(ways) for ways in design.units if all(any(c // design.slices not in safe for c in u) for u in ways)]
    total = fewest([u for ways in design.units for u in ways])
    one = Measured.of(np.array([total]))
    return Served(one, Measured.of(np.array([min(alone, default=total)])), float(len(alone) < design.shards))


@dataclass(frozen=True)
class Spent:
    """Cost of `requests` requests. Means over runs; curves after each batch.

    cost: sample passes per request. share: the same over epochs * records, a full training without shards. worst: dearest batch of a run.
    trained: shards (safe: adapters) trained again per run. kept: share of slices behind the voting models (1 for sisa and safe), mean over time.
    storage: checkpoints at the end. at (T,): requests done; storage_curve, kept_curve, cost_curve (T,): cost is cumulative.
    """

    requests: int
    cost: Measured
    share: Measured
    worst: Measured
    trained: Measured
    kept: float
    storage: float
    at: tuple[int, ...]
    storage_curve: tuple[float, ...]
    kept_curve: tuple[float, ...]
    cost_curve: tuple[float, ...]


def spend(design: System, stream: Stream = UNIFORM, requests: int = 100, *, runs: int = 200, seed: int = 0) -> Spent:
    """Serve `requests` requests in operation: sisa and safe retrain after each batch what it hit, s3t what has too short a prefix.

    Raises SettingError for more requests than the stream can ask for.
    """
    if runs < 1:
        raise SettingError(f"runs must be 1 or more, not {runs}")
    state = _Graph(design, 1 if stream.adaptive(design) else runs) if design.kind == "safe" else _Sliced(design, 1 if stream.adaptive(design) else runs)
    if stream.adaptive(design):
        if not 0 < requests <= (can := int(_allowed(design).sum())):
            raise SettingError(f"{requests} requests: the stream has 1..{can} to ask for")
        places = None
    else:
        places = order(design, stream, requests, runs, seed)
    done, turn, at, cost, stored, kept, trained = 0, 0, [], [], [], [], np.zeros(state.runs)
    while done < requests:
        for t in range(done, min(requests, done + stream.batches[turn % len(stream.batches)])):
            state.hit(state.harm() if places is None else places[:, t])
            done = t + 1
        spent, again = state.settle()
        turn, trained = turn + 1, trained + again
        at.append(done)
        cost.append(spent)
        stored.append(state.stored())
        kept.append(state.kept())
    total = np.stack(cost)
    per = total.sum(0) / requests
    return Spent(
        requests, Measured.of(per), Measured.of(per / (design.epochs * design.records)), Measured.of(total.max(0)), Measured.of(trained),
        float(np.average(kept, weights=np.diff([0, *at]))), stored[-1], tuple(at), tuple(stored), tuple(kept), tuple(total.mean(1).cumsum().tolist()),
    )  # fmt: skip


class _Sliced:
    """State of sisa and s3t in all runs: sizes (runs, S, L), first slice hit in this batch (sisa) or slices left per sequence (s3t)."""

    def __init__(self, design: System, runs: int) -> None:
        self.design, self.runs, self.rows = design, runs, np.arange(runs)
        self.tables = [steps(o, design.epochs) for o in design.orders]
        self.order, self.epochs = (np.stack([t[k] for t in self.tables]) for k in (0, 1))  # (S, B, L)
        self.at = np.argsort(self.order, axis=-1)  # (S, B, L): place of a slice in a sequence
        self.open = ~np.isin(np.arange(design.shards), design.protected)
        self.sizes = np.repeat(design.sizes[None], runs, 0)
        self.left = np.full((runs, design.shards, design.budget), design.slices)
        self.touched = np.zeros((runs, design.shards), dtype=bool)
        self.long = np.full((runs, design.shards), design.slices)
        self.count = np.repeat(np.array([len(checkpoints(o)) for o in design.orders])[None], runs, 0)

    def hit(self, cells: Ints) -> None:
        d, s = np.divmod(cells, self.design.slices)
        self.sizes[self.rows, d, s] -= 1
        self.left[self.rows, d] = np.minimum(self.left[self.rows, d], self.at[d, :, s])
        self.touched[self.rows, d] = True

    def harm(self) -> Ints:
        """The place whose record costs most now (sisa), or leaves its shard with the fewest sequences, then costs most (s3t)."""
        sizes, left, L = self.sizes[0], self.left[0], self.design.slices
        passes = sizes[np.arange(len(sizes))[:, None, None], self.order].cumsum(-1) * self.epochs  # (S, B, L)
        can = (sizes > 0) & self.open[:, None]
        if self.design.kind == "sisa":
            until = np.arange(L) < left  # (S, L): steps that this batch does not yet retrain
            gain = (passes[:, 0] * until)[:, ::-1].cumsum(1)[:, ::-1].astype(float)
            return np.array([int(np.where(can, gain, -1).argmax())])
        after = (np.minimum(left[:, :, None], self.at) >= self.design.floor).sum(1)  # (S, L) sequences left
        alive = ((left >= self.design.floor).sum(1) > 0)[:, None]
        scale = float(passes.sum() + 1)
        gain = -after * scale + passes.sum((1, 2))[:, None]
        gain = np.where(alive, gain, -(self.design.budget + 1) * scale)
        return np.array([int(np.where(can, gain, -np.inf).argmax())])

    def settle(self) -> tuple[Floats, Floats]:
        """Sample passes and shards trained again, per run."""
        spent, again, full = np.zeros(self.runs), np.zeros(self.runs), self.design.slices
        r, d = np.nonzero(self.touched)
        passes = self.sizes[r[:, None, None], d[:, None, None], self.order[d]].cumsum(-1) * self.epochs[d]  # (N, B, L)
        if self.design.kind == "sisa":
            cost, dead = (passes * (np.arange(full) >= self.left[r, d][..., None])).sum((1, 2)), np.ones(len(r), dtype=bool)
        else:
            dead = self.left[r, d].max(1) < self.design.floor
            cost = passes.sum((1, 2)) * dead
        np.add.at(spent, r, cost)
        np.add.at(again, r, dead)
        self.left[r[dead], d[dead]] = full
        self.long[r, d] = self.left[r, d].max(1)
        self.count[r, d] = ((np.arange(full) < self.left[r, d][..., None]) & self.new[d]).sum((1, 2))
        self.touched[:] = False
        return spent, again

    @cached_property
    def new(self) -> NDArray[np.bool_]:
        """Prefixes (S, B, L) that no earlier sequence has."""
        return np.stack([steps(o, self.design.slices * 10)[1] > 0 for o in self.design.orders])

    def stored(self) -> float:
        return float(self.count.sum(1).mean())

    def kept(self) -> float:
        return float(self.long.mean() / self.design.slices)


class _Graph:
    """State of safe: records each model trains on (runs, S), and models to train again in this batch."""

    def __init__(self, design: System, runs: int) -> None:
        self.design, self.runs, self.rows = design, runs, np.arange(runs)
        self.reads = np.eye(design.shards, dtype=np.int64)
        for i, out in enumerate(design.reads):
            self.reads[i, list(out)] = 1
        self.sizes = np.repeat(design.sizes[None, :, 0], runs, 0)
        self.train = self.sizes @ self.reads.T
        self.touched = np.zeros((runs, design.shards), dtype=bool)
        self.open = ~np.isin(np.arange(design.shards), design.protected)

    def hit(self, cells: Ints) -> None:
        readers = self.reads.T[cells]
        self.sizes[self.rows, cells] -= 1
        self.train -= readers
        self.touched |= readers > 0

    def harm(self) -> Ints:
        gain = (self.train[0] * ~self.touched[0]) @ self.reads
        return np.array([int(np.where((self.sizes[0] > 0) & self.open, gain, -1).argmax())])

    def settle(self) -> tuple[Floats, Floats]:
        spent, again = (self.train * self.touched).sum(1) * float(self.design.epochs), self.touched.sum(1).astype(float)
        self.touched[:] = False
        return spent, again

    def stored(self) -> float:
        return float(self.design.shards)

    def kept(self) -> float:
        return 1.0


def table(
    designs: Sequence[System], streams: Sequence[Stream], *, requests: int = 200, runs: int = 500, seed: int = 0
) -> list[tuple[System, Stream, Served, Spent]]:
    """`served` and `spend` for every design under every stream."""
    return [(d, s, served(d, s, runs=runs, seed=seed), spend(d, s, requests, runs=runs, seed=seed)) for d in designs for s in streams]
