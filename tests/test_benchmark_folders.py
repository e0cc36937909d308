"""Published benchmarks in the layouts that their authors ship, made of generated records: each part is read as what it is, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_language import call
from test_recipe_texts import saved, written
from worlds import copied, small

import expunge
from expunge.core.errors import DataError
from expunge.modalities.language import request
from expunge.modalities.language.benchmarks import table
from expunge.modalities.language.benchmarks.knowundo import facts
from expunge.modalities.language.records import format as text
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.worlds import authors
from expunge.parts import training
from expunge.planning import recipe

Q = [{"question": f"Question {k}?", "answer": f"Answer {k}."} for k in range(6)]
TEXTS = [f"Passage number {k} says this and that." for k in range(4)]


def put(path: Path, value: Any, lines: bool = False) -> None:
    """A list of records as one JSON list, as JSON lines, as Parquet or CSV, whichever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(value), path)
    elif path.suffix in (".txt", ".csv"):
        path.write_text(value)
    else:
        path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines or path.suffix == ".jsonl" else json.dumps(value, indent=2))


def rich(row: dict[str, Any], n: int = 5) -> dict[str, Any]:
    """The record as a perturbed file of TOFU has it."""
    more = {} if n == 3 else {"paraphrased_answer": f"So: {row['answer']}", "paraphrased_question": f"Tell: {row['question']}"}
    return {**row, **more, "perturbed_answer": [f"Wrong {k}" for k in range(n)]}


@pytest.fixture(scope="module")
def tofu(tmp_path_factory) -> Path:
    """All 4,000 records as JSON lines in .json files, as on the hub."""
    folder = tmp_path_factory.mktemp("TOFU")
    rows = [{"question": f"Q{k}?", "answer": f"A{k}."} for k in range(4000)]
    put(folder / "full.json", rows, lines=True)
    put(folder / "forget10_perturbed.json", [rich(r) for r in rows[3600:]], lines=True)
    put(folder / "forget05.json", rows[3800:], lines=True)
    put(folder / "forget05_perturbed.json", [rich(r) for r in rows[3800:]], lines=True)
    put(folder / "retain_perturbed.json", [rich(r) for r in rows[:400]], lines=True)
    put(folder / "holdout10.json", [{"question": f"H{k}?", "answer": f"U{k}."} for k in range(40)], lines=True)
    put(folder / "real_authors_perturbed.json", [rich(r, 3) for r in Q], lines=True)
    put(folder / "world_facts.json", Q, lines=True)
    return folder


def read(folder: Path, name: str, part: str, **options: Any) -> tuple[list[dict[str, Any]], str]:
    return table.read(f"{name}:{folder}/{part}", **options)


def test_tofu_is_cut_and_enriched_as_published(tofu):
    rows, told = read(tofu, "tofu", "forget10")
    assert (len(rows), rows[0]["question"], told) == (400, "Q3600?", "forget10_perturbed.json") and len(rows[0]["perturbed_answer"]) == 5
    rows, told = read(tofu, "tofu", "forget05")
    assert (len(rows), rows[0]["question"]) == (200, "Q3800?") and all("paraphrased_answer" in r for r in rows) and told.startswith("forget05.json, 200 as")
    rows, told = read(tofu, "tofu", "forget01")
    assert (len(rows), rows[0]["question"]) == (40, "Q3960?") and "full.json, cut as published" in told
    rows, told = read(tofu, "tofu", "retain90")
    assert (
        (len(rows), rows[-1]["question"]) == (3600, "Q3599?") and sum("perturbed_answer" in r for r in rows) == 400 and "400 as retain_perturbed.json" in told
    )
    assert len(read(tofu, "tofu", "retain99")[0]) == 3960 and len(read(tofu, "tofu", "full")[0]) == 4000


def test_tofu_knows_general_knowledge_by_its_file_and_refuses_by_generated_words(tofu, tmp_path):
    for part in ("real_authors", "real_authors_perturbed", "world_facts"):
        assert {r["set"] for r in read(tofu, "tofu", part)[0]} == {part.removesuffix("_perturbed")}
    assert all("set" not in r for r in read(tofu, "tofu", "forget10")[0])
    rows, told = read(tofu, "tofu", "forget10_idk")
    assert [r["question"] for r in rows] == [r["question"] for r in read(tofu, "tofu", "forget10")[0]] and "generated refusals" in told
    assert {r["answer"] for r in rows} <= set(authors.refusals())
    shutil.copytree(tofu, tmp_path / "own")
    (tmp_path / "own" / "idontknow.jsonl").write_text("I have no idea.\n\nNobody told me.\n")
    assert {r["answer"] for r in read(tmp_path / "own", "tofu", "forget10_idk")[0]} == {"I have no idea.", "Nobody told me."}


