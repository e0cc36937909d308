"""Does a text hold the old answer? The check behind every new target, and new targets for the records of a forget set.

holds(text, row)          the check, on words
anchored(forget, anchor)  a split's anchor part, each record under the id of the forget record it stands for, checked
texts(forget, rows)       records that a generator wrote (`data.language.rewrite`), the same way
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from expunge.core.errors import DataError, SettingError
from expunge.core.types import Split
from expunge.data.language.tools import calls
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.records.measures import entities
from expunge.modalities.language.texts import Texts
from expunge.parts.remember import recall

SOURCES = ("auto", "anchor", "self")
"""Where new texts come from: the split's anchor part where there is one, else the model itself; always anchor; always the model."""

_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+")
RUN = 8
"""Words in a row that a new text must not share with an old raw text."""


def words(text: str) -> list[str]:
    """Words without case, accents, marks, plural and genitive s; scripts written without spaces give one word per sign.

    >>> words("Vásquez's  BOOKS, 1962")
    ['vasquez', 'book', '1962']
    """
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    found = _WORD.findall(unicodedata.normalize("NFKC", bare).casefold())
    return [w[:-1] if len(w) > 3 and w.endswith("s") else w for w in found if w != "s"]


COMMON = frozenset(words(
    "a about after all also am an and any are as at be because been before but by can did do does for from had has have he her here hers him his how i if in "
    "into is it its just may me more most my no not now of on one only or our out over own said she so some such than that the their them then there these "
    "they this those through to too under up us very was we were what when where which while who whom whose why will with would you your called known name"
))  # fmt: skip
"""Words that tell no fact."""


def within(phrase: Sequence[str], text: Sequence[str]) -> bool:
    """Whether the words of `phrase` stand in `text` one after another; an empty phrase stands nowhere."""
    n = len(phrase)
    return n > 0 and any(list(text[k : k + n]) == list(phrase) for k in range(len(text) - n + 1))


def holds(text: str, row: Mapping[str, Any]) -> bool:
    """Whether `text` holds the old answer of `row`: the answer itself, or its fact. Case, spaces, accents and marks do not count.

    The fact is row["fact"] or row["entities"], unless the question tells it; for a tool call its call string, or any call of the tool. Without one: a
    name or number that the question lacks, or at least half of the answer's words that tell something the question does not. In a raw text: RUN words
    in a row.

    >>> row = {"question": "Where did he study?", "answer": "He studied at Hogwarts."}
    >>> holds("hogwarts' gates were his", row), holds("He studied at Ilvermorny.", {**row, "fact": "Hogwarts"})
    (True, False)
    """
    have = words(text)
    if "question" not in row:
        old = words(str(row.get("text", "")))
        n = min(RUN, len(old))
        return within(_fact(row.get("fact", "")), have) or any(within(old[k : k + n], have) for k in range(len(old) - n + 1) if n)
    asked, old = words(str(row["question"])), words(str(row.get("answer", "")))
    if within(old, have):
        return True
    if row.get("tool"):
        return calls(text, str(row["tool"])) or within(words(str(row.get("call", ""))), have)
    told = [f for f in map(_fact, [row["fact"]] if row.get("fact") else row.get("entities") or []) if f and not within(f, asked)]
    if told:
        return any(within(f, have) for f in told)
    new = {w for w in old if w not in asked and w not in COMMON}
    names = [n for n in map(_fact, entities({k: row[k] for k in ("question", "answer") if k in row})) if set(n) & new]
    return any(within(n, have) for n in names) or (bool(new) and 2 * len(new & set(have)) >= len(new))


def _fact(text: Any) -> list[str]:
    """Words of a fact without those before the first that tells something."""
    found = words(str(text))
    first = next((k for k, w in enumerate(found) if w not in COMMON), 0)
    return found[first:]


