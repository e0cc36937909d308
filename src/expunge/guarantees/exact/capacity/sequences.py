"""Which orders of its slices a shard is trained in, and what is left of them after deletions.

Source   S3T, "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning" (ICLR 2025).
Words    A shard is cut in L slices 0..L-1. A sequence is a permutation of them; a checkpoint is kept after each of its slices, trained on
         that prefix. B sequences (the budget) are trained per shard. A record deleted from slice s cuts each sequence at s: the prefix
         before s stays valid, to the bit.
Differs  The reference code sorts suffix rotations to find the next ones; here the order is a counter in mixed radix, which lets every
         slice stand first equally often for every B, not only for multiples of L. For fewer than L matched sequences, those of the
         highest score are taken: the paper trains all L.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from expunge.core.errors import SettingError, suggest

Sequences = tuple[tuple[int, ...], ...]
CHOICES = ("cyclic", "matching", "sampling")
POWER = 100
"""t of the score: how strongly a sequence that is likely to be cut counts as lost."""


def choose(choice: str, slices: int, budget: int, prior: Sequence[float] | None = None, seed: int = 0) -> Sequences:
    """`budget` distinct sequences of `slices` slices by name: cyclic, matching or sampling.

    `prior`: probability of a deletion per slice, equal ones where none is given. Raises SettingError for an unknown name, a number below 1,
    more sequences than there are, or a prior that is none.
    """
    if choice == "cyclic":
        return cyclic(slices, budget)
    p = (1 / slices,) * slices if prior is None and slices > 0 else prior
    if choice == "matching":
        return matching(slices, budget, p)
    if choice == "sampling":
        return sampling(slices, budget, p, seed)
    raise SettingError(suggest("no choice of sequences", choice, CHOICES))


def _checked(slices: int, budget: int, most: int, why: str) -> None:
    if slices < 1 or budget < 1:
        raise SettingError(f"slices and budget must be 1 or more, not {slices} and {budget}")
    if budget > most:
        raise SettingError(f"budget is {budget}, but {why}")


def _distinct(slices: int, budget: int) -> None:
    if slices < 20:
        _checked(slices, budget, most := math.factorial(max(slices, 1)), f"{slices} slices have only {most} sequences")
    else:
        _checked(slices, budget, budget, "")


def cyclic(slices: int, budget: int) -> Sequences:
    """Rotations of all slices, then of all but the first of each (its suffix), and so on: every slice stands first equally often, to one.

    >>> cyclic(3, 3)
    ((0, 1, 2), (2, 0, 1), (1, 2, 0))
    >>> cyclic(3, 5)[3:]
    ((0, 2, 1), (2, 1, 0))
    """
    _distinct(slices, budget)
    return tuple(_rotated(slices, number) for number in range(budget))


def _rotated(slices: int, number: int) -> tuple[int, ...]:
    order = list(range(slices))
    for start in range(slices - 1):
        number, turn = divmod(number, slices - start)
        suffix = order[start:]
        order[start:] = suffix[-turn:] + suffix[:-turn] if turn else suffix
    return tuple(order)


def score(sequence: Sequence[int], p: Sequence[float], t: int = POWER) -> float:
    """sum_k k (1 - sum_{j <= k} p_j)^t: how much of a sequence is expected to be left after t requests, in slices.

    >>> score((0, 1), (0.0, 0.5), t=1)
    2.0
    """
    total, mass = 0.0, 0.0
    for k, s in enumerate(sequence, start=1):
        mass += p[s]
        total += k * max(0.0, 1 - mass) ** t
    return total


def _prior(slices: int, p: Sequence[float] | None) -> list[float]:
    if p is None or len(p) != slices or not all(math.isfinite(v) and 0 <= v <= 1 for v in p) or sum(p) > 1 + 1e-9:
        raise SettingError(f"the prior must hold one probability per slice ({slices}), in 0..1 and of sum 1 at most")
    return [float(v) for v in p]


def matching(slices: int, budget: int, prior: Sequence[float] | None, t: int = POWER) -> Sequences:
    """All L sequences grow in parallel; each round gives each one unused slice, no slice twice, so that the sum of scores is largest (Hungarian algorithm).

    The `budget` best by score, best first. `prior` (L,): probability that the next request hits each slice. Raises SettingError for a budget above L.

    >>> [one[0] for one in matching(4, 2, (0.03, 0.0, 0.02, 0.01))]
    [1, 3]
    """
    from scipy.optimize import linear_sum_assignment

    _checked(slices, budget, slices, f"matching finds {slices} sequences for {slices} slices; choose cyclic or sampling for more")
    p = _prior(slices, prior)
    found: list[list[int]] = [[s] for s in range(slices)]
    for _ in range(slices - 1):
        gain = [[-np.inf if s in one else score([*one, s], p, t) for s in range(slices)] for one in found]
        for one, s in zip(found, linear_sum_assignment(np.array(gain), maximize=True)[1], strict=True):
            one.append(int(s))
    return tuple(sorted(map(tuple, found), key=lambda one: -score(one, p, t))[:budget])


def sampling(slices: int, budget: int, prior: Sequence[float] | None, seed: int = 0) -> Sequences:
    """`budget` distinct sequences, each drawn slice by slice without replacement with probabilities proportional to 1 - p."""
    _distinct(slices, budget)
    p = np.array(_prior(slices, prior))
    rng, found = np.random.default_rng(seed), {}
    while len(found) < budget:
        # keys E / w: ordering them is drawing without replacement by weight w; a slice of weight 0 comes last
        keys = rng.exponential(size=slices) / np.maximum(1 - p, 1e-12)
        found[tuple(int(s) for s in keys.argsort(kind="stable"))] = None
    return tuple(found)


def surviving(sequences: Iterable[Sequence[int]], dead: Iterable[int]) -> Sequences:
    """What is left of each sequence in front of its first dead slice, equal prefixes once, empty ones left out.

    >>> surviving(cyclic(3, 3), {0})
    ((2,), (1, 2))
    >>> surviving(surviving(cyclic(3, 3), {0}), {2}), surviving(cyclic(3, 1), {0})
    (((1,),), ())
    """
    gone = set(dead)
    cut = (tuple(one[: next((k for k, s in enumerate(one) if s in gone), len(one))]) for one in sequences)
    return tuple(dict.fromkeys(one for one in cut if one))


def longest(prefixes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The longest prefix, the first of equals; the empty one where none is left.

    >>> longest(surviving(cyclic(3, 3), {0})), longest([])
    ((1, 2), ())
    """
    return tuple(max(prefixes, key=len, default=()))


def checkpoints(sequences: Iterable[Sequence[int]]) -> Sequences:
    """Every distinct prefix, in order of training: what a trie of checkpoints holds.

    >>> len(checkpoints(cyclic(3, 3))), len(checkpoints(cyclic(3, 6)))
    (9, 15)
    """
    return tuple(dict.fromkeys(tuple(one[:k]) for one in sequences for k in range(1, len(one) + 1)))
