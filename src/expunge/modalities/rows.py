"""Files of records in words: JSON lines, one JSON list, CSV with a header, Parquet, or one raw text. Read as they stand, or refused in one line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError, first_line, printable
from expunge.modalities import strict_json

MAX_BYTES = 1 << 32
"""Largest file of texts that is read: 4 GiB."""

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")

Placed = list[tuple[str, Any]]
"""(where it stands in words, the record as the file has it) of each."""


def read(path: Path | str) -> Placed:
    """The records of a file, by its ending; what ends otherwise is JSON lines.

    A cell of CSV is a text, an empty one of a table is no field; a .txt file is one record {"text"}. Raises DataError, which names the file and the line, for a
    file that cannot be read, holds nothing, or is not what its ending says.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".parquet":
        found = _parquet(path)
    elif ending == ".csv":
        found = _csv(path)
    else:
        found = of_text(content(path), path.name, ending)
    if not found:
        raise DataError(printable(f"{path.name} holds no record"))
    return found


def content(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(printable(f"{path.name} is larger than {MAX_BYTES} bytes"))
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(printable(f"cannot read {path.name}: {getattr(error, 'strerror', None) or first_line(error)}")) from None


def of_text(text: str, name: str, ending: str = "") -> Placed:
    """Records of JSON lines, or of one JSON value: a list, or an object over several lines; of .txt one raw text."""
    if ending == ".txt":
        return [(f"line 1 of {name}", {"text": text})]
    lines = [(k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and (lines[0][1].lstrip()[:1] == "[" or (len(lines) > 1 and lines[0][1].strip() == "{")):
        whole = strict_json.parsed(text, name)
        return [(f"record {k} of {name}", value) for k, value in enumerate(whole if isinstance(whole, list) else [whole], 1)]
    return [(where := f"line {k} of {name}", strict_json.parsed(line, where)) for k, line in lines]


def cells(path: Path) -> Placed:
    """The rows of a CSV file, lists of texts, the first of which may be a header."""
    try:
        table = list(csv.reader(io.StringIO(content(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(printable(f"{path.name} is not CSV: {first_line(error)}; long texts are kept in JSON lines or Parquet")) from None
    found = [(f"row {k} of {path.name}", row) for k, row in enumerate(table, 1) if row]
    if not found:
        raise DataError(printable(f"{path.name} holds no record"))
    return found


def _csv(path: Path) -> Placed:
    (_, head), *rows = cells(path)
    names = once(head, path.name)
    for where, row in rows:
        if len(row) != len(names):
            raise DataError(printable(f"{where} has {len(row)} cells, its header {len(names)}"))
    return [(where, {n: v for n, v in zip(names, row, strict=True) if v != ""}) for where, row in rows]


def _parquet(path: Path) -> Placed:
    from expunge.modalities.files.tables import unpacked_parquet

    if not path.is_file():
        raise DataError(printable(f"cannot read {path.name}: no such file"))
    try:
        table = unpacked_parquet(path)
        once(table.column_names, path.name)
        rows = table.to_pylist()
    except ImportError:
        raise DataError(f"{path.name} needs pyarrow: pip install 'expunge[data]'") from None
    except UnicodeDecodeError:
        raise DataError(printable(f"{path.name} holds text that is not in UTF-8")) from None
    return [(f"row {k} of {path.name}", {n: v for n, v in row.items() if v is not None}) for k, row in enumerate(rows, 1)]


def once(names: Sequence[str], what: str) -> list[str]:
    """The names of columns. Raises DataError for one that stands twice."""
    if twice := [n for n in names if names.count(n) > 1]:
        raise DataError(printable(f"{what} names the column {twice[0]} twice"))
    return list(names)


def without(rows: Placed, ignore: Sequence[str]) -> Placed:
    """The records without these fields."""
    return [(where, {k: v for k, v in row.items() if k not in ignore} if isinstance(row, Mapping) else row) for where, row in rows]


def listed(names: str) -> tuple[str, ...]:
    """The names that an option holds, a,b,c."""
    return tuple(n.strip() for n in names.split(",") if n.strip())
