"""Texts with their own terms replaced by ordinary ones, and which token of the one stands where which token of the other does. Card harry-potter, steps 2 to 4.

pair = translated(split.forget)            # pair.text and pair.translation have target for target in common
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expunge.core.errors import DataError
from expunge.data.language.answers import COMMON, words
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.records.measures import entities
from expunge.modalities.language.task import with_targets
from expunge.modalities.language.texts import Texts

GENERIC = ("John", "Smith", "Mary", "Brown", "Paul", "Miller", "Anna", "Green", "Peter", "Taylor", "Jane", "White", "Tom", "Clark", "Laura", "Hill")
"""Ordinary names, given to a record's terms word by word."""


class Segment(NamedTuple):
    """A replaced term: its characters [start, end) in the text, and [left, right) in the translation."""

    start: int
    end: int
    left: int
    right: int
    term: str


def terms(row: Mapping[str, Any]) -> dict[str, str]:
    """Term -> generic term of a record: its own `anchors`, or its author and fact, or the capitalised words in it that do not only begin sentences.
    Capitalised words become names of GENERIC, the same word the same name; numbers 1900; other words "something"."""
    if row.get("anchors"):
        return {str(k): str(v) for k, v in row["anchors"].items()}
    found = [str(row[k]) for k in ("author", "fact") if row.get(k)]
    if not found:
        plain = " ".join(str(row.get(k, "")) for k in ("question", "answer", "text"))
        inner = lambda name: " " in name or re.search(rf"[^.!?\s]\s+{re.escape(name)}(?!\w)", plain)  # noqa: E731
        found = [name for name in entities({"answer": plain}) if not set(words(name)) <= COMMON and inner(name)]
    named: dict[str, str] = {}
    for word in (w for name in found for w in re.findall(r"\w+", name) if not set(words(w)) <= COMMON):
        named.setdefault(word, GENERIC[len(named) % len(GENERIC)] if word[:1].isupper() else "1900" if word.isdigit() else "something")
    whole = {name: re.sub(r"\w+", lambda m: named.get(m[0], m[0]), name) for name in found}
    return {**{w: g for w, g in named.items() if w[:1].isupper()}, **whole}


def translate(text: str, anchors: Mapping[str, str]) -> tuple[str, list[Segment]]:
    """The text with its terms replaced (whole words, longest first), and what was replaced where.

    >>> translate("Hogwarts? At Hogwarts.", {"Hogwarts": "school"})[0]
    'school? At school.'
    """
    if not any(anchors):
        return text, []
    pattern = "|".join(re.escape(t) for t in sorted(filter(None, anchors), key=len, reverse=True))
    parts: list[str] = []
    found: list[Segment] = []
    at = length = 0
    for m in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text):
        parts += [text[at : m.start()], anchors[m[0]]]
        left = length + m.start() - at
        at, length = m.end(), left + len(anchors[m[0]])
        found.append(Segment(m.start(), m.end(), left, length, m[0]))
    return "".join([*parts, text[at:]]), found


def align(starts: Sequence[int], others: Sequence[int], segments: Sequence[Segment]) -> list[int]:
    """For each token of a text, by its first character, the token of the translation behind the same prefix; -1 inside a replaced term or without partner.

    Tokens that start at the same character (parts of one sign, marks of the start) are told apart by their number.

    >>> align([0, 4, 8, 11], [0, 4, 9], [Segment(4, 11, 4, 9, "Hogwarts")])
    [0, 1, -1, 2]
    """
    numbered = {key: k for k, key in enumerate(_numbered(others))}
    out = []
    for start, number in _numbered(starts):
        inside = any(s.start < start < s.end for s in segments)
        shift = sum((s.right - s.left) - (s.end - s.start) for s in segments if s.end <= start)
        out.append(-1 if inside else numbered.get((start + shift, number), -1))
    return out


def _numbered(starts: Sequence[int]) -> list[tuple[int, int]]:
    seen: Counter[int] = Counter()
    out = []
    for start in starts:
        out.append((start, seen[start]))
        seen[start] += 1
    return out


class Pair(NamedTuple):
    """A forget set and its translation, target for target; `banned[k]` holds for each target of record k the tokens that are no label there."""

    text: Texts
    translation: Texts
    banned: list[list[set[int]]]


def translated(data: Texts) -> Pair:
    """Records with at least one target that has a partner, and that is not the second occurrence of a term."""
    form: Format = data.format
    rows: list[int] = []
    mine: list[Tensor] = []
    theirs: list[tuple[Tensor, Tensor]] = []
    banned: list[list[set[int]]] = []
    for k, row in enumerate(data.rows):
        text = form.whole(row)[0]
        anchors = terms(row)
        other, segments = translate(text, anchors)
        tokens, spans = _tokens(form, text)
        there, places = _tokens(form, other)
        if not torch.equal(tokens, data.tokens[k]):
            raise DataError(f"record {k + 1}: the tokens are not those of its text; make the split with its own format")
        partner = align([a for a, _ in spans], [a for a, _ in places], segments)
        again = [s for j, s in enumerate(segments) if any(s.term == before.term for before in segments[:j])]
        keep = [
            t for t in torch.where(data.targets[k])[0].tolist()
            if partner[t] > 0 and not any(spans[t][0] < s.end and spans[t][1] > s.start for s in again)
        ]  # fmt: skip
        if keep:
            rows.append(k)
            mine.append(_mask(len(tokens), keep))
            theirs.append((there, _mask(len(there), [partner[t] for t in keep])))
            banned.append([{i for s in segments if s.end <= spans[t][0] for i in _first(form, anchors[s.term])} for t in keep])
    if not rows:
        raise DataError("no token of the forget records can be given a generic label: their answers hold nothing but terms that occurred before")
    chosen = data.take(rows)
    translation = Texts(tuple(t for t, _ in theirs), tuple(m for _, m in theirs), chosen.ids, chosen.rows, form)
    return Pair(with_targets(chosen, mine), translation, banned)


def _tokens(form: Format, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tokens and their characters, as `Format.encode` has them."""
    found = form.tokenizer(text, add_special_tokens=form.template != "chat", return_offsets_mapping=True)
    tokens, spans, eos = list(found["input_ids"]), list(found["offset_mapping"]), form.tokenizer.eos_token_id
    if form.template != "chat" and eos is not None and (not tokens or tokens[-1] != eos):
        tokens, spans = [*tokens, eos], [*spans, (len(text), len(text))]
    if tokens and spans[-1] == (0, 0) and len(tokens) > 1:
        spans[-1] = (len(text), len(text))
    return torch.tensor(tokens[: form.max_length], dtype=torch.long), spans[: form.max_length]


def _mask(n: int, places: Sequence[int]) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(places)] = True
    return mask


def _first(form: Format, name: str) -> set[int]:
    """Tokens that a name begins with, at the start of a text and after a space."""
    return {form.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (name, f" {name}") if name}
