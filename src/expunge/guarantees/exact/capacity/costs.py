"""What exact deletion costs, in closed form. Unit of cost: sample passes (one record, forward and backward, once).

Letters  n records, S shards, R slices per shard (L in S3T), B sequences per shard, e' epochs of an unsliced run, K requests.
Sources  SISA, "Machine Unlearning" (IEEE S&P 2021), reference code; S3T (ICLR 2025); SAFE, "Machine Unlearning With Shard Graphs" (ICCV 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from expunge.core.errors import SettingError, suggest

Graph = tuple[tuple[int, ...], ...]
"""Per shard i the other shards that the model of i may read (edges i -> j)."""
FAMILIES = ("isolated", "cliques", "safe", "complete")


def epochs(total: int, slices: int) -> tuple[int, ...]:
    """e_r = int(r a) - int((r - 1) a), a = 2R/(R + 1) e'/R: epochs of slice r = 1..R so that the sample passes match e' epochs. Integers throughout.

    >>> epochs(20, 1), epochs(20, 3), epochs(20, 10)
    ((20,), (10, 10, 10), (3, 4, 3, 4, 4, 3, 4, 4, 3, 4))
    """
    if total < 1 or slices < 1:
        raise SettingError(f"epochs and slices must be 1 or more, not {total} and {slices}")
    done = [2 * total * r // (slices + 1) for r in range(slices + 1)]
    return tuple(b - a for a, b in pairwise(done))


def passes(total: int, slices: int) -> float:
    """sum_r e_r r/R: epochs over the whole shard that the sliced schedule really makes.

    >>> passes(20, 3), round(passes(20, 10), 6)
    (20.0, 20.1)
    """
    return sum(e * r for r, e in enumerate(epochs(total, slices), start=1)) / slices


def share(shards: int, slices: int) -> float:
    """(1/S)(2/3 + 1/(3R)): expected share of a full training that one uniform request costs with cumulative slices.

    >>> round(share(5, 6), 4), share(5, 1)
    (0.1444, 0.2)
    """
    return (2 / 3 + 1 / (3 * slices)) / shards


def affected(shards: int, requests: int) -> float:
    """S (1 - (1 - 1/S)^K): expected shards that K uniform requests touch when they arrive together.

    >>> affected(20, 1), round(affected(20, 18), 2)
    (1.0, 12.06)
    """
    return shards * -math.expm1(requests * math.log1p(-1 / shards)) if shards > 1 else float(requests > 0)


def expected_served(shards: int, slices: int, budget: int) -> float:
    """S L H(S min(B, L)), H(k) = 1 + 1/2 + ... + 1/k: expected requests up to the one that leaves no prefix, uniform requests, large slices, cyclic sequences.

    The system is empty when every slice that stands first somewhere was hit: min(B, L) of each shard, a coupon collector's problem.

    >>> [round(expected_served(5, 6, b), 1) for b in range(1, 7)]
    [68.5, 87.9, 99.5, 107.9, 114.5, 119.8]
    """
    return shards * slices * sum(1 / k for k in range(1, shards * min(budget, slices) + 1))


def graph(family: str, shards: int, clique: int = 2) -> Graph:
    """SAFE's families: isolated (SISA), cliques of `clique` shards (the last may be smaller), safe (shard 0 is read by all others), complete.

    >>> graph("cliques", 4), graph("safe", 3)
    (((1,), (0,), (3,), (2,)), ((), (0,), (0,)))
    """
    if family not in FAMILIES:
        raise SettingError(suggest("no family of shard graphs", family, FAMILIES))
    if shards < 1 or clique < 1:
        raise SettingError(f"shards and clique must be 1 or more, not {shards} and {clique}")
    if family == "safe":
        return ((),) + ((0,),) * (shards - 1)
    width = {"isolated": 1, "cliques": clique, "complete": shards}[family]
    return tuple(tuple(j for j in range(i // width * width, min(shards, (i // width + 1) * width)) if j != i) for i in range(shards))


def checked(reads: Graph, shards: int) -> Graph:
    """The graph; raises SettingError where it has another number of shards, a shard that does not exist, a loop or an edge twice."""
    if len(reads) != shards:
        raise SettingError(f"the graph has {len(reads)} shards, the design {shards}")
    for i, out in enumerate(reads):
        if bad := [j for j in out if not 0 <= j < shards or j == i] or (len(set(out)) < len(out) and [out[0]]):
            raise SettingError(f"shard {i} cannot read shard {bad[0]}: edges go to other shards 0..{shards - 1}, each once")
    return reads


def safe_cost(sizes: Sequence[int], reads: Graph, asked: Sequence[float] | None = None) -> float:
    """sum_j q_j sum_{i = j or i -> j} |train(i)|, train(i) = D_i and all that i reads: expected records trained on per request, times epochs for passes.

    q_j = |D_j|/n, or the shares `asked` of requests per shard (safe data: 0; they are scaled to sum 1).

    >>> [safe_cost([100] * 10, graph(f, 10)) for f in ("isolated", "cliques", "complete")]
    [100.0, 400.0, 10000.0]
    >>> safe_cost([100] * 10, graph("safe", 10), [0] + [1] * 9)
    200.0
    """
    checked(reads, len(sizes))
    weights = list(sizes if asked is None else asked)
    if len(weights) != len(sizes) or sum(weights) <= 0 or min(weights) < 0:
        raise SettingError("the shares of requests must be one per shard, not negative and not all 0")
    train = [sizes[i] + sum(sizes[j] for j in out) for i, out in enumerate(reads)]
    cost = [train[j] + sum(train[i] for i, out in enumerate(reads) if j in out) for j in range(len(sizes))]
    return sum(w * c for w, c in zip(weights, cost, strict=True)) / sum(weights)