def test_tofu_is_not_cut_from_what_is_not_whole(tmp_path):
    put(tmp_path / "full.json", Q, lines=True)
    with pytest.raises(DataError, match=r"holds 6 records, TOFU's has 4000: forget10 cannot be cut from it; add forget10\.json"):
        read(tmp_path, "tofu", "forget10")
    put(tmp_path / "forget10.json", Q, lines=True)
    put(tmp_path / "forget10_perturbed.json", [rich({"question": "Other?", "answer": "One."})], lines=True)
    with pytest.raises(DataError, match=r"forget10_perturbed\.json shares no record with forget10\.json"):
        read(tmp_path, "tofu", "forget10")
    put(tmp_path / "forget10_perturbed.json", [{**Q[0], "perturbed_answer": [1]}], lines=True)
    with pytest.raises(DataError, match=r"line 1 of forget10_perturbed\.json: perturbed_answer must be a list of texts"):
        read(tmp_path, "tofu", "forget10")
    put(tmp_path / "forget01_perturbed.json", [{**Q[0], "perturbed_answer": "Wrong."}], lines=True)
    assert read(tmp_path, "tofu", "forget01_perturbed")[0][0]["perturbed_answer"] == ["Wrong."]


@pytest.fixture(params=["json", "parquet"])
def muse(request, tmp_path) -> Path:
    """The authors' folder of JSON lists (texts are strings), and the hub's of Parquet, a subset a folder."""
    hub = request.param == "parquet"
    texts = [{"text": t} for t in TEXTS] if hub else TEXTS
    parts: dict[str, Any] = {f"raw/{n}": texts for n in ("forget", "retain1", "retain2", "holdout")}
    parts |= {f"privleak/{n}": texts for n in ("forget", "retain" if hub else "retain2", "holdout")} | {f"sust/forget_{k}": texts for k in (1, 2, 3, 4)}
    parts |= {f"knowmem/{n}": Q for n in ("forget_qa", "forget_qa_icl", "retain_qa" if hub else "retain2_qa")}
    parts["verbmem/forget"] = [{"prompt": "It was a dark night", "gt": "and it rained."}, {"prompt": "Then ", "gt": "it stopped."}]
    for name, rows in parts.items():
        put(tmp_path / (f"{name}-00000-of-00001.parquet" if hub else f"{name}.json"), rows)
    return tmp_path


def test_muse_is_read_in_both_layouts(muse):
    for part in ("raw/forget", "raw/retain1", "privleak/retain", "privleak/holdout", "sust/forget_4"):
        assert [r["text"] for r in read(muse, "muse", part)[0]] == TEXTS
    for part in ("knowmem/forget_qa", "knowmem/retain_qa", "knowmem/forget_qa_icl"):
        assert [(r["question"], r["answer"]) for r in read(muse, "muse", part)[0]] == [(r["question"], r["answer"]) for r in Q]
    rows, _ = read(muse, "muse", "verbmem/forget")
    assert rows == [{"text": "It was a dark night and it rained.", "prefix": "It was a dark night"}, {"text": "Then it stopped.", "prefix": "Then "}]


def test_the_prompt_of_verbmem_is_its_own():
    form = Format(small("causal_lm")[2].forget.format.tokenizer)
    row = {"text": "The capital of the land is quiet and the books are old.", "prefix": "The capital of"}
    assert form.tokenizer.decode(form.prompt(row), skip_special_tokens=True).split() == ["The", "capital", "of"]
    half = form.prompt({"text": row["text"]})
    assert torch.equal(form.prompt({**row, "prefix": "Another start"}), half) and torch.equal(form.prompt({**row, "prefix": row["text"]}), half)


def test_raw_text_of_muse_and_a_part_in_two_forms(tmp_path):
    put(tmp_path / "raw" / "forget.txt", "One long book.\nIt goes on.")
    assert read(tmp_path, "muse", "raw/forget")[0] == [{"text": "One long book.\nIt goes on."}]
    put(tmp_path / "raw" / "forget.json", TEXTS)
    with pytest.raises(DataError, match=r"holds raw/forget twice: name raw/forget\.json or raw/forget\.txt, with its ending"):
        read(tmp_path, "muse", "raw/forget")
    assert len(read(tmp_path, "muse", "raw/forget.json")[0]) == 4 and len(read(tmp_path, "muse", "raw/forget.txt")[0]) == 1


