"""The index beside an image folder that is larger than memory: what is known of each image, so that a later run reads only what is new or was changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import DataError, printable
from expunge.core.files import seal_json, unsealed_json, write
from expunge.modalities.stored import Fact, fact

FORMAT = "expunge inputs 1"
MAX_BYTES = 1 << 32
"""Largest index that is read: 4 GiB."""

Files = Sequence[tuple[str, Path, int]]
"""(class/name, file, label) of each image."""


def place(folder: Path) -> Path:
    """Where the index of a folder stands: beside it, hidden."""
    return folder.with_name(f".{folder.name}.expunge-index.json")


def stamp(file: Path) -> list[int]:
    """Size and time of a file: where they are what they were, it is not read again."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def read(folder: Path, files: Files, one: Callable[[str, Path], Any], how: Mapping[str, Any]) -> tuple[list[Fact], str]:
    """(what is known of each image, their depth in words). Each image that the index does not know, or knows under another time, size or label, is read.

    how   what the inputs depend on besides the file (preprocessing, shape, depth): an index made under another is not used
    An index that was damaged or changed is made anew, and one that cannot be written is done without.
    """
    try:
        found = unsealed_json(place(folder), DataError, "is no index", MAX_BYTES)
        known = found["files"] if found.get("format") == FORMAT and found.get("how") == dict(how) and isinstance(found.get("files"), dict) else {}
    except DataError:
        known = {}
    facts, kept, news = [], {}, 0
    for said, file, label in files:
        now, old = stamp(file), known.get(said)
        if isinstance(old, list) and len(old) == 7 and old[:2] == now and old[4] == label:
            facts.append(Fact(bytes.fromhex(old[2]), bytes.fromhex(old[3]), label, old[5], old[6]))
        else:
            facts.append(fact(torch.from_numpy(one(said, file)), torch.tensor(label)))
            news += 1
        f = facts[-1]
        kept[said] = [*now, f.inputs.hex(), f.key.hex(), label, f.low, f.high]
    if news or len(kept) != len(known):
        with contextlib.suppress(OSError, ValueError):
            write(place(folder), seal_json({"format": FORMAT, "how": dict(how), "files": kept}))
    return facts, str(how["depth"])


def fetched(files: Files, one: Callable[[str, Path], Any]) -> Callable[[int], Tensor]:
    """Number of an image -> its input. Raises DataError for a file that changes while it is in use."""
    stamps = [stamp(file) for _, file, _ in files]

    def fetch(k: int) -> Tensor:
        said, file, _ = files[k]
        try:
            same = stamp(file) == stamps[k]
        except OSError:
            same = False
        if not same:
            raise DataError(printable(f"image {said} was changed or taken away while it was in use"))
        return torch.from_numpy(one(said, file))

    return fetch
