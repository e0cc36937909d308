"""Files of cells, one JSON line each: a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Cell = Mapping[str, Any]


def begun(path: Path, key: Callable[[Cell], Any], ours: Callable[[Cell], bool]) -> dict[Any, Any]:
    """key -> cell of those in the file that are `ours`, the last of a key."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {key(c): c for c in lines if ours(c)}


def add(path: Path, cell: Cell) -> None:
    """One line more; makes the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(cell) + "\n")