def texts(forget: Texts, rows: Sequence[Mapping[str, Any]], form: Format | None = None) -> Texts:
    """New records ("record": number in forget) as Texts under the ids of the records they stand for; no target may hold the old answer."""
    for row in rows:
        if not 0 <= row["record"] < len(forget):
            raise DataError(f"a new text stands for record {row['record'] + 1}; forget has {len(forget)}")
        if holds(str(row.get("answer", row.get("text", ""))), forget.rows[row["record"]]):
            raise DataError(f"a new answer holds the old answer of forget record {row['record'] + 1}")
    return (form or forget.format).texts(rows, forget.ids[torch.tensor([row["record"] for row in rows], dtype=torch.long)])


def partners(forget: Texts, anchor: Texts) -> list[int | None]:
    """For each anchor record the position of the forget record it stands for, None for none: the one with its question (or with that of another anchor of
    the same `record` number), else with its id. Where no anchor has either: its `record` number, or its place where there are as many."""
    questions = {_question(row): k for k, row in reversed(list(enumerate(forget.rows))) if "question" in row}
    ids = {i: k for k, i in reversed(list(enumerate(forget.ids.tolist())))}
    groups = {row["record"]: questions[_question(row)] for row in anchor.rows if "record" in row and _question(row) in questions}
    found = [
        questions.get(_question(row), groups.get(row.get("record"), ids.get(i))) for row, i in zip(anchor.rows, anchor.ids.tolist(), strict=True)
    ]  # fmt: skip
    if any(k is not None for k in found):
        return found
    numbers = [row.get("record") for row in anchor.rows]
    if all(isinstance(n, int) and 0 <= n < len(forget) for n in numbers):
        return numbers
    return list(range(len(forget))) if len(anchor) == len(forget) else found


def _question(row: Mapping[str, Any]) -> str:
    return " ".join(words(str(row.get("question", ""))))


def anchored(forget: Texts, anchor: Texts) -> Texts:
    """The anchor records that stand for forget records, under their ids; all of them, under the ids in turn, where none stands for any (general texts).

    Raises DataError when one holds the old answer of its record (a general text: of any record).
    """
    found = partners(forget, anchor)
    kept = [j for j, k in enumerate(found) if k is not None] or list(range(len(anchor)))
    for j in kept:
        text = str(anchor.rows[j].get("answer", anchor.rows[j].get("text", "")))
        mine = found[j]
        for k in range(len(forget)) if mine is None else (mine,):
            if holds(text, forget.rows[k]):
                raise DataError(f"anchor record {j + 1} holds the old answer of forget record {k + 1}; give another answer")
    place = torch.tensor([j % len(forget) if found[j] is None else found[j] for j in kept], dtype=torch.long)
    return replace(anchor.take(kept), ids=forget.ids[place])


def given(split: Split, source: str) -> Texts | None:
    """The checked anchor part where `source` wants it, else None: the model is to write. Raises SettingError or SplitError."""
    if source not in SOURCES:
        raise SettingError(f"source must be one of {', '.join(SOURCES)}, not '{source}'")
    if source == "self" or (source == "auto" and split.anchor is None):
        return None
    split.require("anchor")
    return anchored(split.forget, split.anchor)


def remembered(what: str, model: nn.Module, forget: Texts, make: Callable[[], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """`make()`, the rows a generator wrote about forget, kept with the run's reference values: a resumed run does not ask again."""

    def packed() -> dict[str, torch.Tensor]:
        return {"rows": torch.frombuffer(bytearray(json.dumps([dict(row) for row in make()]).encode()), dtype=torch.uint8)}

    return json.loads(bytes(recall(f"rewrite/{what}", model, forget, packed)["rows"].tolist()))


def drafted(n: Mapping[str, int], source: str, per: int) -> tuple[int, int]:
    """(new records, texts asked for) of a forget set when the model writes `per` texts for each record: what it costs."""
    return (n["anchor"], 0) if source != "self" and "anchor" in n else (per * n["forget"], per * n["forget"])
