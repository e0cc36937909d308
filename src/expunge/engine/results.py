"""What is done with a result: the edited copy of a model, and its weights in a folder that its own library loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.edits import Hook
from expunge.core.errors import ModelError
from expunge.core.files import whole, write
from expunge.core.patch import Patch
from expunge.core.types import Split, Task
from expunge.engine.likeness import likeness
from expunge.modalities.files.models import WEIGHTS, plain, save_state


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """What a run started from."""

    model: nn.Module
    task: Task
    split: Split


def edited(source: Source | None, patch: Patch | None) -> nn.Module:
    """A copy of the model with the patch in it; the model itself is left alone. Raises ModelError where there is no patch, or nothing to put it on."""
    if patch is None:
        raise ModelError("this run left no patch: there is no edited model")
    if source is None:
        raise ModelError("the model that this patch is for is not known here: load it and call patch.apply(model)")
    twin = copy.deepcopy(source.model)
    patch.apply(twin)
    return twin


def released(source: Source | None, patch: Patch | None, folder: Path | str, mark: tuple[str, str] | None = None) -> Path:
    """Write the edited model to a new folder, whole or not at all, load it back, compare (`engine.likeness`), and return the folder.

    A model with `save_pretrained` is written by it, with the tokenizer of its texts; any other as its state dict, WEIGHTS.
    mark   (file name, text) put into the folder, of what may not be used
    Raises ModelError for a guard, which is no weight, a folder that is there, one that cannot be written, and one that loaded back is not the edited model.
    """
    twin = edited(source, patch)
    assert source is not None and patch is not None
    if any(isinstance(e, Hook) for e in patch.edits):
        raise ModelError(GUARD)
    with renamed(folder, mark) as made:
        made.mkdir(parents=True)
        found = likeness(twin, _written(twin, source, made), source.task, source.split, before=source.model)
        if not found.same:
            raise ModelError(f"the folder is not the edited model: loaded back, {found.why}")
    return Path(folder)


GUARD = "this patch is an inference-time guard and changes no weight: there is nothing to write; keep the patch, and serve the model with it"


@contextmanager
def renamed(folder: Path | str, mark: tuple[str, str] | None = None) -> Iterator[Path]:
    """A place beside the folder, which what was written there is renamed to when all went well; else it is taken away.

    mark   (file name, text) put into it
    Raises ModelError where the folder holds something already, or cannot be written.
    """
    with whole(folder) as made:
        yield made
        if mark is not None:
            write(made / mark[0], mark[1], ModelError)


def _written(twin: Any, source: Source, folder: Path) -> nn.Module:
    """Write the model, and load it back as its library does."""
    if not hasattr(twin, "save_pretrained"):
        save_state(twin, folder / WEIGHTS)
        return plain(source.model, folder)
    twin.save_pretrained(folder)
    tokenizer = getattr(getattr(source.split.forget, "format", None), "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return type(twin).from_pretrained(folder, local_files_only=True).eval()
