"""Texts with their classes: files of records, and the `Examples` that a tokenizer makes of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import DataError, SettingError, printable
from expunge.modalities.examples import Examples
from expunge.modalities.rows import read as read_rows
from expunge.modalities.rows import without

NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""What the inputs may hold; the first two must be there."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fields:
    """What the fields of a file, or its columns, are called; those in `ignore` are left out, and any other is refused."""

    text: str = "text"
    label: str = "label"
    id: str = "id"
    ignore: tuple[str, ...] = ()


AS_IT_IS = Fields()


def read(path: Path | str, fields: Fields = Fields()) -> list[dict[str, Any]]:
    """Records of a file of `modalities.rows`: text, label and, where wanted, id (a whole number, or a word).

    Raises DataError naming the file, the record and what to do for anything else.
    """
    path = Path(path)
    table = path.suffix.lower() == ".csv"
    found = [_record(row, where, fields, table) for where, row in without(read_rows(path), fields.ignore)]
    if fields.id != "id" and not any("id" in row for row in found):
        raise DataError(printable(f"{path.name} has no field {fields.id}"))
    return found


def _record(row: Any, where: str, fields: Fields, table: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object with {fields.text} and {fields.label}")
    called = {fields.text: "text", fields.label: "label", fields.id: "id"}
    if unknown := [name for name in row if name not in called]:
        ways = f"--ignore {','.join(unknown)} leaves it out, --text-column, --label-column and --id-column say what is called otherwise"
        raise DataError(printable(f"{where} has what nothing reads, {','.join(unknown)}: {ways}"))
    row = {called[name]: value for name, value in row.items()}
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise DataError(f"{where} has an empty or missing {printable(fields.text)}")
    if table:
        row |= {name: _whole(row[name]) for name in ("label", "id") if name in row}
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise DataError(f"{where} has {'no label' if label in (None, '') else f'the label {label!r}'}; write the name or the number of a class")
    return row


def _whole(cell: str) -> int | str:
    """A cell that holds a whole number, written as such (01 is a name), as that number."""
    cell = cell.strip()
    return int(cell) if len(cell) < 19 and cell.removeprefix("-").isdecimal() and str(int(cell)) == cell else cell


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


def identified(rows: Rows, what: str = "the records") -> tuple[Tensor, dict[int, str] | None]:
    """(ids, names by id or None): whole numbers are ids themselves, words are named beside 0, 1, ..., records without any are called by their places.

    Raises DataError for two records of one id, and where some have one and others not.
    """
    ids = [r.get("id") for r in rows]
    if all(i is None for i in ids):
        return torch.arange(len(rows)), None
    if odd := [k for k, i in enumerate(ids) if isinstance(i, bool) or not isinstance(i, (int, str)) or i == ""]:
        raise DataError(
            f"record {odd[0]} of {printable(what)} has {'no id' if ids[odd[0]] in (None, '') else 'an id that is neither a word nor a whole number'}"
        )
    seen: dict[str, int] = {}
    for k, i in enumerate(ids):
        if (first := seen.setdefault(str(i), k)) != k:
            raise DataError(printable(f"records {first} and {k} of {what} have the id {i}; an id names one record"))
    if all(isinstance(i, int) and abs(i) < 1 << 63 for i in ids):
        return torch.tensor(ids, dtype=torch.long), None
    return torch.arange(len(rows)), {k: str(i) for k, i in enumerate(ids)}


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
        ids, named = identified(rows, what)
        made.append(Examples(x, numbered(rows, names or {}, what), ids, names=named))
    return made
