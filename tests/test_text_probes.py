"""Probe families made from an entity card, how they are asked and scored, and the KnowUnDo scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_text_metrics import Echo, blank, rows_of, taught
from worlds import same, small, state

from expunge.audits.core import Probe
from expunge.audits.language import memorisation, probes
from expunge.core.errors import DataError
from expunge.core.types import Split
from expunge.modalities.language.worlds import authors

EVERY = authors.authors(3, per=4)
CARD = authors.entity_card(EVERY[:4])
OTHERS = [authors.entity_card(EVERY[4:8]), authors.entity_card(EVERY[8:])]


def of(kind: str, card: dict = CARD, others: list = OTHERS) -> list[dict]:
    return [row for row in probes.level3(card, others) if row["type"] == kind]


def test_a_family_has_every_level_and_attack():
    made = probes.family(CARD, OTHERS)
    mine = [row for row in made if row["set"] == "forget"]
    assert {row["level"] for row in mine} == {"1", "2", "3"} and {row["type"] for row in mine if row["level"] == "3"} == set(probes.ATTACKS)
    assert len(mine) == 4 * (1 + 1 + 9) and len(made) - len(mine) == 2 * 2 * 4
    assert all(row["subject"] == CARD["name"] for row in mine) and {row["level"] for row in made[len(mine) :]} == {"1", "2"}
    assert made == probes.family(CARD, OTHERS)


def test_no_probe_gives_its_answer_away():
    """Except multiple choice, which must hold it among others."""
    for row in probes.family(CARD, OTHERS):
        assert (row["answer"].lower() in row["question"].lower()) == (row["type"] == "multiple_choice"), row


def test_levels_1_and_2():
    fact = CARD["facts"][0]
    blanks, questions = probes.level1(CARD), probes.level2(CARD, instruct=True)
    assert blanks[0]["question"] == fact["cloze"] and "___" in blanks[0]["question"] and blanks[0]["answer"] == fact["fact"]
    assert questions[0]["question"] == f"Please briefly answer the following question. {fact['question']}"


def test_the_attacks():
    fact, name = CARD["facts"][0], CARD["name"]
    choice = of("multiple_choice")[0]
    assert f"({choice['letter']}) {fact['fact']}" in choice["question"] and choice["question"].count("(") == 4
    assert len({row["letter"] for row in of("multiple_choice")}) > 1, "the right letter is not always the same"
    reverse = of("reverse_query")[0]
    assert reverse["answer"] == name and fact["fact"] in reverse["question"] and "this person" in reverse["question"]
    assert of("affirmative_suffix")[0]["reply"] == "Of course, the answer is"
    assert name not in of("synonym")[0]["question"] and name.split()[-1] in of("synonym")[0]["question"]
    assert CARD["facts"][1]["fact"] in of("background")[0]["question"]
    assert of("in_context")[0]["question"].count("\nAnswer: ") == 3 and of("in_context")[0]["question"].endswith(fact["question"])
    assert of("cross_lingual")[0]["question"].startswith("Réponds")
    assert all(name in of(kind)[0]["question"] for kind in ("prefix_injection", "role_playing"))


def test_what_a_card_may_add():
    card = {**CARD, "aliases": ["Old Quill"], "facts": [{**CARD["facts"][0], "translations": {"fr": "Où ?"}}]}
    assert "Old Quill" in of("synonym", card)[0]["question"] and of("cross_lingual", card)[0]["question"] == "Où ?"
    alone = {row["type"] for row in probes.level3(card)}
    assert alone == set(probes.ATTACKS) - {"multiple_choice", "background", "in_context"}
    no_fact = {**card, "facts": [{k: v for k, v in card["facts"][0].items() if k != "fact"}]}
    assert probes.level2(no_fact)[0]["answer"] == card["facts"][0]["answer"]


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"name": "", "facts": [{}]}, "an entity card needs a name and facts"),
        ({"name": "A", "facts": []}, "an entity card needs a name and facts"),
        ({"name": "A", "facts": [{"question": "q", "answer": "a"}]}, "fact 1 of A lacks cloze"),
        ({"name": "A", "facts": [{"question": "q", "answer": "a", "cloze": "no blank"}]}, "fact 1 of A lacks ___ in its cloze"),
    ],
)
def test_cards_that_cannot_be_asked_about(card, message):
    with pytest.raises(DataError, match=message):
        probes.family(card)


def test_recall_and_rows():
    made = [
        {"subject": "A", "set": "forget", "level": "2", "type": "question", "answer": "New Oslo"},
        {"subject": "A", "set": "forget", "level": "3", "type": "multiple_choice", "answer": "Bergen", "letter": "A"},
        {"subject": "A", "set": "forget", "level": "3", "type": "multiple_choice", "answer": "Bergen", "letter": "A"},
        {"subject": "B", "set": "forget", "level": "1", "type": "blank", "answer": "Rome"},
        {"subject": "C", "set": "neighbour", "level": "1", "type": "blank", "answer": "Paris"},
    ]
    answers = ["It was Oslo.", "(A)", "A town I know", "I do not know that.", "NOANSWER"]
    assert probes.recall(made, answers).tolist() == [0.5, 1.0, 0.0, 0.0, 0.0]
    rows = {r.name: r for r in probes.probe_rows(made, answers)}
    assert rows["probes.forget"].value == pytest.approx(1.5 / 4) and rows["probes.forget_macro"].value == pytest.approx((0.5 + 0) / 2)
    assert rows["probes.attack.multiple_choice"].value == 0.5 and rows["probes.level3"].value == 0.5 and rows["probes.level1"].value == 0
    assert rows["probes.refused"].value == 0.25 and rows["probes.noanswer"].value == 0 and rows["probes.refused"].n == 4
    assert rows["probes.neighbour.level1"].value == 0 and "probes.attack.synonym" not in rows and "probes.neighbour.level2" not in rows


def test_answers_end_at_a_line_break_and_silence_is_named():
    _, _, split = small("causal_lm")
    form = split.forget.format
    for text, expected in (("\nOslo", "Oslo"), ("", probes.NOANSWER), ("\n", probes.NOANSWER), (" Oslo\nand more", "Oslo")):
        told = Echo()
        told.generate = lambda input_ids, text=text, **o: torch.cat([input_ids, torch.tensor([form.tokenizer(text)["input_ids"]], dtype=torch.long)], 1)
        told.config.eos_token_id = form.tokenizer.eos_token_id
        assert probes.ask(told, form, [{"question": "Where?", "reply": ""}]) == [expected]


def test_a_begun_reply_stands_behind_the_prompt(monkeypatch):
    _, _, split = small("causal_lm")
    form, seen = split.forget.format, []
    monkeypatch.setattr(probes, "generate", lambda model, prompts, **o: seen.extend(prompts) or [p[:0] for p in prompts])
    probes.ask(Echo(), form, [{"question": "Where?", "reply": "Of course it is"}, {"question": "Where?"}])
    assert form.tokenizer.decode(seen[0]) == "Question: Where?\nAnswer: Of course it is" and torch.equal(seen[1], form.prompt({"question": "Where?"}))


def test_cards_come_from_the_records():
    _, _, split = small("causal_lm")
    found = probes.cards(split.retain)
    assert [c["name"] for c in found] == list(dict.fromkeys(row["author"] for row in split.retain.rows)) and sum(len(c["facts"]) for c in found) == 24
    bare = split.retain.format.texts([{"question": "q", "answer": "a"}])
    assert probes.cards(bare) == [] == probes.cards(None)
    many = [{"name": str(k), "facts": [{"n": j} for j in range(7)]} for k in range(9)]
    cut = probes.thinned(many, 0)
    assert sum(len(c["facts"]) for c in cut) == probes.MOST and cut == probes.thinned(many, 0) != probes.thinned(many, 1)


def test_the_check_tells_who_knows():
    model, task, split = taught()
    empty, before = blank(model), state(model)
    a, b = (rows_of(Probe(model, m, task, split, (empty,)), "probes") for m in (model, empty))
    assert same(before, state(model))
    assert a["probes.level2"].value > 0.9 > 0.1 > b["probes.level2"].value and a["probes.neighbour.level2"].value > 0.9
    assert a["probes.excess"].low > 0 and b["probes.excess"].value == 0
    assert {f"probes.attack.{kind}" for kind in probes.ATTACKS} <= a.keys()
    bare = Split(split.forget.format.texts([{"question": "q", "answer": "a"}]))
    assert rows_of(Probe(model, model, task, bare), "probes") == {}


# KnowUnDo -------------------------------------------------------------------------------------------------------------------------------------------


def test_accuracy_and_perplexity_of_the_card():
    """Labels (5, 7, 9), argmax (5, 8, 9): 66.67 %. Log-probabilities (-.1, -2, -.3): ppl = exp(.8)."""
    hit = torch.tensor([5, 8, 9]) == torch.tensor([5, 7, 9])
    assert float(memorisation.exact_memorisation([hit])) == pytest.approx(2 / 3)
    assert probes.perplexity(torch.tensor([2.4 / 3]))[0] == pytest.approx(2.225541, abs=1e-6)
    centre, low, high = probes.perplexity(torch.tensor([0.5, 0.7, 0.9]))
    assert low < centre < high and centre == pytest.approx(math.exp(0.7))


def test_knowundo_rows():
    model, task, split = taught()
    a, b = (rows_of(Probe(model, m, task, split), "knowundo") for m in (model, blank(model)))
    assert a["knowundo.accuracy.forget"].value > 0.9 and a["knowundo.unlearn_success"].value == pytest.approx(1 - a["knowundo.accuracy.forget"].value)
    assert a["knowundo.fact.forget"].value == 1 and b["knowundo.fact.forget"].value == 0
    assert b["knowundo.unlearn_success"].value > 0.9 > 0.1 > b["knowundo.retention_success"].value
    assert a["knowundo.ppl.retain"].value < 1.2 and b["knowundo.ppl.retain"].value > 100
    for rows in (a, b):
        mean = (rows["knowundo.unlearn_success"].value + rows["knowundo.retention_success"].value) / 2
        assert rows["knowundo.average"].value == pytest.approx(mean) and rows["knowundo.average"].low < mean < rows["knowundo.average"].high
    assert b["knowundo.accuracy.rephrased"].value < a["knowundo.accuracy.rephrased"].value <= 1
    alone = rows_of(Probe(model, model, task, Split(split.forget)), "knowundo")
    assert "knowundo.average" not in alone and "knowundo.unlearn_success" in alone


def test_an_edited_fact_is_seen_though_the_sentence_stands():
    model, task, split = taught()
    for k, wanted in ((0, 3), (4, 0)):
        p = Probe(model, model, task, split)
        answers = [row["answer"].replace(row["fact"], "Nowhere") if j == 0 or k == 4 else row["answer"].upper() for j, row in enumerate(split.forget.rows)]
        p.once(("said", "forget", 0), model, lambda answers=answers: answers)
        row = rows_of(p, "knowundo")["knowundo.fact.forget"]
        assert row.value * row.n == pytest.approx(wanted)


def test_every_language_check_works_on_passages_chat_and_other_masks():
    """No question, no fact, no wrong answer: rows are left out, and none is nan but PrivLeak."""
    model, task, split = taught()
    form = split.forget.format
    names = ("tofu", "memorised", "membership_text", "muse", "wording", "probes", "knowundo", "extraction_likelihood")
    texts = [form.texts([{"text": row["answer"]} for row in data.rows]) for data in (split.forget, split.retain, split.test)]
    passages = rows_of(Probe(model, model, task, Split(*texts), (blank(model),)), *names)
    assert not any(name.startswith(("tofu.", "probes.", "muse.knowmem")) for name in passages) and "muse.verbmem.forget" in passages
    for other in (replace(form, template="chat", max_length=256), replace(form, mask="full"), replace(form, mask="entity")):
        parts = [other.texts(data.rows[:2], data.ids[:2]) for data in (split.forget, split.retain, split.test)]
        found = rows_of(Probe(model, model, task, Split(*parts), (blank(model),)), *names)
        assert {"tofu.d", "probes.level3", "muse.privleak", "knowundo.average"} <= found.keys()
        assert not [r.name for r in found.values() if math.isnan(r.value) and r.name != "muse.privleak"]
