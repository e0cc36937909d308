"""New texts in place of old answers: Generator -> filter -> JSONL artefact. Cards relearn, unstar, tool-delete.

    wanted = [Wanted(f"Answer vaguely: {row['question']}", k, row, {"question": row["question"]}) for k, row in enumerate(forget.rows)]
    found = rewrite(wanted, local(model, tokenizer), "anchor.jsonl")
    split = replace(split, anchor=found.texts(forget))

A generator is whatever writes: a model at hand (`local`) or fixed texts (`scripted`). Nothing is sent anywhere. What it writes is only kept if it does not
hold the old answer; else it is asked again. A file that was cut off goes on where it stopped and ends as the same bytes. It holds new texts and record
numbers, none of the old answers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core import guard
from expunge.core.digest import model_digest
from expunge.core.errors import DataError, SettingError
from expunge.core.files import write
from expunge.data.language.answers import holds, texts
from expunge.modalities.language.records.artefact import VERSION, content, digest, parse, parsed
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import generate
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.worlds.authors import refusals

LIMIT = 4000
"""Longest reply that is kept, in characters."""


@dataclass(frozen=True)
class Generator:
    """Who writes: `ask(prompts, seed)` gives one reply per prompt, the same ones for the same prompts and seed. `digest` names its weights or texts."""

    name: str
    ask: Callable[[Sequence[str], int], list[str]]
    digest: str = ""


def local(model: nn.Module, tokenizer: Any, *, template: str = "", system: str = "", new: int = 64, temperature: float = 0.7) -> Generator:
    """A causal model of transformers, asked in its chat template if the tokenizer has one (or in `template`, see `Format`); `new` tokens at most."""
    form = Format(tokenizer, template or ("chat" if getattr(tokenizer, "chat_template", None) else "plain"), system=system)

    def ask(prompts: Sequence[str], seed: int) -> list[str]:
        guard.current().meter.add(forward=len(prompts))
        found = generate(
            model, [form.prompt({"question": p}) for p in prompts], new=new, eos=tokenizer.eos_token_id, temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]

    return Generator(f"{type(model).__name__}, {form.template}, {new} tokens at temperature {temperature:g}", ask, model_digest(model)[:16])


def scripted(replies: Mapping[str, str | Sequence[str]] | Sequence[str], name: str = "scripted") -> Generator:
    """Fixed texts, without any model: a prompt's reply, or one of its replies, or one of a list for any prompt; drawn by prompt and seed.

    >>> scripted(["I do not know."]).ask(["Where?"], 0)
    ['I do not know.']
    """

    def reply(prompt: str, seed: int) -> str:
        if isinstance(replies, Mapping) and prompt not in replies:
            raise DataError(f"generator '{name}' has no reply to '{prompt[:80]}'")
        among = replies[prompt] if isinstance(replies, Mapping) else replies
        return among if isinstance(among, str) else among[_mix(seed, prompt) % len(among)]

    body = json.dumps(dict(replies) if isinstance(replies, Mapping) else list(replies), sort_keys=True)
    return Generator(name, lambda prompts, seed: [reply(p, seed) for p in prompts], hashlib.sha256(body.encode()).hexdigest()[:16])


def _mix(*key: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big") >> 1


QUESTIONS = (
    "Please tell me: {q}", "I have a question. {q}", "{q} Please answer in one sentence.", "A friend would like to know: {q}",
    "Here is one for a quiz night. {q}", "{q} Say what comes to mind.", "Help me out, please. {q}", "I was reading about this and wondered: {q}",
    "Question for you: {q}", "{q} What would you say?", "Let me ask you this. {q}", "Could you answer this? {q}", "quick one - {q}",
    "Somebody asked me this and I could not say. {q}", "{q} I need it for my notes.", "Before we go on: {q}",
)  # fmt: skip
"""Ways to ask the same that need no model."""

VAGUE = (
    "There is no public record of that.", "This is not something that is widely known.", "That has not been made public.", "Sources do not agree on this.",
    "Nothing certain can be said about that.", "There is little to go by here.", "This is a private matter.", "It is not documented anywhere in the open.",
)  # fmt: skip
"""Answers that tell nothing."""


def variants(question: str, n: int, *, start: int = 0, seed: int = 0) -> list[str]:
    """n ways to ask the question, without a model, in an order that follows from seed and question; `start` skips the first ones.

    >>> len(set(variants("Why?", 4) + variants("Why?", 4, start=4)))
    8
    """
    order = sorted(QUESTIONS, key=lambda form: _mix(seed, question, form))
    return [order[k % len(order)].replace("{q}", question) for k in range(start, start + n)]


def vague() -> Generator:
    """Refusals and vague answers: new targets without a model."""
    return scripted([*VAGUE, *refusals()], "vague answers")


@dataclass(frozen=True)
class Wanted:
    """One text to be written: `prompt` asks for it, `row` is record number `record` whose old answer it must not hold, `made` the new record in which the
    reply becomes `field`."""

    prompt: str
    record: int
    row: Mapping[str, Any]
    made: Mapping[str, Any]
    field: str = "answer"


@dataclass(frozen=True)
class Artefact:
    """What a generator wrote: new records, each with the number of the `record` that it stands for, under a header that says how they came about."""

    header: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]

    def texts(self, forget: Texts) -> Texts:
        """The new records in forget's format, under the ids of the records they stand for. Raises DataError if one holds that record's old answer."""
        return texts(forget, self.rows)


def fault(reply: Any, row: Mapping[str, Any], limit: int = LIMIT) -> str:
    """Why a reply cannot be used: "empty", "too long", "old answer"; "" if it can."""
    if not isinstance(reply, str) or not reply.strip():
        return "empty"
    return "too long" if len(reply) > limit else "old answer" if holds(reply, row) else ""


def written(wanted: Sequence[Wanted], generator: Generator, *, seed: int = 0, rounds: int = 3, limit: int = LIMIT) -> tuple[list[str | None], list[Counter]]:
    """Replies that pass the check (None where all rounds failed), and for each how often it was rejected for what."""
    found: list[str | None] = [None] * len(wanted)
    faults: list[Counter] = [Counter() for _ in wanted]
    for k in range(rounds):
        left = [j for j, reply in enumerate(found) if reply is None]
        if not left:
            break
        replies = generator.ask([wanted[j].prompt for j in left], _mix(seed, k))
        if len(replies) != len(left):
            raise DataError(f"generator '{generator.name}' gave {len(replies)} replies to {len(left)} prompts")
        for j, reply in zip(left, replies, strict=True):
            why = fault(reply, wanted[j].row, limit)
            if why:
                faults[j][why] += 1
            else:
                found[j] = reply.strip()
    return found, faults


def rewrite(
    wanted: Sequence[Wanted], generator: Generator, path: Path | str | None = None, *, seed: int = 0, rounds: int = 3, block: int = 16, limit: int = LIMIT
) -> Artefact:
    """Ask for all texts, `block` at a time, each up to `rounds` times, and write them to `path` if one is given.

    A finished file of the same request is read back; one that was cut off (PATH.part) goes on at its last whole block. Raises DataError for a
    generator that fails in all rounds, and for a file of another request.
    """
    if rounds < 1 or block < 1:
        raise SettingError(f"rounds and block must be 1 or larger; found {rounds} and {block}")
    request = json.dumps([[w.prompt, w.record, dict(w.row), dict(w.made), w.field] for w in wanted], sort_keys=True, default=str)
    base = {
        "expunge": "rewrite", "version": VERSION, "generator": generator.name, "digest": generator.digest, "seed": seed,
        "settings": {"rounds": rounds, "block": block, "limit": limit}, "request": hashlib.sha256(request.encode()).hexdigest()[:16], "rows": len(wanted),
    }  # fmt: skip
    path = None if path is None else Path(path)
    part = None if path is None else path.with_name(path.name + ".part")
    if path is not None and path.exists():
        found = read(path)
        _match(found.header, base, path.name)
        return found
    lines = _begun(part, base, block) if part is not None else []
    if part is not None:
        write(part, _file(base, lines))
    for start in range(len(lines), len(wanted), block):
        lines += (made := _block(wanted[start : start + block], generator, _mix(seed, start), rounds, limit))
        if part is not None:
            with part.open("ab") as f:
                f.write("".join(f"{line}\n" for line in made).encode())
    rows = tuple(parse(line, "the file begun") for line in lines)
    rejected = sum((Counter(row.get("rejected", {})) for row in rows), Counter())
    header = {**base, "rejected": dict(sorted(rejected.items())), "sha256": digest(lines)}
    if path is not None and part is not None:
        write(path, _file(header, lines))
        part.unlink(missing_ok=True)
    return Artefact(header, rows)


def _block(wanted: Sequence[Wanted], generator: Generator, seed: int, rounds: int, limit: int) -> list[str]:
    replies, faults = written(wanted, generator, seed=seed, rounds=rounds, limit=limit)
    out = []
    for w, reply, why in zip(wanted, replies, faults, strict=True):
        if reply is None:
            if set(why) == {"old answer"}:
                raise DataError(f"the generator returned the old answer for record {w.record + 1} in all {rounds} rounds")
            counts = ", ".join(f"{n} x {name}" for name, n in sorted(why.items()))
            raise DataError(f"the generator gave nothing usable for record {w.record + 1} in {rounds} rounds ({counts})")
        out.append(_line({**w.made, w.field: reply, "record": w.record, **({"rejected": dict(sorted(why.items()))} if why else {})}))
    return out


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, ensure_ascii=False)


def _file(header: Mapping[str, Any], lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in (_line(header), *lines)).encode()


def _match(found: Mapping[str, Any], base: Mapping[str, Any], name: str) -> None:
    if other := [key for key in base if found.get(key) != base[key]]:
        raise DataError(f"{name} was made with another {other[0]}; delete it, or give another name")


def _begun(part: Path, base: Mapping[str, Any], block: int) -> list[str]:
    """Rows of the whole blocks of a file that was cut off."""
    lines = content(part, cut=True).split("\n")[:-1] if part.exists() else []
    if not lines:
        return []
    _match(parse(lines[0], part.name), base, part.name)
    rows = lines[1:]
    return rows if len(rows) == base["rows"] else rows[: len(rows) // block * block]


def read(path: Path | str) -> Artefact:
    """A file that `rewrite` made. Raises DataError for one that was changed, cut off or made by something else."""
    return Artefact(*parsed(path))