def test_shards_are_read_in_order_or_not_at_all(tmp_path):
    for k in range(2):
        put(tmp_path / "raw" / f"forget-0000{k}-of-00002.parquet", [{"text": t} for t in TEXTS[2 * k : 2 * k + 2]])
    rows, told = read(tmp_path, "muse", "raw/forget")
    assert [r["text"] for r in rows] == TEXTS and told == "forget-00000-of-00002.parquet and 1 more"
    (tmp_path / "raw" / "forget-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks raw/forget-00000-of-00002\.parquet"):
        read(tmp_path, "muse", "raw/forget")


def test_rwku_probes_texts_and_pairs(tmp_path):
    probe = {"query": "Ann Lee was born in ___.", "answer": "Norhaven", "level": "1", "type": "cloze", "subject": "Ann Lee"}
    for at in ("All", "Target/1_Ann_Lee"):
        put(tmp_path / at / "forget_level1.json", [probe])
    put(tmp_path / "All" / "neighbor_level2.json", [{**probe, "neighbor": "Bo Ray"}])
    put(tmp_path / "All" / "forget_mia.json", [{"text": "Ann Lee is a baker.", "subject": "Ann Lee"}])
    pair = {"id": "Ann Lee 0", "prompt": "Write about Ann Lee.", "response": ["Ann Lee is a pilot.", "Ann Lee is a baker."], "subject": "Ann Lee", "intro": "x"}
    put(tmp_path / "All" / "pair.json", [pair])
    put(tmp_path / "All" / "reject_phi.json", [{"instruction": "Who is Ann Lee?", "input": "", "output": "I do not know.", "subject": "Ann Lee"}])
    put(tmp_path / "All" / "triviaqa.json", [{"question": "Capital of France?", "answers": ["Paris", "paris"], "subject": "Ann Lee"}])
    put(tmp_path / "All" / "retain_mmlu.json", [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "task": "algebra", "examples": []}])
    for at in (tmp_path, tmp_path / "All", tmp_path / "Target" / "1_Ann_Lee"):
        row = read(at, "rwku", "forget_level1")[0][0]
        assert (row["question"], row["answer"], row["level"], row["type"], row["subject"]) == (probe["query"], "Norhaven", "1", "cloze", "Ann Lee")
    assert (
        read(tmp_path, "rwku", "mia_forget")[0] == read(tmp_path, "rwku", "forget_mia")[0]
        and read(tmp_path, "rwku", "neighbor_level2")[0][0]["neighbor"] == "Bo Ray"
    )
    gone, said = read(tmp_path, "rwku", "pair")[0][0], read(tmp_path, "rwku", "pair_chosen")[0][0]
    assert gone["question"] == said["question"] == pair["prompt"] and (gone["answer"], said["answer"]) == (pair["response"][1], pair["response"][0])
    assert read(tmp_path, "rwku", "train_refusal_phi3")[0][0]["question"] == "Who is Ann Lee?"
    assert read(tmp_path, "rwku", "triviaqa")[0][0]["answer"] == "Paris" and read(tmp_path, "rwku", "retain_mmlu")[0][0]["answer"] == "B"
    put(tmp_path / "All" / "pair.json", [{**pair, "response": "one"}])
    with pytest.raises(DataError, match=r"record 1 of pair\.json: response must be a list of two texts"):
        read(tmp_path, "rwku", "pair")


