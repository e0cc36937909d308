"""Which texts of one file must go, in words: `ids:17,42`, `ids:@file`, `mentions:Anna Vey` (a person, a thing), `author:Anna Vey` (any field), `random:0.1`."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expunge.core import files
from expunge.core.errors import DataError, SplitError, printable
from expunge.modalities.rows import content

Rows = list[dict[str, Any]]
TEXTS = ("system", "question", "answer", "text")
SHOWN = 5
"""Names of records that are said."""


def chosen(what: str, rows: Rows, folder: Path, *, inside: bool = False) -> tuple[Rows, Rows, str]:
    """(the records that must go, those that stay, what was understood in words).

    ids:a,b or ids:@file   by their names (`id`, --id-column); by their places from 0 where they have none. Of a conversation, all turns
    mentions:NAME          the name stands in a text of the record, as words of its own, in any case
    FIELD:VALUE            a field of the records has that value
    random:0.1, random:20  a share or a number, drawn from seed 0

    A file of ids may not leave the folder with `inside`. Raises SplitError for what cannot be read, matches no record, or all.
    """
    kind, colon, value = what.partition(":")
    fields = sorted({k for row in rows for k in row} - {*TEXTS, "history", "id"})
    if not colon or not value.strip() or kind not in ("ids", "mentions", "random", *fields):
        ways = ", ".join(["ids:17,42", "ids:@file", "mentions:NAME", "random:0.1", *(f"{f}:VALUE" for f in fields)])
        raise SplitError(printable(f"cannot read '{what}', which says what must go of --train; write one of {ways}"))
    if kind == "ids":
        gone = _named(value, rows, folder, inside)
    elif kind == "random":
        gone = _drawn(value, len(rows))
    elif kind == "mentions":
        gone = [any(_mentions(value.strip(), t) for t in _said(row)) for row in rows]
    else:
        gone = [str(row.get(kind, "")) == value for row in rows]
        if not any(gone) and (near := difflib.get_close_matches(value, [str(r.get(kind, "")) for r in rows], n=1)):
            raise SplitError(printable(f"no record has {kind} {value}; {near[0]} is near"))
    forget, retain = ([row for row, g in zip(rows, gone, strict=True) if g == side] for side in (True, False))
    if not forget or not retain:
        raise SplitError(printable(f"'{what}' matches {'every record: nothing would stay' if forget else 'no record'} of the {len(rows):,} of --train"))
    first = [printable(str(row.get("id", ""))) for row in forget[:SHOWN] if "id" in row]
    names = f": {', '.join(first)}{' ...' if len(forget) > SHOWN else ''}" if first else ""
    return forget, retain, f"{printable(what)}, {len(forget):,} of {len(rows):,} records{names}"


def _said(row: dict[str, Any]) -> list[str]:
    return [*(str(turn["content"]) for turn in row.get("history", ())), *(str(row[n]) for n in TEXTS if row.get(n))]


def _mentions(name: str, text: str) -> bool:
    """Whether the name stands there as words of its own; in scripts without spaces, anywhere."""
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in name)
    return re.search(re.escape(name) if wide else rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _named(value: str, rows: Rows, folder: Path, inside: bool) -> list[bool]:
    if value.startswith("@"):
        path = files.inside(value[1:], folder) if inside else folder / value[1:]
        try:
            words = [line.strip() for line in content(Path(path)).split("\n") if line.strip()]
        except DataError as error:
            raise SplitError(str(error)) from None
    else:
        words = [w.strip() for w in value.split(",") if w.strip()]
    names: Sequence[set[str]] = [_names(str(row["id"])) if "id" in row else {str(k)} for k, row in enumerate(rows)]
    known = set().union(*names)
    if unknown := [w for w in words if w not in known]:
        near = f" ({found[0]} is)" if (found := difflib.get_close_matches(unknown[0], sorted(known)[:10_000], n=1)) else ""
        raise SplitError(printable(f"{len(unknown)} id(s) are not in --train, the first is {unknown[0]}{near}"))
    wanted = set(words)
    return [bool(mine & wanted) for mine in names]


def _names(name: str) -> set[str]:
    """A turn is named by its conversation, too."""
    whole, mark, turn = name.rpartition("#")
    return {name, whole} if mark and turn.isdigit() else {name}


def _drawn(value: str, n: int) -> list[bool]:
    try:
        many = int(value) if value.isdigit() and int(value) > 1 else int(float(value) * n)
    except (ValueError, OverflowError):
        raise SplitError(f"write random:0.1 or random:20, not 'random:{printable(value)}'") from None
    kept = set(torch.randperm(n, generator=torch.Generator().manual_seed(0))[: max(0, many)].tolist())
    return [k in kept for k in range(n)]
