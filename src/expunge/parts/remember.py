"""Reference values, kept for as long as the guard of the run lives, and beside its checkpoints if it has a journal, so that a resumed run does not compute
them again. They go with the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from expunge.core import guard
from expunge.core.digest import model_digest
from expunge.core.errors import JournalError
from expunge.core.files import write


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
                from safetensors.torch import save

                write(path, save({n: t.contiguous() for n, t in found.items()}), JournalError)
        watch.kept[key] = found
    return watch.kept[key]


def _read(path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.exists() else None
    except (SafetensorError, OSError):
        return None
