"""Files of cells, one JSON line each: a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError

Cell = Mapping[str, Any]


def begun(path: Path, key: Callable[[Cell], Any], ours: Callable[[Cell], bool]) -> dict[Any, Any]:
    """key -> cell of those in the file that are `ours`, the last of a key. A line that a full disk or a kill cut short is warned of, and its cell is one that
    is not there. Raises DataError for a file that cannot be read, or whose cells are no cells of ours."""
    found: dict[Any, Any] = {}
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror or error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            cell = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            warnings.warn(f"line {number} of {path.name} is cut short or damaged: its cell is computed again", stacklevel=3)
            continue
        try:
            if cell is not None and ours(cell):
                found[key(cell)] = cell
        except (KeyError, TypeError, AttributeError, IndexError):
            raise DataError(f"line {number} of {path.name} is no cell of this benchmark: name another folder") from None
    return found


def add(path: Path, cell: Cell) -> None:
    """One line more; makes the folder where there is none. Raises DataError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as f:
            f.seek(max(0, f.seek(0, 2) - 1))
            cut = f.read(1) not in (b"", b"\n")  # the line before was cut short
            f.write((b"\n" if cut else b"") + json.dumps(cell).encode() + b"\n")
    except OSError as error:
        raise DataError(f"cannot write {path.name}: {error.strerror or error}; the cells before are kept") from error
