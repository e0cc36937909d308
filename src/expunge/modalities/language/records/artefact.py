"""Files of rewritten records (`data.language.rewrite` writes them): one JSON object a line, a header with their number and checksum first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError
from expunge.modalities.rows import MAX_BYTES

VERSION = 1


def digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content(path: Path, *, cut: bool = False) -> str:
    """The file's text; up to its last whole line if it may have been `cut` off."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        raw = path.read_bytes()
        return raw[: raw.rfind(b"\n") + 1 if cut else len(raw)].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}") from None


def parse(line: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON lines: {error.msg}") from None
    if not isinstance(found, dict):
        raise DataError(f"{name} holds a line that is no object")
    return found


def parsed(path: Path | str) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """(header, rows) of a file that `rewrite` made. Raises DataError for one that was changed, cut off or made by something else."""
    path = Path(path)
    head, *lines = content(path).split("\n")
    header = parse(head, path.name)
    if header.get("expunge") != "rewrite" or header.get("version") != VERSION:
        raise DataError(f"{path.name} is no file of rewritten records, version {VERSION}")
    if lines[-1:] != [""] or digest(lines[:-1]) != header.get("sha256") or len(lines) - 1 != header.get("rows"):
        raise DataError(f"{path.name} does not match its checksum: it was changed or cut off")
    return header, tuple(parse(line, path.name) for line in lines[:-1])
