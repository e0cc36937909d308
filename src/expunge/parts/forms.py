"""Unseen records of the same form as forgotten ones: what a record's losses can be held to.

The form of a classifier's record is (the label that its nearest kept records have, the label that it has): a wrong label is compared with wrong labels that no
model was taught. Where inputs have no distance it is the label alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.core.types import measured, spread, vectors

NEAREST = 5
"""Nearest kept records that are asked what label a record would have."""

MOST = 2048
"""Most kept records among which the nearest are looked for."""


def neighbours(data: Any, kept: Any) -> Tensor | None:
    """(n,) the label that most of the NEAREST records of `kept` have, by distance between inputs: what can be said of a record without having seen it. None
    where inputs have no distance."""
    if kept is None or not measured(getattr(data, "x", None)):
        return None
    kept, base = vectors(kept, MOST)
    step = len(data) if isinstance(data.x, Tensor) else data.at_once
    blocks = [data.x[k : k + step].flatten(1).float() for k in range(0, len(data), max(1, step))]
    near = torch.cat([torch.cdist(x, base).topk(min(NEAREST, len(kept)), largest=False).indices for x in blocks])
    return kept.y[near].mode(1).values


def paired(y: Tensor, said: Tensor, pool: Tensor, most: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows (M,), labels (M,), form (M,), mine (n,)) for records of labels y (n,) whose neighbours have labels said (n,), and unseen records of labels pool.

    Every record of the pool that has the label `said` of a form stands for it, under the label that the form's records have; one may stand for several.
    With `most`, about that many of all forms together, evenly apart. mine is -1 where the pool has none.

    >>> rows, labels, form, mine = paired(torch.tensor([7, 7]), torch.tensor([1, 2]), torch.tensor([1, 0, 1]))
    >>> rows.tolist(), labels.tolist(), form.tolist(), mine.tolist()
    ([0, 2], [7, 7], [0, 0], [0, -1])
    """
    pairs, mine = torch.stack([said, y], 1).unique(dim=0, return_inverse=True)
    there = [(pool == k).nonzero().squeeze(1) for k, _ in pairs.tolist()]
    there = [r[spread(len(r), max(1, most // len(there)))] for r in there] if most else there
    rows = torch.cat([torch.zeros(0, dtype=torch.long), *there])
    labels = torch.cat(
        [torch.zeros(0, dtype=pool.dtype), *(torch.full((len(r),), k, dtype=pool.dtype) for r, (_, k) in zip(there, pairs.tolist(), strict=True))]
    )
    form = torch.cat([torch.zeros(0, dtype=torch.long), *(torch.full((len(r),), k) for k, r in enumerate(there))])
    some = torch.tensor([len(r) > 0 for r in there])
    return rows, labels, form, torch.where(some[mine], mine, -1)


def better(mine: Tensor, others: Tensor) -> Tensor:
    """(n,) share of `others` (m,) with a larger loss, equal ones half.

    >>> better(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])).tolist()
    [1.0, 0.25]
    """
    order = others.sort().values
    below, most = (torch.searchsorted(order, mine, right=side) for side in (False, True))
    return 1 - (below + most).double() / (2 * len(order))
