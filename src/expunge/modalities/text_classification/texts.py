"""Texts with their classes: files of records, and the `Examples` that a tokenizer makes of them."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import DataError, SettingError, printable
from expunge.modalities import strict_json
from expunge.modalities.examples import Examples

NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""What the inputs may hold; the first two must be there."""
FIELDS = ("text", "label", "id")
MAX_BYTES = 1 << 30
"""Largest file of records that is read: 1 GiB."""

Rows = Sequence[Mapping[str, Any]]


def read(path: Path | str) -> list[dict[str, Any]]:
    """Records of JSON lines, one JSON list, or CSV with a header (by the name's end): text, label and, where wanted, id.

    Raises DataError naming the file, the record and what to do for anything else.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}") from None
    found = _table(path, content) if path.suffix.lower() == ".csv" else _json(path, content)
    if not found:
        raise DataError(f"{path.name} holds no record; write one JSON object with text and label per line")
    return [_record(row, f"record {k} of {path.name}") for k, row in enumerate(found)]


def _json(path: Path, content: str) -> list[Any]:
    if content.lstrip()[:1] == "[":
        return strict_json.parsed(content, path.name)
    return [strict_json.parsed(line, f"line {k} of {path.name}") for k, line in enumerate(content.split("\n"), 1) if line.strip()]


def _table(path: Path, content: str) -> list[Any]:
    """Rows of a CSV file; ids and labels that are whole numbers, written as such are (01 is a name), are numbers."""
    try:
        reader = csv.DictReader(io.StringIO(content), strict=True)
        rows, names = list(reader), list(reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(f"{path.name} is not CSV: {error}") from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path.name} names the column {printable(twice[0])} twice")
    for row in rows:
        for name in ("label", "id"):
            value = (row.get(name) or "").strip()
            if len(value) < 19 and value.removeprefix("-").isdecimal() and str(int(value)) == value:
                row[name] = int(value)  # pyright: ignore[reportArgumentType]
    return [{("further columns" if name is None else name): value for name, value in row.items() if value != ""} for row in rows]


def _record(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object with text and label")
    if unknown := [name for name in row if name not in FIELDS]:
        raise DataError(f"{where} has a field '{unknown[0]}'; records hold text, label and, where wanted, id: take the others out")
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise DataError(f"{where} has an empty or missing text")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise DataError(f"{where} has {'no label' if label in (None, '') else f'the label {label!r}'}; write the name or the number of a class")
    return row


def numbered(rows: Rows, names: Mapping[str, int], what: str = "the records") -> Tensor:
    """(N,) numbers of the labels, which are numbers or names. Raises DataError for one that `names` (name -> number) does not hold.

    >>> numbered([{"label": "sport"}, {"label": 0}], {"news": 0, "sport": 1}).tolist()
    [1, 0]
    """
    known = set(names.values())
    for k, row in enumerate(rows):
        label = row["label"]
        if (label not in names) if isinstance(label, str) else (names and label not in known):
            there = ", ".join(f"{name} ({number})" for name, number in list(names.items())[:12]) or "none by name, so write numbers"
            raise DataError(f"record {k} of {what} has the label '{label}'; the model's classes are {there}{' ...' if len(names) > 12 else ''}")
        if not isinstance(label, str) and names.get(str(label), label) != label:
            raise DataError(
                f"record {k} of {what} has the label {label}, but the class named {label} has the number {names[str(label)]}: which is meant? write names"
            )
    return torch.tensor([names[r["label"]] if isinstance(r["label"], str) else r["label"] for r in rows], dtype=torch.long)


def identified(rows: Rows, what: str = "the records") -> Tensor:
    """(N,) their ids where all are whole numbers, their places else. Raises DataError for two records of one id."""
    ids = [r.get("id") for r in rows]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        return torch.arange(len(rows))
    found = torch.tensor(ids, dtype=torch.long)
    values, counts = found.unique(return_counts=True)
    if bool((counts > 1).any()):
        raise DataError(f"{int(counts.max())} records of {what} have the id {int(values[counts.argmax()])}; an id names one record")
    return found


def records(
    tokenizer: Any, *parts: Rows, names: Mapping[str, int] | None = None, max_length: int = 128, called: Sequence[str] = ()
) -> list[Examples]:  # fmt: skip
    """Each part as Examples, all padded on the right to the width of the longest text of all, which is cut to `max_length` tokens.

    parts    records {"text", "label"} with a whole number as "id" where they have one
    names    name -> number of the classes (`model.config.label2id`), for labels in words
    called   what the parts are called in errors
    The tokenizer is left as it was. Raises DataError naming the record for a label that is not known or a text without tokens.
    """
    if max_length < 1:
        raise SettingError(f"max_length must be at least 1, not {max_length}")
    tokenize = copy.deepcopy(tokenizer)
    called = called or [f"part {k}" for k in range(len(parts))]
    coded = [tokenize([r["text"] for r in rows], truncation=True, max_length=max_length) for rows in parts]
    for what, found in zip(called, coded, strict=True):
        if empty := [k for k, ids in enumerate(found["input_ids"]) if not ids]:
            raise DataError(f"record {empty[0]} of {what} holds no token")
    width = max(len(ids) for found in coded for ids in found["input_ids"])
    fill = {"input_ids": tokenizer.pad_token_id or 0}
    made = []
    for what, rows, found in zip(called, parts, coded, strict=True):
        x = {n: torch.tensor([r + [fill.get(n, 0)] * (width - len(r)) for r in found[n]]) for n in NAMES if n in found}
        made.append(Examples(x, numbered(rows, names or {}, what), identified(rows, what)))
    return made