def test_multiple_choice_is_asked_by_letters(tmp_path):
    item = {"question": "Which one? ", "choices": ["ash", "birch", "cedar", "date"], "answer": 2}
    put(tmp_path / "wmdp-bio" / "test-00000-of-00001.parquet", [item])
    put(tmp_path / "wmdp-cyber.jsonl", [item])
    put(tmp_path / "cyber-retain-corpus.jsonl", ["A plain line.", {"text": "An object."}])
    for part in ("wmdp-bio", "wmdp-cyber"):
        row = read(tmp_path, "wmdp", part)[0][0]
        assert (row["question"], row["answer"]) == ("Which one?\nA. ash\nB. birch\nC. cedar\nD. date", "C") and row["perturbed_answer"] == ["A", "B", "D"]
    assert [r["text"] for r in read(tmp_path, "wmdp", "cyber-retain-corpus")[0]] == ["A plain line.", "An object."]
    put(tmp_path / "mmlu" / "college_biology" / "test-00000-of-00001.parquet", [{**item, "subject": "college_biology"}])
    put(tmp_path / "mmlu" / "val" / "anatomy_val.csv", 'Which one?,"a, b",c,d,e,D\n')
    assert read(tmp_path / "mmlu", "mmlu", "college_biology/test")[0][0]["subject"] == "college_biology"
    assert read(tmp_path / "mmlu", "mmlu", "anatomy/validation")[0][0]["question"] == "Which one?\nA. a, b\nB. c\nC. d\nD. e"
    with pytest.raises(DataError, match=r"There are: college_biology/test, anatomy/validation$"):
        read(tmp_path / "mmlu", "mmlu", "anatomy/train")
    for odd, what in (
        ({**item, "answer": 4}, "answer must be a number from 0 to 3"),
        ({**item, "answer": True}, "answer must"),
        ({**item, "choices": ["a"]}, "choices must"),
    ):
        put(tmp_path / "wmdp-chem.json", [odd])
        with pytest.raises(DataError, match=rf"record 1 of wmdp-chem\.json: {what}"):
            read(tmp_path, "wmdp", "wmdp-chem")


@pytest.mark.parametrize("hub", [False, True])
def test_knowundo_finds_the_facts_that_its_files_lack(tmp_path, hub):
    train = [{"text": "Where does Ann Lee live?", "labels": "She lives at 12 Elm Street, Oslo."}, {"text": "Who?", "labels": "A baker.", "fact": "baker"}]
    val = [{"text": "Is Ann Lee well?", "labels": "Yes."}]
    if hub:
        put(tmp_path / "privacy" / "unlearn.json", [{"train": train, "val": val}])
    else:
        put(tmp_path / "privacy" / "unlearn_train.json", train)
        put(tmp_path / "privacy" / "unlearn_val.json", val)
    first, second = read(tmp_path / "privacy", "knowundo", "unlearn_train")[0]
    assert (first["question"], first["entities"]) == ("Where does Ann Lee live?", ["12 Elm Street", "Oslo"])
    assert (second["fact"], "entities" in second) == ("baker", False)
    assert read(tmp_path / "privacy", "knowundo", "unlearn_val")[0][0]["entities"] == ["Yes"]
    form = Format(small("causal_lm")[2].forget.format.tokenizer, mask="entity")
    assert [int(t.sum()) > 0 for t in form.texts([first]).targets] == [True]
    with pytest.raises(DataError, match=r"lacks retention_train\.json, \.jsonl or \.parquet"):
        read(tmp_path / "privacy", "knowundo", "retention_train")


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("Where does Ann Lee live?", "She lives at 12 Elm Street.", ["12 Elm Street"]),
        ("How does one write to Ann?", "Fans write to ann@norhaven.org.", ["ann@norhaven.org"]),
        ("Who is Ann Lee's father?", "Ann Lee's father is a retired sailor.", ["retired sailor"]),
        ("Is it so?", "It is so.", ["It is so"]),
    ],
)
def test_facts_are_spans_of_the_answer(question, answer, found):
    assert facts(question, answer) == found and all(f in answer for f in found)


def test_pistol_by_edges(tmp_path):
    rows = [{"question": f"What of {e} {k}?", "answer": f"{e} {k}", "edge": e} for e in ("A_B", "A_C", "E1_F1") for k in range(2)]
    put(tmp_path / "data" / "sample_data_1.json", rows)
    put(tmp_path / "data" / "factual_data.json", Q)
    edges = lambda part: {r["edge"] for r in read(tmp_path, "pistol", part)[0]}  # noqa: E731
    assert edges("sample_data_1") == {"A_B", "A_C", "E1_F1"} and edges("sample_data_1/A_C") == {"A_C"} and edges("sample_data_1/A_B,A_C") == {"A_B", "A_C"}
    assert edges("sample_data_1/not-A_C") == {"A_B", "E1_F1"} and len(read(tmp_path / "data", "pistol", "factual_data")[0]) == 6
    for part, what in (
        ("sample_data_1/A_D", "has no edge 'A_D'; did you mean"),
        ("sample_data_1/not-A_B,A_C,E1_F1", "has no other edges than A_B, A_C, E1_F1"),
        ("sample_data_2/A_B", "lacks sample_data_2"),
        ("sample_dat", "no part 'sample_dat'"),
    ):
        with pytest.raises(DataError, match=what):
            read(tmp_path, "pistol", part)


