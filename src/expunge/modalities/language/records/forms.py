"""Forms in which people keep texts: each record is recognised as one of them, or refused; no field that stands before an answer is dropped.

    question, answer [, context, system]              context, an empty line, question
    prompt, completion | response [, system]
    instruction, output | response [, input, system]  Alpaca: instruction, an empty line, input
    question, context, answers                        SQuAD: the first of answers["text"]
    messages                                          [{role, content}]: the last assistant turn is the answer, what came before it the prompt
    conversations                                     ShareGPT, [{from, value}]: likewise
    text, labels                                      a prompt and its answer
    text                                              raw text

Out come {"question", "answer"} or {"text"}, with `system` and `history` ([{role, content}], the turns before the question) where there are such, and all
other fields as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.core.errors import DataError, printable

PROMPTS = ("question", "prompt", "instruction", "messages", "conversations")
ANSWERS = ("answer", "completion", "response", "output", "answers")
BEFORE = {"question": "context", "prompt": "", "instruction": "input"}
"""Field of a prompt -> the one that belongs to it."""
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


def recognised(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """(the record, the form that it was read as in words). Raises DataError that begins with `where`."""
    if "history" in row:
        raise DataError(f"{where} has a field history; write the turns before the question as messages")
    for name in ("system", *filter(None, BEFORE.values())):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise DataError(f"{where} holds {name} as {type(row[name]).__name__}; it must be a text")
        _whole(row.get(name) or "", name, where)
    prompts, answers = [[n for n in names if row.get(n) is not None] for names in (PROMPTS, ANSWERS)]
    for names, what in ((prompts, "prompt"), (answers, "answer")):
        if len(names) > 1:
            raise DataError(f"{where} holds {' and '.join(names)}: which is the {what}? take the others out")
    if not prompts and not answers and row.get("text") is not None:
        if row.get("labels") is not None:
            return _pair(row, "text", "labels", where), "text -> labels"
        return {**row, "text": _said(row, "text", where)}, "raw text"
    if prompts and prompts[0] in ("messages", "conversations"):
        if answers:
            raise DataError(f"{where} holds {prompts[0]} and {answers[0]}: which is the answer? take the other out")
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
    return {**{k: v for k, v in row.items() if k not in (prompt, answer)}, **said}


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
    rest = {k: v for k, v in row.items() if k != name}
    found = {**rest, "question": spoken[-2]["content"], "answer": spoken[-1]["content"]}
    return {**found, **({"system": system[0]} if system else {}), **({"history": spoken[:-2]} if len(spoken) > 2 else {})}
