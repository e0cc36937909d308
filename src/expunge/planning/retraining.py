"""References made anew: models trained on what is kept alone, each with a record of how it came about."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core import guard
from expunge.core.digest import model_digest
from expunge.core.errors import SplitError
from expunge.core.modality import Opened
from expunge.parts import provenance
from expunge.parts.provenance import Provenance
from expunge.parts.training import fresh, train

NAME = "retrained-{}"


def retrained(
    opened: Opened, training: Mapping[str, Any], *, seed: int, base: nn.Module | None = None, progress: Callable[[str, int, int], None] | None = None
) -> tuple[nn.Module, Provenance]:
    """(model, record): the request's model with newly drawn weights, or a copy of `base`, trained on retain alone.

    training    epochs, batch_size and options of `updates.descend.alternate`, as the original was trained
    Raises SplitError without retain, ModelError for a model whose weights cannot be drawn anew, Diverged for a training that fails.
    """
    data = opened.split.retain
    if data is None:
        raise SplitError("there is nothing to retrain on: the split has no retain part")
    model = fresh(opened.model, seed) if base is None else copy.deepcopy(base).requires_grad_(True)
    with guard.watching(guard.Guard(progress=progress, label=f"retraining, seed {seed}")):
        train(model, opened.task, data, seed=seed, **training)
    record = Provenance(model_digest(model), "" if base is None else model_digest(base), data.digest, len(data), dict(training), seed)
    return model, record


def references(
    opened: Opened, training: Mapping[str, Any], out: Path | str, *, seeds: int = 3, first: int = 1000, base: nn.Module | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Path]:  # fmt: skip
    """Files or folders OUT/retrained-K, one for each of `seeds` seeds from `first` on, each with its record."""
    written = []
    for k in range(seeds):
        model, record = retrained(opened, training, seed=first + k, base=base, progress=progress)
        weights = opened.write(model, Path(out) / NAME.format(k))
        provenance.save(weights, record)
        written.append(weights)
    return written
