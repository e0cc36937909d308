"""Text records and how they become tokens: JSONL files, question-answer and chat formats, raw text in windows.

A record is {"question", "answer", ...} or {"text", ...}. Which tokens are trained is found from character offsets in the whole text, never
from the length of the tokenised prompt, since a tokenizer may merge the end of the prompt with the start of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import DataError, printable, suggest
from expunge.core.types import Split
from expunge.modalities.language.records.bounded import bounded
from expunge.modalities.language.texts import Texts

CUT = "goes on"
"""Field of a window of raw text that is not its last: no end follows it."""

STAND_IN = "\ue000"
"""Stands for the answer where its end is looked for: a character that no template writes."""

MASKS = ("answer+eos", "answer", "full", "entity")
PLAIN = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Format:
    """How records become tokens.

    tokenizer    a fast tokenizer of transformers
    template     "plain" (Question: ... Answer: ...), "chat" (the tokenizer's chat template) or a text of one's own that holds {question}; the answer
                 follows it after one space
    mask         what is trained and scored: "answer+eos" (the end-of-turn token too), "answer", "full" (prompt too), or "entity" (tokens of the
                 record's `fact`, or of its `entities`, where they stand in the answer)
    max_length   in tokens; longer answers are cut there, a prompt that leaves no room for one is refused
    system       system message of the chat template
    """

    tokenizer: Any
    template: str = "plain"
    mask: str = "answer+eos"
    max_length: int = 512
    system: str = ""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(f"max_length must be 2 or larger, not {self.max_length}")
        if self.mask not in MASKS:
            raise DataError(suggest("no mask", self.mask, MASKS))
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError("the tokenizer gives no character offsets: a fast tokenizer (tokenizer.json) is needed")
        if self.template not in ("plain", "chat") and "{question}" not in self.template:
            raise DataError(f"template must be plain, chat or a text with {{question}} in it, not '{self.template}'")
        if self.template == "chat" and not getattr(self.tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template; use template='plain' or one of your own")

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """What stands before the answer."""
        if "question" not in row:
            return ""
        if self.template == "chat":
            return self._rendered(self._messages(row), asking=True)
        if row.get("history") or row.get("system"):
            raise DataError(f"it has {'earlier turns' if row.get('history') else 'a system prompt'}, which only a chat template can hold: template='chat'")
        return (PLAIN if self.template == "plain" else self.template).replace("{question}", str(row["question"]))

    def prompt(self, row: Mapping[str, Any]) -> Tensor:
        """(T,) tokens of the prompt alone, for generation; for a text its `prefix`, if it begins with that and goes on, else its first half."""
        if "question" not in row:
            tokens, before = self.encode(row)[0], str(row.get("prefix") or "")
            ends = [b for _, b in self._cut([str(row["text"])])[0][1]] if before and str(row["text"]).startswith(before) else []
            own = sum(b <= len(before) for b in ends)
            return tokens[: own if 0 < own < min(len(tokens), len(ends)) else max(1, len(tokens) // 2)]
        found = self.tokenizer(self.prompt_text(row), add_special_tokens=self.template != "chat")["input_ids"]
        return torch.tensor(found[:-1] if found and self._ends(found[-1]) and len(found) > 1 else found, dtype=torch.long)

    def encode(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """((T,) tokens, (T,) bool targets) of one record. Raises DataError when no token is left to train."""
        return self._marked(row, *(whole := self.whole(row)), *self._cut([whole[0]])[0])

    def _cut(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Tokens and their places in each text."""
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=self.template != "chat", return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _marked(self, row: Mapping[str, Any], text: str, start: int, end: int, tokens: list[int], offsets: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a record whose whole text was cut into these tokens at these places."""
        whole = len(tokens)
        eos = self.tokenizer.eos_token_id
        goes_on = bool(row.get(CUT))
        if goes_on and tokens and tokens[-1] == eos and offsets[-1][0] == offsets[-1][1]:
            tokens, offsets = tokens[:-1], offsets[:-1]
        if self.template != "chat" and not goes_on and eos is not None and (not tokens or tokens[-1] != eos):
            tokens, offsets = [*tokens, eos], [*offsets, (len(text), len(text))]
        spans = self._spans(row, text, start, end)
        kept = [any(a < e and b > s for s, e in spans) for a, b in offsets]
        if self.mask in ("answer+eos", "full") and not goes_on:
            after = [k for k, (token, (a, b)) in enumerate(zip(tokens, offsets, strict=True)) if k and a >= end and (a == b or self._ends(token))]
            marker = end + len(text[end:].rstrip())
            if marker > end and (not after or offsets[after[0]][0] >= marker):  # the template ends a turn by ordinary tokens
                kept = [k or (a < marker and b > end) for k, (a, b) in zip(kept, offsets, strict=True)]
            elif after:
                kept[after[0]] = True
        kept[:1] = [False]
        tokens, kept = tokens[: self.max_length], kept[: self.max_length]
        if not any(kept):
            raise DataError(f"no token to train within max_length={self.max_length} of {whole}: the prompt is too long, or the answer empty")
        return torch.tensor(tokens, dtype=torch.long), torch.tensor(kept)

    def texts(self, rows: Sequence[Mapping[str, Any]], ids: Tensor | None = None) -> Texts:
        """All records as Texts, cut into tokens in one call. Raises DataError naming the record that cannot be used, counted from 1."""
        wholes = numbered(self.whole, rows)
        pairs = numbered(lambda row, whole, cut: self._marked(row, *whole, *cut), rows, wholes, self._cut([w[0] for w in wholes]))
        ids = torch.arange(len(rows)) if ids is None else ids
        return Texts(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), ids, tuple(dict(r) for r in rows), self)

    def answered(self, data: Texts, answers: Sequence[str]) -> Texts:
        """The same questions with other answers, row by row."""
        return self.texts([{**row, "answer": answer} for row, answer in zip(data.rows, answers, strict=True)], data.ids)

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        said = str(row.get("system") or self.system)
        system = [{"role": "system", "content": said}] if said else []
        return [*system, *row.get("history", ()), {"role": "user", "content": str(row["question"])}]

    def whole(self, row: Mapping[str, Any]) -> tuple[str, int, int]:
        """The whole text, and where its answer starts and ends."""
        if "question" not in row:
            text = str(row["text"])
            return text, 0, len(text)
        answer = str(row["answer"]).strip()
        if not answer:
            raise DataError("the answer is empty")
        if self.template != "chat":
            prompt = self.prompt_text(row)
            return f"{prompt} {answer}", len(prompt), len(prompt) + 1 + len(answer)
        before, prompt = self._messages(row), self.prompt_text(row)
        whole, tail = (self._rendered([*before, {"role": "assistant", "content": said}]) for said in (answer, STAND_IN))
        start = whole.rfind(answer, 0, len(whole) - len(tail.rpartition(STAND_IN)[2]))
        if start < 0:
            raise DataError("the chat template changes the answer; use a template of your own")
        return whole, len(prompt) if whole.startswith(prompt) else start, start + len(answer)

    def _rendered(self, messages: list[dict[str, str]], *, asking: bool = False) -> str:
        """The messages through the chat template. Raises DataError for a template that fails, or that leaves out what a system or user turn says."""
        from jinja2 import TemplateError

        try:
            found = bounded(lambda: self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            said = printable(" ".join(str(error).split()))[:200]
            raise DataError(f"the chat template cannot be used: {said}; use a template of your own") from None
        for turn in messages:
            if turn["role"] != "assistant" and turn["content"].strip() not in found:
                raise DataError(f"the chat template leaves out the {turn['role']} turn, or changes it; use a template of your own")
        return found

    def _spans(self, row: Mapping[str, Any], text: str, start: int, end: int) -> list[tuple[int, int]]:
        if self.mask == "full":
            return [(0, end)]
        if self.mask != "entity" or "question" not in row:
            return [(start, end)]
        if isinstance(row.get("entities"), str):
            raise DataError("`entities` must be a list of texts")
        words = [str(w) for w in (row.get("entities") or [row.get("fact", "")]) if w]
        found = [m.span() for w in words for m in mentions(w, text, start, end)]
        if not found:
            raise DataError("mask 'entity' needs a `fact` or `entities` that stand in the answer")
        return found

    def _ends(self, token: int) -> bool:
        return token in set(self.tokenizer.all_special_ids) or token == self.tokenizer.eos_token_id


def mentions(word: str, text: str, start: int, end: int) -> list[re.Match[str]]:
    """Where the word stands in text[start:end], in any case: by itself where it does so anywhere, else inside of others (as in Chinese)."""
    by_itself = rf"(?<!\w){re.escape(word)}(?!\w)"
    return next((f for form in (by_itself, re.escape(word)) if (f := list(re.compile(form, re.IGNORECASE).finditer(text, start, end)))), [])


def numbered(make: Callable, *columns: Sequence) -> list:
    """make(*values) of each record; a DataError names it, counted from 1."""
    found = []
    for number, values in enumerate(zip(*columns, strict=True), 1):
        try:
            found.append(make(*values))
        except DataError as error:
            raise DataError(f"record {number}: {error}") from None
    return found


def windows(text: str, tokenizer: Any, length: int, *, least: int = 5) -> list[str]:
    """Raw text cut into pieces of at most `length` tokens at token borders; a last piece below `least` tokens is left out."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    pieces = [offsets[k : k + length] for k in range(0, len(offsets), length)]
    return [text[p[0][0] : p[-1][1]] for p in pieces if len(p) >= least]


def normal(row: Mapping[str, Any]) -> str:
    """The record's words in lower case, by which records of two files are compared."""
    turns = [*(t["content"] for t in row.get("history", ())), *(row.get(k, "") for k in ("system", "question", "answer", "text"))]
    return " ".join(" ".join(map(str, turns)).lower().split())


def split(form: Format, **parts: Sequence[Mapping[str, Any]] | None) -> Split:
    """Split of records: forget=[...], retain=[...], test=[...], validation=[...], anchor=[...], general=[...], plants=[...]. Ids count on in that
    order.

    Raises DataError naming a record of forget that also stands in retain, test, validation or plants (in any case and spacing).
    """
    gone = {normal(row): number for number, row in enumerate(parts.get("forget") or (), 1)}
    found: dict[str, Any] = {}
    start = 0
    for name in ("forget", "retain", "test", "validation", "anchor", "general", "plants"):
        rows = parts.get(name)
        if rows is None:
            continue
        if name not in ("forget", "anchor"):
            for number, row in enumerate(rows, 1):
                if normal(row) in gone:
                    raise DataError(f"record {gone[normal(row)]} of forget also stands in {name} (record {number}); remove it from one of the two")
        try:
            found[name] = form.texts(rows, torch.arange(start, start + len(rows)))
        except DataError as error:
            raise DataError(f"{name}, {error}") from None
        start += len(rows)
    return Split(**found)
