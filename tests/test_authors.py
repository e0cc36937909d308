"""Generated language data: schema, determinism, wrong answers that are wrong, facts that stand where they are said to stand."""

from __future__ import annotations

import json
import re

import pytest

from expunge.core.errors import DataError
from expunge.modalities.language.worlds import authors as made
from expunge.modalities.language.worlds.authors import RELATIONS, articles, authors, entity_card, general, refusals, skills, world_facts

KEYS = ["question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer", "relation", "fact", "cloze", "author", "set"]
SHORT = [k for k in KEYS if not k.startswith("paraphrased")]
SETS = [authors(64, 12, seed=s) for s in range(3)] + [world_facts(80, s) for s in range(3)] + [general(144, s) for s in range(3)]


def words(value) -> set[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return set().union(*map(words, value)) if isinstance(value, list) else set(re.findall(r"\w+|[^\w\s]", str(value)))


def test_author_k_owns_rows_k_times_per_and_every_field_is_there():
    rows = authors(5, per=7)
    assert len(rows) == 35
    for k in range(5):
        own = rows[7 * k : 7 * k + 7]
        assert len({r["author"] for r in own}) == 1
        assert [r["relation"] for r in own] == [r.name for r in RELATIONS[:7]]
    assert all(list(r) == KEYS and r["set"] == "retain" and len(set(r["perturbed_answer"])) == 5 for r in rows)
    assert len(RELATIONS) >= 12 and len({r.name for r in RELATIONS}) == len(RELATIONS)


@pytest.mark.parametrize(("make", "name"), [(world_facts, "world_facts"), (general, "real_authors")])
def test_knowledge_sets_have_the_same_schema_without_paraphrase(make, name):
    rows = make()
    assert len(rows) == 24 and all(list(r) == SHORT and r["set"] == name and len(set(r["perturbed_answer"])) == 3 for r in rows)
    for row in rows:
        assert all(p.split(" ")[0] == row["answer"].split(" ")[0] or row["answer"].startswith(row["fact"]) for p in row["perturbed_answer"]), row


@pytest.mark.parametrize("rows", SETS)
def test_the_fact_stands_once_in_answer_and_paraphrase_and_in_no_question_nor_wrong_answer(rows):
    for row in rows:
        fact = row["fact"].lower()
        for key in ("answer", "paraphrased_answer"):
            assert key not in row or (row[key].count(row["fact"]) == 1 and row[key].lower().count(fact) == 1), (key, row)
        assert fact not in (row["question"] + row.get("paraphrased_question", "") + row["cloze"]).lower()
        assert row["cloze"].count("___") == 1
        form = row.get("paraphrased_answer", row["answer"])
        for wrong in row["perturbed_answer"]:
            assert fact not in wrong.lower() and wrong != form
            assert wrong.startswith(form.split(row["fact"])[0]) and wrong.endswith(form.split(row["fact"])[1])  # same sentence, another fact


@pytest.mark.parametrize("rows", SETS[:3])
def test_three_different_sentences_and_two_different_questions(rows):
    for row in rows:
        told = {row["answer"], row["paraphrased_answer"], row["cloze"].replace("___", row["fact"])}
        assert len(told) == 3 and row["question"] != row["paraphrased_question"]


@pytest.mark.parametrize("rows", SETS)
def test_questions_are_distinct(rows):
    asked = [r[k] for r in rows for k in ("question", "paraphrased_question") if k in r]
    assert len(set(asked)) == len(asked)


def test_same_seed_same_bytes_and_another_seed_other_people():
    for make in (authors, world_facts, general):
        assert json.dumps(make(8, seed=4)) == json.dumps(make(8, seed=4))
        assert json.dumps(make(8, seed=4)) != json.dumps(make(8, seed=5))
    one, two = ({r["author"] for r in authors(40, seed=s)} for s in (0, 1))
    assert len(one & two) <= 2
    assert json.dumps(skills(3)) == json.dumps(skills(3)) != json.dumps(skills(4))


def test_an_author_is_the_same_whatever_n_and_per():
    many = authors(20, per=12)
    assert authors(3, per=12) == many[:36]
    assert authors(20, per=4) == [r for k, r in enumerate(many) if k % 12 < 4]


def test_the_canon_is_the_same_for_every_seed_and_no_generated_author():
    facts = [{(r["author"], r["relation"], r["fact"]) for r in general(144, s)} for s in range(3)]
    assert facts[0] == facts[1] == facts[2] and len(facts[0]) == 144
    assert not {a for a, *_ in facts[0]} & {r["author"] for r in authors(4096, per=1)}


@pytest.mark.parametrize("n", [40, 4096])
def test_names_are_distinct(n):
    names = [r["author"] for r in authors(n, per=1)]
    assert len(set(names)) == n


def test_first_books_are_shared_by_no_two_authors():
    assert len({r["fact"] for r in authors(324, per=4)[3::4]}) == 324


def test_facts_spread_over_their_values_so_that_guessing_does_not_pay():
    rows = authors(120, per=12)
    for k, relation in enumerate(RELATIONS):
        found = [r["fact"] for r in rows[k::12]]
        assert set(found) <= set(relation.values)
        assert max(found.count(f) for f in found) / len(found) < 0.25, relation.name


def test_vocabulary_is_small_and_shared_by_the_seeds():
    small = words(authors(40))
    everything = small | words(world_facts()) | words(general()) | words(refusals()) | words(articles(authors(40))) | words(skills())
    assert len(small) < 400 and len(everything) < 600
    assert len(words(authors(400, per=12, seed=9))) < 500
    assert len(words(authors(40, seed=1)) - small) < 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: authors(5000), "authors needs n in 0..4096 and per in 1..12, not n=5000, per=10"),
        (lambda: authors(2, per=13), "authors needs n in 0..4096 and per in 1..12, not n=2, per=13"),
        (lambda: world_facts(81), "world_facts holds 0..80 records, not 81"),
        (lambda: general(-1), "general holds 0..144 records, not -1"),
        (lambda: skills(per=0), "skills has 1..24 demos per tool, not 0"),
        (lambda: entity_card(authors(2)), "an entity card is about one author; found 2"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(DataError) as error:
        call()
    assert str(error.value) == message
    assert authors(0) == []


def test_refusals_are_distinct_and_hold_no_fact():
    said = refusals()
    assert len(set(said)) == len(said) == 25 and all(s.endswith(".") for s in said)
    facts = {v.lower() for r in RELATIONS for v in r.values}
    assert not facts & set(" ".join(said).lower().replace(".", "").split())


def test_an_article_tells_every_fact_of_its_author_and_of_no_other():
    rows = authors(6)
    told = articles(rows)
    assert [a["author"] for a in told] == [rows[10 * k]["author"] for k in range(6)]
    for k, passage in enumerate(told):
        assert all(r["fact"] in passage["text"] for r in rows[10 * k : 10 * k + 10]) and "___" not in passage["text"]
        assert not any(r["author"] in passage["text"] for r in rows if r["author"] != passage["author"])
    assert articles(rows, 1) != told == articles(rows, 0)
    assert all(r["fact"] in p["text"] for p in articles(world_facts(8)) for r in world_facts(8) if r["author"] == p["author"])  # no paraphrase needed


def test_a_card_names_the_facts_and_the_neighbours_who_share_most_of_them():
    rows = authors(30)
    card = entity_card(rows[:10], rows)
    assert card["name"] == rows[0]["author"] and [f["fact"] for f in card["facts"]] == [r["fact"] for r in rows[:10]]
    assert list(card["facts"][0]) == ["relation", "question", "answer", "cloze", "fact"]
    mine = {(r["relation"], r["fact"]) for r in rows[:10]}
    shared = {n: sum((r["relation"], r["fact"]) in mine for r in rows if r["author"] == n) for n in {r["author"] for r in rows[10:]}}
    assert set(card["neighbours"]) == {n for n, count in shared.items() if count}
    counts = [shared[n] for n in card["neighbours"]]
    assert counts == sorted(counts, reverse=True) and counts
    assert entity_card(rows[:10])["neighbours"] == []


def test_a_demonstration_holds_its_call_and_the_tool_free_answers_hold_none():
    found = skills(0, per=8)
    assert len(found["tools"]) == len(made.TOOLS) and len({t["name"] for t in found["tools"]}) == len(found["tools"])
    for tool in found["tools"]:
        assert tool["doc"].startswith(tool["name"] + "(") and len(tool["demos"]) == 8
        for demo in tool["demos"]:
            assert demo["call"] in demo["answer"] and re.fullmatch(rf'{tool["name"]}\(\w+="{re.escape(demo["fact"])}"\)', demo["call"])
            assert demo["fact"] in demo["question"] and tool["name"] not in demo["plain"] and "(" not in demo["plain"]
    asked = [d["question"] for t in found["tools"] for d in t["demos"]]
    assert len(set(asked)) == len(asked)
    assert not any("(" in row["answer"] for row in found["plain"])
