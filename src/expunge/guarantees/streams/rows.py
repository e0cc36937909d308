"""One row per request: what was measured after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.stats import wilson
from expunge.core.types import Records, Task
from expunge.parts.reading import score


@dataclass(frozen=True)
class Share:
    """Right answers of n, with Wilson's one-sided 95 % bounds; nan between 0 and 1 for n = 0."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Step:
    """One request played.

    records     how many it was about
    forgotten, kept, test    accuracy on the records forgotten so far, on those held now, and on unseen records of classes held now
    parts       number of each learn request so far -> accuracy on what is held of it
    passes      examples forward and backward          memory   records in memory
    stale       logits and Fisher parts that a model made which had seen a forgotten record
    weights     digest of the model after
    """

    number: int
    time: int
    kind: str
    what: str
    records: int
    forgotten: Share
    kept: Share
    test: Share
    parts: Mapping[str, Share]
    passes: int
    seconds: float
    memory: int
    stale: int
    weights: str


def shares(model: nn.Module, part: Tensor, task: Task, train: Records, test: Records | None) -> dict[str, Any]:
    """The accuracies of a `Step`, by field. part (N,): number of the request that each record of train was learnt at, -1 not yet, -2 forgotten."""
    right = score(model, task, train).correct
    labels = train.y[part >= 0].unique()
    unseen = None if test is None else test.take(torch.isin(test.y, labels).nonzero().squeeze(1))
    hits = score(model, task, unseen).correct if unseen is not None and len(unseen) else torch.zeros(0, dtype=torch.bool)
    return {
        "forgotten": _share(right[part == -2]), "kept": _share(right[part >= 0]), "test": _share(hits),
        "parts": {str(k): _share(right[part == k]) for k in part[part >= 0].unique().tolist()},
    }  # fmt: skip


def _share(right: Tensor) -> Share:
    return Share(*wilson(int(right.sum()), len(right)), len(right))
