"""Texts as people keep them: every field before an answer is read, or the record is refused; bytes that JSON allows are read as they are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from worlds import small

from expunge.core.errors import DataError
from expunge.modalities.language.records import readers
from expunge.modalities.language.records.format import CUT, Format, split
from expunge.modalities.language.records.forms import recognised
from expunge.modalities.language.request import pieces

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' over\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
TURNS = [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hi."), ("user", "Who wrote it?"), ("assistant", "Mopell did.")]
MESSAGES = [{"role": r, "content": c} for r, c in TURNS]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c} for r, c in TURNS]


@pytest.fixture(scope="module")
def tokenizer():
    found = copy.deepcopy(small("causal_lm")[2].forget.format.tokenizer)
    found.chat_template = CHAT
    return found


@pytest.mark.parametrize(
    ("row", "question", "answer", "form"),
    [
        ({"question": "q", "answer": "a", "id": "x7"}, "q", "a", "question -> answer"),
        ({"prompt": "q", "completion": "a"}, "q", "a", "prompt -> completion"),
        ({"instruction": "Add.", "input": "1 + 1", "output": "2", "text": "Below: Add. 1 + 1 ### 2"}, "Add.\n\n1 + 1", "2", "instruction + input -> output"),
        ({"instruction": "Add.", "input": "", "output": "2"}, "Add.", "2", "instruction -> output"),
        (
            {"context": "c", "question": "q", "title": "t", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
            "c\n\nq",
            "a",
            "context + question -> answers",
        ),
        ({"text": "q", "labels": "a"}, "q", "a", "text -> labels"),
    ],
)
def test_every_field_before_the_answer_is_read(row, question, answer, form):
    found, told = recognised(row, "line 1")
    assert (found["question"], found["answer"], told) == (question, answer, form) and found.get("id") == row.get("id")


@pytest.mark.parametrize(("name", "turns"), [("messages", MESSAGES), ("conversations", SHARED)])
def test_turns_are_kept_as_they_were(name, turns, tokenizer):
    row, _ = recognised({name: turns}, "line 1")
    assert (row["system"], row["question"], row["answer"]) == ("Be brief.", "Who wrote it?", "Mopell did.")
    form = Format(tokenizer, "chat", max_length=256)
    whole, start, end = form.whole(row)
    assert whole == tokenizer.apply_chat_template(MESSAGES, tokenize=False) and whole[start:end].strip() == "Mopell did."
    with pytest.raises(DataError, match="earlier turns, which only a chat template can hold"):
        Format(tokenizer).texts([row])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "a", "response": "b"}, "answer and response: which is the answer"),
        ({"prompt": "q", "instruction": "p", "output": "a"}, "prompt and instruction: which is the prompt"),
        ({"prompt": "q", "input": "more", "completion": "a"}, "input beside prompt"),
        ({"messages": MESSAGES, "answer": "a"}, "messages and answer"),
        ({"messages": MESSAGES[:-1]}, "the assistant last"),
        ({"messages": [{"role": "tool", "content": "x"}, *MESSAGES]}, "turn 1 of messages is by 'tool'"),
        ({"question": "q", "answers": {"text": []}}, "missing answers"),
        ({"question": "q\ud800", "answer": "a"}, "half a character"),
        ({"question": "q", "answer": "a", "system": ["be"]}, "system as list"),
        ({"question": "q", "answer": "a", "context": ["c"]}, "context as list"),
        ({"question": "q", "answer": "a", "history": "abc"}, "field history"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(row, said):
    with pytest.raises(DataError, match=r"^line 9") as told:
        recognised(row, "line 9")
    assert said in str(told.value) and "\n" not in str(told.value)


def test_bytes_that_json_allows(tmp_path):
    odd = "a\u2028b\u2029c\u0085d"
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps({"question": odd, "answer": k}, ensure_ascii=False) for k in ("x", "y")).encode()
    )
    assert [r["question"] for r in readers.read_jsonl(tmp_path / "a.jsonl")] == [odd, odd]
    (tmp_path / "raw.txt").write_text("A text.\nTwo lines.")
    assert readers.read(tmp_path / "raw.txt")[:2] == ([{"text": "A text.\nTwo lines."}], "raw text")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "q", "answer": "a", "answer": "b"}', "names answer twice"),
        ('{"question": "q", "answer": "a", "x": NaN}', "NaN, which is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"question": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"question": "\\ud800", "answer": "a"}', "half a"),
    ],
)
def test_bytes_that_end_in_one_line(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=said) as told:
        readers.read_jsonl(tmp_path / "a.jsonl")
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


def test_records_that_differ_before_the_question_are_no_leak(tokenizer):
    form = Format(tokenizer, "chat", max_length=256)
    forget, retain = (recognised({"messages": [{"role": "system", "content": c}, *MESSAGES[3:]]}, "")[0] for c in ("You are A.", "You are B."))
    assert len(split(form, forget=[forget], retain=[retain]).retain) == 1
    with pytest.raises(DataError, match="also stands in retain"):
        split(form, forget=[forget], retain=[forget])


def test_an_end_of_turn_of_ordinary_tokens_is_trained(tokenizer):
    form = Format(tokenizer, "chat", max_length=256)
    row = {"question": "Who?", "answer": "Mopell did."}
    tokens, kept = form.encode(row)
    assert tokenizer.decode(tokens[kept]).replace(" ", "").endswith("did.over")
    tokens, kept = Format(tokenizer, "chat", "answer", 256).encode(row)
    assert tokenizer.decode(tokens[kept]).endswith("did.")


def test_a_text_ends_once(tokenizer):
    form = Format(tokenizer, max_length=12)
    text = "The harbour of Norgate is quiet in winter and the boats are few and old. " * 3
    rows = pieces([{"text": text}], form)
    data = form.texts(rows)
    ends = [int((t[k] == tokenizer.eos_token_id).sum()) for t, k in zip(data.tokens, data.targets, strict=True)]
    assert len(rows) > 2 and ends == [0] * (len(rows) - 1) + [0 if rows[-1].get(CUT) else 1]


def test_every_mention_of_an_entity_is_trained(tokenizer):
    row = {"question": "Who?", "answer": "Mopell did, said Mopell.", "fact": "Mopell"}
    tokens, kept = Format(tokenizer, mask="entity").encode(row)
    assert tokenizer.decode(tokens[kept]).count("Mopell") == 2 and isinstance(kept, torch.Tensor)