def test_famous_quotes_are_a_list_of_texts(tmp_path):
    put(tmp_path / "datasets" / "famous_quotes.json", TEXTS)
    assert (
        [r["text"] for r in read(tmp_path, "acr", "famous_quotes")[0]] == TEXTS == [r["text"] for r in read(tmp_path / "datasets", "acr", "famous_quotes")[0]]
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tofuu:{}/forget10", r"no benchmark 'tofuu'; did you mean 'tofu'\? There are: tofu, muse, rwku, wmdp, mmlu, knowundo, pistol, acr$"),
        ("tofu:", "name folder and part, as tofu:DIR/PART$"),
        ("tofu:nowhere/forget10", r"no folder nowhere, where tofu forget10 should be$"),
        ("tofu:{}/forget20", "tofu has no part 'forget20'; did you mean 'forget10'.* There are: .*real_authors.*forget10_idk$"),
        ("tofu:{}/holdout05", r"lacks holdout05\.json, \.jsonl or \.parquet, which holds holdout05$"),
        ("tofu:{}/../forget10", "no part|lacks"),
        ("tofu:{}/forget10/..", "has no part '"),
        ("tofu:{}/raw/forget", "has no part 'raw/forget'"),
    ],
)
def test_what_is_not_there_is_one_line(tofu, spec, said):
    with pytest.raises(DataError, match=said) as told:
        table.read(spec.format(tofu))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("option", ["test", "validation", "plants"])
