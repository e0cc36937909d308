"""Reference values, kept for as long as the guard of the run lives, and beside its checkpoints if it has a journal, so that a resumed run does not compute
them again. They go with the run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from expunge.core import guard
from expunge.core.digest import model_digest
from expunge.core.errors import JournalError
from expunge.core.files import seal, unsealed, write

REFERENCE = "reference values"


def recall(what: str, model: nn.Module, data: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`make()`, computed once per weights, data and `what` under the guard that watches."""

    watch = guard.current()
    key = hashlib.sha256(f"{what}/{model_digest(model)}/{data.digest}".encode()).hexdigest()[:32]
    if key not in watch.kept:
        path = None if watch.journal is None else watch.journal.folder / f"reference-{key}.safetensors"
        found = _read(path) if path is not None else None
        if found is None:
            found = make()
            if path is not None:
                write(path, seal(REFERENCE, found), JournalError)
        watch.kept[key] = found
    return watch.kept[key]


def _read(path: Path) -> dict[str, Tensor] | None:
    """What `recall` wrote there; None for what cannot be read as that, which is computed again."""
    try:
        return unsealed(path, REFERENCE, JournalError, "it is made again") if path.exists() else None
    except JournalError as error:
        warnings.warn(f"{error}: the reference values are computed again", stacklevel=2)
        return None
