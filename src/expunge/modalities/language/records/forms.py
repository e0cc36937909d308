"""Forms in which people keep texts: each record is recognised as one of them, or refused; no field that stands before an answer is dropped.

    question, answer [, context, system]              context, an empty line, question
    prompt, completion | response [, system]
    instruction, output | response [, input, system]  Alpaca: instruction, an empty line, input; a `text` that holds both is left out
    question, context, answers [, title]              SQuAD: the first of answers["text"]
    messages                                          [{role, content}]: the last assistant turn is the answer, what came before it the prompt
    conversations                                     ShareGPT, [{from, value}]: likewise
    text, labels                                      a prompt and its answer
    text                                              raw text

Out come {"question", "answer"} or {"text"}, with `system` and `history` ([{role, content}], the turns before the question) where there are such, and the
fields of READ as they were. Any other field is refused: what nothing reads may be what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.core.errors import DataError, printable

PROMPTS = ("question", "prompt", "instruction", "messages", "conversations")
ANSWERS = ("answer", "completion", "response", "output", "answers")
BEFORE = {"question": "context", "prompt": "", "instruction": "input"}
"""Field of a prompt -> the one that belongs to it."""
EMPTY = ("system", "context", "input", "text", "labels")
"""Fields that mean nothing where they are empty."""
READ = (
    "id", "fact", "entities", "entity", "author", "subject", "topic", "set", "relation", "level", "type", "cloze", "anchors", "record", "tool", "prefix",
    "perturbed_answer", "paraphrased_question", "paraphrased_answer",
)  # fmt: skip
"""Fields beside the texts that checks and methods read."""
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


def recognised(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """(the record, the form that it was read as in words). Raises DataError that begins with `where`, for a field that nothing reads, too."""
    found, told = _formed(row, where)
    texts = ("question", "answer", "system", "history") if "question" in found else ("text",)
    if told.endswith("-> answers"):
        texts += ("title",)
    elif told.startswith("instruction") and all(part in str(row.get("text")) for part in (row["instruction"], found["answer"])):
        found.pop("text")  # prompt and answer once more, as one text
    if odd := [n for n in found if n not in (*READ, *texts)]:
        names = printable(",".join(odd))
        raise DataError(f"{where} has what nothing reads, {names}: --ignore {names} leaves it out, --id-column {printable(odd[0])} makes it the records' names")
    return found, told


TURNS = ("last", "all")
"""Which assistant turns of a conversation are answers."""


def turned(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A conversation as a record for each of its assistant turns, each with the turns before it; names count on, x#1, x#2."""
    spoken = [*row.get("history", ()), {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    rest = {k: v for k, v in row.items() if k != "history"}
    out = []
    for k in range(1, len(spoken), 2):
        name = {"id": f"{row['id']}#{(k + 1) // 2}"} if "id" in row and len(spoken) > 2 else {}
        said = {"question": spoken[k - 1]["content"], "answer": spoken[k]["content"]}
        out.append({**rest, **said, **name, **({"history": spoken[: k - 1]} if k > 1 else {})})
    return out


def family(told: str) -> str:
    """The form without what may or may not stand before a question: context + question -> answer is question -> answer."""
    return told.replace("context + ", "").replace(" + input", "")


def _formed(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    if "history" in row:
        raise DataError(f"{where} has a field history; write the turns before the question as messages")
    for name in ("system", *filter(None, BEFORE.values())):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise DataError(f"{where} holds {name} as {type(row[name]).__name__}; it must be a text")
        _whole(row.get(name) or "", name, where)
    prompts, answers = [[n for n in names if row.get(n) is not None] for names in (PROMPTS, ANSWERS)]
    for names, what in ((prompts, "prompt"), (answers, "answer")):
        if len(names) > 1:
            raise DataError(f"{where} holds {' and '.join(names)}: which is the {what}? leave the others out (--ignore)")
    if not prompts and not answers and row.get("text") is not None:
        if row.get("labels") is not None:
            return _pair(row, "text", "labels", where), "text -> labels"
        return {**_rest(row), "text": _said(row, "text", where)}, "raw text"
    if prompts and prompts[0] in ("messages", "conversations"):
        if answers:
            raise DataError(f"{where} holds {prompts[0]} and {answers[0]}: which is the answer? leave the other out (--ignore)")
        return _turns(row, prompts[0], where), f"{prompts[0]} -> the last assistant turn"
    prompt, answer = (prompts or ["question"])[0], (answers or ["answer"])[0]
    found, more = _pair(row, prompt, answer, where), BEFORE[prompt]
    odd = next((n for n in set(BEFORE.values()) - {more, ""} if isinstance(row.get(n), str) and row[n].strip()), "")
    if odd:
        raise DataError(f"{where} holds {odd} beside {prompt}, which no known form has: put it into {prompt}, or take it out")
    told = f"{prompt} -> {answer}"
    if isinstance(row.get(more), str) and row[more].strip():
        parts = [found["question"], row[more]] if more == "input" else [row[more], found["question"]]
        found["question"], told = "\n\n".join(parts), f"{' + '.join((prompt, more) if more == 'input' else (more, prompt))} -> {answer}"
        found.pop(more)
    return found, told


def _said(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if name == "answers":
        value = value.get("text") if isinstance(value, Mapping) else value
        value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} has an empty or missing {name}; a record holds question and answer, or text")
    return _whole(value, name, where)


def _whole(value: str, name: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} has half a character (a lone surrogate) in {name}") from None
    return value


def _pair(row: Mapping[str, Any], prompt: str, answer: str, where: str) -> dict[str, Any]:
    said = {"question": _said(row, prompt, where), "answer": _said(row, answer, where)}
    return {**_rest(row, prompt, answer), **said}


def _rest(row: Mapping[str, Any], *read: str) -> dict[str, Any]:
    """The other fields, but for those that are not there: null, or an empty text."""
    return {k: v for k, v in row.items() if k not in read and v is not None and not (isinstance(v, str) and not v.strip() and k in EMPTY)}


def _turns(row: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    who, what = ("role", "content") if name == "messages" else ("from", "value")
    turns = []
    for number, turn in enumerate(row[name] if isinstance(row[name], list) else [], 1):
        role = ROLES.get(str(turn.get(who)), "") if isinstance(turn, Mapping) else ""
        if not role:
            said = printable(str(turn.get(who) if isinstance(turn, Mapping) else turn))[:40]
            raise DataError(f"{where}: turn {number} of {name} is by '{said}', which is none of {', '.join(ROLES)}")
        content = turn.get(what)
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where}: turn {number} of {name} has no text")
        turns.append({"role": role, "content": _whole(content, name, where)})
    system = [t["content"] for t in turns if t["role"] == "system"]
    spoken = [t for t in turns if t["role"] != "system"]
    if [t["role"] for t in spoken] != ["user", "assistant"] * (len(spoken) // 2) or not spoken or len(system) > 1 or (system and turns[0]["role"] != "system"):
        raise DataError(f"{where}: {name} must be user and assistant in turns, the assistant last, after one system turn at most")
    if system and row.get("system"):
        raise DataError(f"{where} has a system turn and a field system: take one out")
    found = {**_rest(row, name), "question": spoken[-2]["content"], "answer": spoken[-1]["content"]}
    return {**found, **({"system": system[0]} if system else {}), **({"history": spoken[:-2]} if len(spoken) > 2 else {})}
