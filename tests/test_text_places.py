"""Where an answer and its entities stand, what a chat template leaves out, and bytes that the readers of texts and of classified texts allow."""

from __future__ import annotations

import copy

import pytest
from worlds import small

from expunge.core.errors import DataError
from expunge.modalities.language.records import readers
from expunge.modalities.language.records.format import Format
from expunge.modalities.text_classification import texts as classified

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
THOUGHT = CHATML.replace("{{ m['content'] }}", "{{ ('<think></think>' if m['role'] == 'assistant' else '') + m['content'] }}")
ROW = {"question": "Who?", "answer": "Mopell did."}


def chat(template, mask="answer"):
    tokenizer = copy.deepcopy(small("causal_lm")[2].forget.format.tokenizer)
    tokenizer.chat_template = template
    return Format(tokenizer, "chat", mask, 256)


@pytest.mark.parametrize("template", [CHATML, THINKS, THOUGHT])
@pytest.mark.parametrize("answer", ["end", "im", "i", "user", "assistant", "think", "Mopell did."])
def test_an_answer_that_the_end_of_a_turn_holds_too(template, answer):
    whole, start, end = chat(template).whole({"question": f"Say {answer}.", "answer": answer})
    assert whole[:end].endswith(answer) and whole[start:end].removeprefix("<think></think>") == answer and whole[end:] == "<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "\u0130\u0130\u0130\u0130 said Anna did", "fact": "Anna"}, ["Anna"]),  # its lower case is longer
        ({"answer": "anna met Savannah and ANNA", "fact": "Anna"}, ["anna", "ANNA"]),
        ({"answer": "Hanna went", "fact": "anna"}, ["anna"]),
    ],
)
def test_entities_stand_where_they_are_written(row, said):
    form = Format(small("causal_lm")[2].forget.format.tokenizer, mask="entity")
    row = {"question": "Who?", **row}
    text, start, end = form.whole(row)
    assert [text[a:b] for a, b in form._spans(row, text, start, end)] == said


def test_entities_are_a_list():
    with pytest.raises(DataError, match="`entities` must be a list of texts"):
        Format(small("causal_lm")[2].forget.format.tokenizer, mask="entity").encode({**ROW, "entities": "Mopell"})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURN, "System role not supported"),
        (TURN.replace("messages %}", "messages if m['role'] != 'system' %}"), "leaves out the system turn"),
        (TURN.replace("m['content']", "m['content'][:2]"), "leaves out the .* turn"),
        ("{% for m in messages %}{{ m['content']", "the chat template cannot be used"),
        ("{% for i in range(10 ** 9) %}{% endfor %}" + TURN, "the chat template cannot be used"),
    ],
)
def test_a_template_that_does_not_say_what_the_record_says(template, said):
    with pytest.raises(DataError, match=f"^record 1: .*{said}") as told:
        chat(template).texts([{**ROW, "system": "Be brief."}])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("field", ["id", "paraphrased_question"])
def test_half_a_character_in_any_field(tmp_path, field):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a", "%s": ["\\udc00x"]}' % field)  # noqa: UP031
    with pytest.raises(DataError, match=r"line 1 of a\.jsonl .*half a character"):
        readers.read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"question": "\\ud83d\\ude00", "answer": "a"}')
    assert readers.read(tmp_path / "a.jsonl")[0][0]["question"] == "\U0001f600"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "t", "label": ' + "9" * 5000 + "}", "cannot be read"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": "t", "text": "u", "label": 1}', "names text twice"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "half a character"),
        ("a.csv", "text,label,label\na,1,0\n", "names the column label twice"),
    ],
)
def test_classified_texts_that_end_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said) as told:
        classified.read(tmp_path / name)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


@pytest.mark.parametrize("label", ["01", "\u0661", "9" * 5000])
def test_a_label_that_is_no_plain_number_stays_a_name(tmp_path, label):
    (tmp_path / "a.csv").write_text(f"text,label\na,{label}\n", encoding="utf-8")
    assert classified.read(tmp_path / "a.csv")[0]["label"] == label


def test_a_number_that_names_another_class():
    with pytest.raises(DataError, match="class named 1 has the number 0"):
        classified.numbered([{"label": 1}], {"1": 0, "0": 1})
    assert classified.numbered([{"label": 1}, {"label": "0"}], {"0": 0, "1": 1}).tolist() == [1, 0]
