"""How text records are read: the files of `modalities.rows`, in the forms of `records.forms`, and files of rewritten records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from expunge.core.errors import DataError, SettingError, printable, suggest
from expunge.modalities import rows
from expunge.modalities.language.records.artefact import parsed
from expunge.modalities.language.records.forms import TURNS, family, recognised, turned

TEXTS = ("question", "answer", "text", "system", "history")


@dataclass(frozen=True)
class Reading:
    """How files of texts are read, the same for all files of a request.

    ignore      fields that are left out; any other that nothing reads is refused
    id_column   field that names the records, which becomes `id`; without it a field `id` does, where there is one
    turns       of a conversation the `last` assistant turn is the answer, or `all` are, each with the turns before it
    """

    ignore: tuple[str, ...] = ()
    id_column: str = ""
    turns: str = "last"

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise SettingError(suggest("turns must be last or all: no", self.turns, TURNS))


AS_IT_IS = Reading()
"""Nothing left out, `id` names records, the last turn answers."""


class Found(NamedTuple):
    """Records, how they were read in words, and the names of all fields of the file."""

    rows: list[dict[str, Any]]
    told: str
    fields: frozenset[str]


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Records of a file of texts, in any of the forms of `records.forms`. Raises DataError naming the line."""
    return read(path).rows


def read(path: Path | str, how: Reading = Reading()) -> Found:
    """The records of a file. Raises DataError naming the line, for two forms in one file, and for a name that stands twice, too."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet", ".txt") and rows.content(path).lstrip()[:10] == '{"expunge"':
        return Found([dict(row) for row in parsed(path)[1]], "a file that expunge wrote", frozenset())
    found, forms, notes = [], dict[str, int](), dict[str, None]()
    placed, first = rows.read(path), ("", "")
    fields = frozenset(k for _, row in placed if isinstance(row, dict) for k in row)
    for where, row in rows.without(placed, how.ignore):
        if not isinstance(row, dict):
            raise DataError(f"{where} is no object with question and answer, or text")
        record, form = recognised(_called(row, how.id_column, where), where)
        first = first if first[0] else (where, form)
        if family(form) != family(first[1]):
            raise DataError(f"{where} is {form}, {first[0].partition(' of ')[0]} is {first[1]}: a file holds one form; make two of it")
        several = how.turns == "all" and "history" in record
        form = form.replace("the last assistant turn", "every assistant turn") if how.turns == "all" else form
        found += turned(record) if several else [record]
        forms[form] = forms.get(form, 0) + 1
        notes |= dict.fromkeys(k for k in record if k not in (*TEXTS, "id"))
    named = identified(found, path.name, how.id_column or "id")
    told = ", ".join(f"{n} as {form}" if len(forms) > 1 else form for form, n in forms.items())
    more = [f"named by {how.id_column or 'id'}"] if named else []
    more += [f"no text that is trained: {', '.join(map(printable, notes))}"] if notes else []
    more += [f"left out: {', '.join(map(printable, out))}"] if (out := [n for n in how.ignore if n in fields]) else []
    return Found(found, printable(f"{told} ({'; '.join(more)})") if more else told, fields)


def _called(row: dict[str, Any], id_column: str, where: str) -> dict[str, Any]:
    if not id_column or id_column == "id":
        return row
    if "id" in row:
        raise DataError(f"{where} has id beside {printable(id_column)}: which names the record? --ignore id leaves it out")
    return {"id" if k == id_column else k: v for k, v in row.items()}


def identified(found: Sequence[dict[str, Any]], what: str, name: str) -> bool:
    """Whether all records have an id. Raises DataError where some have, where one stands twice, or is neither a word nor a whole number."""
    ids = [row.get("id") for row in found]
    if all(i is None for i in ids):
        if name != "id":
            raise DataError(printable(f"{what} has no field {name}"))
        return False
    seen = dict[str, int]()
    for k, i in enumerate(ids, 1):
        if not isinstance(i, (str, int)) or isinstance(i, bool) or not str(i).strip():
            raise DataError(printable(f"record {k} of {what} has {'no' if i is None else 'no word or whole number as'} {name}"))
        if str(i) in seen:
            raise DataError(printable(f"records {seen[str(i)]} and {k} of {what} are both named {i}"))
        seen[str(i)] = k
    return True