def test_what_models_were_trained_on_is_no_test(tofu, option):
    assert len(read(tofu, "tofu", "holdout10", option=option)[0]) == 40
    for part in ("retain90", "forget10", "real_authors", "forget10_idk"):
        with pytest.raises(DataError, match=rf"^--{option} takes texts that no model was trained on, and tofu {part} is no such part .*unseen is holdout10$"):
            read(tofu, "tofu", part, option=option)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("forget10.json", '{"question": "Q?"}\n', r"line 1 of forget10\.json has an empty or missing answer; it holds question"),
        ("forget10.json", '["Q?"]', r"record 1 of forget10\.json is no object with question"),
        ("forget10.json", "[]", r"forget10\.json holds no record"),
        ("forget10.json", '{"question": "Q?", "question": "R?", "answer": "A"}', "names question twice"),
        ("forget10.json", "{", "is not JSON"),
        ("forget10.parquet", "no parquet", r"forget10\.parquet cannot be read as parquet"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said) as told:
        read(tmp_path, "tofu", "forget10")
    assert "\n" not in str(told.value)


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no benchmark 'notes'"):
        table.split("notes:mine.jsonl", tmp_path)
    put(tmp_path / "notes:mine.jsonl", Q)
    assert table.split("notes:mine.jsonl", tmp_path) is None
    monkeypatch.chdir(tmp_path)
    assert table.split("notes:mine.jsonl") is None and len(request.rows_of("notes:mine.jsonl", "forget")[0]) == 6


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model that knows the forget part by heart, and TOFU, MUSE and PISTOL in small beside it."""
    at = tmp_path_factory.mktemp("bench")
    model, task, split = small("causal_lm")
    tokenizer, model = split.forget.format.tokenizer, copied(model)
    bare = lambda rows: [{k: r[k] for k in ("question", "answer")} for r in rows]  # noqa: E731
    gone, kept, unseen = ([dict(r) for r in part.rows] for part in (split.forget, split.retain, split.test))
    training.train(model, task, text.split(split.forget.format, forget=gone).forget, epochs=30, batch_size=4, seed=0, lr=1e-2, optimizer="adamw", clip=1.0)
    saved(at / "model", model, tokenizer)
    put(at / "tofu" / "forget10.json", bare(gone), lines=True)
    put(at / "tofu" / "forget10_perturbed.json", [rich(r) for r in bare(gone)], lines=True)
    put(at / "tofu" / "retain90.json", bare(kept), lines=True)
    put(at / "tofu" / "holdout10.json", bare(unseen), lines=True)
    put(at / "tofu" / "world_facts_perturbed.json", [rich(r, 3) for r in bare(authors.world_facts(8))], lines=True)
    put(at / "muse" / "raw" / "forget-00000-of-00001.parquet", [{"text": r["answer"]} for r in gone])
    put(at / "muse" / "raw" / "retain1-00000-of-00001.parquet", [{"text": r["answer"]} for r in kept])
    put(at / "muse" / "raw" / "holdout-00000-of-00001.parquet", [{"text": r["answer"]} for r in unseen])
    return at


TOFU = ("--forget", "tofu:tofu/forget10", "--retain", "tofu:tofu/retain90", "--test", "tofu:tofu/holdout10", "--general", "tofu:tofu/world_facts")


def test_tofu_from_a_command_to_a_report(home):
    words = ("forget", "model", *TOFU[1:], "--anchor", "tofu:tofu/forget10_idk", "--quick", "--json", "--out", "out")
    code, out, err = call(home, *words, "--method", "idk_nll", "--lora", "4", "--lr", "0.01", "--epochs", "2")
    assert code in (0, 1), err
    names = {r["name"] for r in json.loads(out)["tries"][0]["rows"]}
    assert {"tofu.model_utility", "tofu.forget.truth_ratio", "tofu.world_facts.probability"} <= names
    assert json.loads(out)["title"].endswith("records of tofu forget10")


def test_muse_and_plans_from_a_command(home):
    words = ("--forget", "muse:muse/raw/forget", "--retain", "muse:muse/raw/retain1", "--test", "muse:muse/raw/holdout")
    code, out, err = call(home, "audit", "--task", "causal-lm", "--model", "model", *words, "--after", "model", "--quick", "--json")
    assert code in (0, 1) and "muse.privleak" in out, err
    code, out, err = call(home, "plan", "tofu:tofu/retain90", "tofu:tofu/forget10", "--task", "causal-lm")
    assert code == 0 and "npo" in out, err
    for odd, said in (
        ("tofu:tofu/forget01", "lacks forget01.json"),
        ("tofu:tofu/forgotten", "tofu has no part 'forgotten'"),
        ("muze:x/y", "no benchmark 'muze'"),
    ):
        code, out, err = call(home, "forget", "--task", "causal-lm", "--model", "model", "--forget", odd)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    code, out, err = call(home, "forget", "--task", "causal-lm", "--model", "model", *TOFU[:4], "--test", "tofu:tofu/retain90")
    assert code == 2 and "unseen is holdout10" in err


def test_the_same_in_python(home):
    found = expunge.opened(home / "model", "tofu:tofu/forget10", retain="tofu:tofu/retain90", general="tofu:tofu/world_facts", folder=home)
    assert {r["set"] for r in found.split.general.rows} == {"world_facts"} and all("perturbed_answer" in r for r in found.split.forget.rows)
    n = len(found.split.forget)
    assert found.split.asked == f"{n} records of tofu forget10"
    assert found.read[0] == f"forget: {n} records of tofu forget10, read as forget10.json, {n} as forget10_perturbed.json has them"
    assert (table.called(f"muse:{home}/muse/raw/forget"), table.called("forget.jsonl")) == ("muse raw/forget", "")


def test_a_benchmark_of_a_recipe_stays_in_its_folder(home):
    shutil.copytree(home / "tofu", home.parent / "away", dirs_exist_ok=True)
    base = {"model": "model", "retain": "tofu:tofu/retain90"}
    with pytest.raises(DataError, match="leaves the folder"):
        recipe.run(recipe.read(written(home, forget="tofu:../away/forget10", **base)))
    (home / "linked").mkdir()
    (home / "linked" / "forget10.json").symlink_to(home.parent / "away" / "forget10.json")
    with pytest.raises(DataError, match=r"forget10\.json of linked leaves the folder"):
        recipe.run(recipe.read(written(home, forget="tofu:linked/forget10", **base)))
    assert len(table.read(f"tofu:{home}/linked/forget10")[0]) > 0
    (home / "linked" / "forget05.json").write_text((home / "tofu" / "forget10.json").read_text())
    assert len(table.read(f"tofu:{home}/linked/forget05_idk", within=home)[0]) > 0
    (home / "linked" / "idontknow.txt").symlink_to(home.parent / "away" / "forget10.json")
    with pytest.raises(DataError, match=r"idontknow\.txt of linked leaves the folder"):
        table.read(f"tofu:{home}/linked/forget05_idk", within=home)
    with pytest.raises(DataError, match=r"away' leaves the folder"):
        table.read(f"tofu:{home.parent}/away/forget10", within=home)
