"""Layout: which record lies in which cell. A record's cell never depends on which other records there are, or is written down.

`spread` hashes each id, so that a fresh layout without some records puts the others where they were. `prior` uses what is known about who will ask. Card:
sisa, step 1.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence

from expunge.core.errors import SettingError, SplitError
from expunge.guarantees.exact.design import Cell


def spread(ids: Sequence[int], shards: int, slices: int, seed: int = 0) -> dict[int, Cell]:
    """id -> (shard, slice) by a hash of (seed, id): cells are as good as drawn, and a record's own.

    >>> all(spread([5, 9], 4, 3)[k] == spread([9], 4, 3)[k] for k in [9])
    True
    """
    out = {}
    for i in ids:
        place = int.from_bytes(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest(), "big") % (shards * slices)
        out[int(i)] = (place // slices, place % slices)
    return out


def prior(ids: Sequence[int], chances: Sequence[float], shards: int, slices: int) -> dict[int, Cell]:
    """id -> (shard, slice) with equal expected requests per shard, equal numbers per slice, and the records that are likeliest to go in the last slices.

    chances   (N,) expected number of deletions of each record, 0 or larger
    Likeliest first, each record goes to the shard with the least mass so far that is not full (N / shards records).
    Differs: the paper merges clusters that are adjacent in order; this balances mass as tightly and sizes exactly. A late slice is the cheapest to retrain.
    Raises SettingError for chances that are not N finite numbers from 0 on.

    >>> sorted(prior([0, 1, 2, 3], [0.9, 0.5, 0.4, 0.0], 2, 2).items())
    [(0, (0, 1)), (1, (1, 1)), (2, (1, 0)), (3, (0, 0))]
    """
    if len(chances) != len(ids) or not all(0 <= c < float("inf") for c in chances):
        raise SettingError(f"chances must be {len(ids)} finite numbers from 0 on, one per record")
    most = -(-len(ids) // shards)
    held: list[list[int]] = [[] for _ in range(shards)]
    queue = [(0.0, 0, d) for d in range(shards)]
    for k in sorted(range(len(ids)), key=lambda k: (-chances[k], ids[k])):
        mass, n, d = heapq.heappop(queue)
        held[d].append(int(ids[k]))
        if n + 1 < most:
            heapq.heappush(queue, (mass + chances[k], n + 1, d))
    return {i: (d, slices - 1 - j * slices // len(row)) for d, row in enumerate(held) for j, i in enumerate(row)}


def checked(places: Mapping[int, Cell], ids: Sequence[int], shards: int, slices: int) -> dict[int, Cell]:
    """A given layout, cut down to `ids`. Raises SplitError for a record without a place, or one outside the shards and slices."""
    out = {}
    for i in ids:
        cell = places.get(int(i))
        if cell is None:
            raise SplitError(f"the layout has no place for record {int(i)}")
        if not (0 <= cell[0] < shards and 0 <= cell[1] < slices):
            raise SplitError(f"the layout puts record {int(i)} in shard {cell[0]}, slice {cell[1]}; there are {shards} shards of {slices} slices")
        out[int(i)] = (int(cell[0]), int(cell[1]))
    return out
