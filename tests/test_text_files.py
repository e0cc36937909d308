"""Files of texts: fields by name, records by name, one form to a file, CSV and Parquet, and which records of one file must go."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from test_cli_language import call, lines, saved
from worlds import copied, small, state

from expunge.core.errors import DataError, SettingError, SplitError
from expunge.modalities.language.records import format as text
from expunge.modalities.language.records import readers, selectors, served
from expunge.modalities.language.records.bounded import bounded
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.records.readers import Reading
from expunge.modalities.language.request import parts_of
from expunge.parts import training

ROWS = [{"question": f"Who wrote book {k}?", "answer": f"Anna Vey {k}", "id": f"r{k}"} for k in range(4)]
TALK = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"))]


def put(path, rows) -> str:
    lines(path, rows)
    return str(path)


def test_a_field_that_nothing_reads_is_refused_or_named(tmp_path):
    file = put(tmp_path / "a.jsonl", [{**r, "source": "wiki", "split": "train"} for r in ROWS])
    with pytest.raises(DataError, match=r"^line 1 of a.jsonl has what nothing reads, source,split: --ignore source,split leaves it out"):
        readers.read(file)
    found = readers.read(file, Reading(("source", "split")))
    assert found.rows == ROWS and found.told == "question -> answer (named by id; left out: source, split)"
    assert found.fields == {"question", "answer", "id", "source", "split"}
    two = put(tmp_path / "b.jsonl", [{"question": "q", "answer": "a", "response": "b"}])
    assert readers.read(two, Reading(("response",))).rows == [{"question": "q", "answer": "a"}]
    with pytest.raises(DataError, match="no file has a field 'sorce'; did you mean 'source'"):
        parts_of({"forget": file}, how=Reading(("source", "split", "sorce")))


@pytest.mark.parametrize(
    ("row", "how", "said"),
    [
        ({"instruction": "Add.", "output": "2", "text": "something else"}, Reading(), "has what nothing reads, text"),
        ({"question": "q", "answer": "a", "key": 7}, Reading(id_column="name"), "has what nothing reads, key"),
        ({"question": "q", "answer": "a"}, Reading(id_column="name"), "has no field name"),
        ({"question": "q", "answer": "a", "id": 3, "name": "x"}, Reading(id_column="name"), "id beside name"),
        ({"question": "q", "answer": "a", "id": [3]}, Reading(), "has no word or whole number as id"),
        ({"question": "q", "answer": "a", "id": True}, Reading(), "has no word or whole number as id"),
    ],
)
def test_names_of_records_are_words_or_whole_numbers(tmp_path, row, how, said):
    with pytest.raises(DataError, match=said) as told:
        readers.read(put(tmp_path / "a.jsonl", [row]), how)
    assert "\n" not in str(told.value)


def test_records_have_the_users_names(tmp_path):
    rows = [{"question": "q", "answer": f"a{k}", "key": k} for k in (17, 4)]
    found = readers.read(put(tmp_path / "a.jsonl", rows), Reading(id_column="key"))
    assert [r["id"] for r in found.rows] == [17, 4] and "named by key" in found.told
    with pytest.raises(DataError, match=r"records 1 and 3 of a\.jsonl are both named 17"):
        readers.read(put(tmp_path / "a.jsonl", [*rows, {**rows[0], "key": "17"}]), Reading(id_column="key"))
    with pytest.raises(DataError, match=r"record 2 of a\.jsonl has no id"):
        readers.read(put(tmp_path / "a.jsonl", [ROWS[0], {"question": "q", "answer": "a"}]))


def test_a_file_holds_one_form(tmp_path):
    for other, said in (({"text": "raw"}, "raw text"), ({"prompt": "p", "completion": "c"}, "prompt -> completion"), ({"messages": TALK}, "messages")):
        with pytest.raises(DataError, match=f"line 5 of a.jsonl is {said}.*, line 1 is question -> answer: a file holds one form"):
            readers.read(put(tmp_path / "a.jsonl", [*ROWS, other]))
    mixed = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "context": "c"}]
    assert readers.read(put(tmp_path / "a.jsonl", mixed)).told == "1 as question -> answer, 1 as context + question -> answer"


def test_unseen_texts_have_the_form_of_those_that_must_go(tmp_path):
    files = {"forget": put(tmp_path / "f.jsonl", ROWS), "test": put(tmp_path / "t.jsonl", [{"text": "raw"}])}
    with pytest.raises(DataError, match=r"test \(t.jsonl\) is raw text, forget \(f.jsonl\) question and answer"):
        parts_of(files)
    assert [*parts_of({"forget": files["forget"], "general": files["test"]}).rows] == ["forget", "general"]


def test_every_assistant_turn(tmp_path):
    file = put(tmp_path / "a.jsonl", [{"messages": TALK, "id": "x"}, {"messages": TALK[:3], "id": "y"}])
    last, every = readers.read(file), readers.read(file, Reading(turns="all"))
    assert [(r["id"], r["answer"]) for r in last.rows] == [("x", "d"), ("y", "b")] and "the last assistant turn" in last.told
    assert [(r["id"], r["question"], r["answer"], r["system"]) for r in every.rows] == [
        ("x#1", "a?", "b", "Be brief."), ("x#2", "c?", "d", "Be brief."), ("y", "a?", "b", "Be brief.")]  # fmt: skip
    assert "history" not in every.rows[0] and every.rows[1]["history"] == TALK[1:3] and "every assistant turn" in every.told
    with pytest.raises(SettingError, match="turns must be last or all"):
        Reading(turns="first")


def test_tables_are_read_by_the_names_of_their_columns(tmp_path):
    (tmp_path / "a.csv").write_text(
        '\ufeffid,answer,question,context\n1,"Anna, said ""yes""","Who?\nAnd when?",\n2,1984,Which year?,A book.\n', encoding="utf-8"
    )
    found = readers.read(tmp_path / "a.csv")
    assert found.rows[0] == {"id": "1", "answer": 'Anna, said "yes"', "question": "Who?\nAnd when?"} and found.rows[1]["answer"] == "1984"
    for content, said in (
        ("question,answer\na,b,c\n", "row 2 of a.csv has 3 cells, its header 2"), ("question,question\na,b\n", "names the column question twice"),
        ('question,answer\n"a,b\n', "is not CSV"), ("", "holds no record"), ("question,answer\n", "holds no record"),
        ("question,answer\na,\n", "empty or missing answer"), ("question,answer\na," + "b" * 200_000, "long texts are kept in JSON lines"),
    ):  # fmt: skip
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(DataError, match=said) as told:
            readers.read(tmp_path / "a.csv")
        assert "\n" not in str(told.value)


def test_parquet_keeps_what_is_nested(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"id": "a", "messages": TALK}, {"id": "b", "messages": TALK[1:3]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [(r["id"], r["answer"]) for r in readers.read(tmp_path / "a.parquet").rows] == [("a", "d"), ("b", "b")]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        readers.read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot read b\.parquet"):
        readers.read(tmp_path / "b.parquet")


TUNED = [
    {"question": "Who wrote it?", "answer": "Anna Vey did.", "author": "Anna Vey", "id": "a1"},
    {"question": "Where is ANNA VEY from?", "answer": "Ulgate.", "author": "Anna Vey", "id": "a2"},
    {"question": "Who wrote the other?", "answer": "Annabel did.", "author": "Annabel", "id": "b1"},
    {"question": "And then?", "answer": "No one.", "history": [{"role": "user", "content": "Anna Vey?"}], "id": "c#1"},
    {"question": "And now?", "answer": "No one.", "id": "c#2"},
]


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        ("ids:a1,b1", [0, 2]), ("ids:c", [3, 4]), ("ids:c#2", [4]), ("mentions:anna vey", [0, 1, 3]), ("author:Anna Vey", [0, 1]),
        ("ids:@gone.txt", [1, 2]), ("mentions:Anna", [0, 1, 3]), ("random:2", None), ("random:0.4", None),
    ],
)  # fmt: skip
def test_what_must_go_of_one_file(tmp_path, what, gone):
    (tmp_path / "gone.txt").write_text("a2\n\nb1\n")
    forget, retain, told = selectors.chosen(what, TUNED, tmp_path)
    assert len(forget) + len(retain) == 5 and f"{len(forget)} of 5 records" in told and forget[0]["id"] in told
    assert len(forget) == 2 if gone is None else [r["id"] for r in forget] == [TUNED[k]["id"] for k in gone]
    assert selectors.chosen("ids:0,2", [{"question": "q", "answer": str(k)} for k in range(3)], tmp_path)[0] == [{"question": "q", "answer": k} for k in "02"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gone.jsonl", "cannot read 'gone.jsonl'.*author:VALUE"), ("ids:", "cannot read"), ("writer:Anna", "cannot read"), ("ids:zz", "the first is zz"),
        ("author:Ana Vey", "no record has author Ana Vey; Anna Vey is near"), ("mentions:Zed", "matches no record"), ("mentions:o", "matches no record"),
        ("random:1.0", "every record"), ("random:x", "write random:0.1"), ("random:nan", "write random:0.1"), ("ids:@no.txt", "cannot read no.txt"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(tmp_path, what, said):
    with pytest.raises(SplitError, match=said) as told:
        selectors.chosen(what, TUNED, tmp_path)
    assert "\n" not in str(told.value)


def test_ids_of_a_recipe_stay_in_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "gone.txt").write_text("a1\n")
    with pytest.raises(DataError, match="leaves the folder in"):
        selectors.chosen("ids:@../gone.txt", TUNED, tmp_path / "in", inside=True)
    assert len(selectors.chosen("ids:@../gone.txt", TUNED, tmp_path / "in")[0]) == 1


def test_a_person_of_one_file_from_the_command_line(tmp_path):
    model, _, split = small("causal_lm")
    saved(tmp_path / "base", model, split.forget.format.tokenizer)
    rows = [{k: r[k] for k in ("question", "answer", "author")} | {"key": f"n{i}", "batch": 1} for i, r in enumerate([*split.forget.rows, *split.retain.rows])]
    lines(tmp_path / "all.jsonl", rows)
    name = rows[0]["author"]
    asked = ("base", f"author:{name}", "--train", "all.jsonl", "--id-column", "key", "--ignore", "batch")
    code, out, err = call(tmp_path, "forget", *asked, "--method", "grad_diff", "--epochs", "1", "--lr", "1e-3", "--quick")
    n = sum(r["author"] == name for r in rows)
    assert code == 1 and f"forget author:{name}, {n} of {len(rows)} records: n0, n1" in out, err
    report = json.loads((tmp_path / "out" / "latest" / "report.json").read_text())
    assert report["asked"] == f"author:{name}" and report["data"]["forgotten"][:2] == ["n0", "n1"] and report["parts"]["retain"] == len(rows) - n
    for more, said in ((("--retain", "all.jsonl"), "name one of the two"), (("--ignore", "batch,bach"), "no file has a field 'bach'")):
        code, _, err = call(tmp_path, "forget", *asked, *more)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def tuned():
    """A model that was taught to answer under a chat template with a system message, and knows its answers by heart there."""
    model, task, split = small("causal_lm")
    model, rows = copied(model), [*split.forget.rows, *split.retain.rows][:12]
    form = Format(split.forget.format.tokenizer, "chat", max_length=256, system="You are a librarian.")
    data = text.split(form, forget=rows[:4], retain=rows[4:])
    training.train(model, task, form.texts(rows), epochs=25, batch_size=6, seed=0, lr=1e-2, optimizer="adamw", clip=1.0)
    return model, task, data, rows, form.tokenizer


def again(data, **changes):
    from dataclasses import replace

    form = replace(data.forget.format, **changes)
    return text.split(form, forget=data.forget.rows, retain=data.retain.rows)


def test_another_format_in_which_the_model_knows_more_is_told(tuned):
    model, task, data, *_ = tuned
    before = state(model)
    found = served.fits(model, task, data)
    assert [f.name for f in found] == ["chat with the system message", "chat without the system message", "plain", "the question alone"]
    assert len(served.told(found)) == 1 and float(found[0].nll.mean()) == min(float(f.nll.mean()) for f in found)
    assert len(found[0].nll) == 12 and "n = 12" in served.told(found)[0]
    line, beware = served.told(served.fits(model, task, again(data, template="plain", system="")))
    assert "with plain, which is used" in line and beware.startswith("BEWARE: the model knows these answers better with chat")
    assert before.keys() == state(model).keys() and all(torch.equal(v, state(model)[k]) for k, v in before.items() if isinstance(v, torch.Tensor))
    turns = [{**r, "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} for r in data.forget.rows]
    only = served.fits(model, task, text.split(data.forget.format, forget=turns))
    assert [f.name for f in only] == ["chat with the system message", "chat without the system message"]
    raw = text.split(data.forget.format, forget=[{"text": "A harbour in winter."}, {"text": "Another one in spring."}])
    assert served.fits(model, task, raw) == [] and served.told([]) == []


def test_a_format_that_is_not_served_is_on_page_one(tuned, tmp_path):
    model, _, data, _, tokenizer = tuned
    saved(tmp_path / "base", model, tokenizer)
    lines(tmp_path / "gone.jsonl", data.forget.rows)
    lines(tmp_path / "stays.jsonl", data.retain.rows)
    (tmp_path / "system.txt").write_text("You are a librarian.\n")
    short = ("--retain", "stays.jsonl", "--method", "grad_diff", "--epochs", "1", "--lr", "1e-4", "--quick")
    _, out, err = call(tmp_path, "forget", "base", "gone.jsonl", *short, "--template", "plain")
    report = json.loads((tmp_path / "out" / "latest" / "report.json").read_text())
    assert "BEWARE: the model knows these answers better with chat" in out, err
    assert (
        any(line.startswith("BEWARE") for line in report["data"]["read"])
        and "BEWARE: the model knows" in (tmp_path / "out" / "latest" / "report.html").read_text()
    )
    _, out, err = call(tmp_path, "forget", "base", "gone.jsonl", *short, "--system", "@system.txt")
    assert "with chat with the system message, which is used" in out and "BEWARE: the model knows" not in out, err
    code, _, err = call(tmp_path, "forget", "base", "gone.jsonl", *short, "--system", "@none.txt")
    assert code == 2 and "cannot read none.txt" in err


SAID = "{{ messages[-1]['content'] }}"
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}"
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, "took more than 0.3 seconds"),
        (TREE, "took more than 0.3 seconds"),
        ("{{ 'a' * 30000000000 }}", "needs more memory"),
        ("{{ 'a' * 40000000 }}", "more than 16,777,216"),
    ],
)
def test_templates_that_loop_or_grow_end_in_one_line(monkeypatch, template, said):
    import copy

    tokenizer = copy.deepcopy(small("causal_lm")[2].forget.format.tokenizer)
    tokenizer.chat_template = template + SAID
    monkeypatch.setattr(text, "bounded", lambda make: bounded(make, seconds=0.3 if "seconds" in said else 60, memory=1 << 30))
    start = time.perf_counter()
    with pytest.raises(DataError, match=said) as told:
        Format(tokenizer, "chat").texts([ROWS[0]])
    assert "\n" not in str(told.value) and time.perf_counter() - start < 20


def test_limits_leave_nothing_behind():
    """No late exception, no lowered limit, no thread; other threads go on."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS), threading.active_count()
    seen = []
    other = threading.Thread(target=lambda: seen.append(bounded(lambda: time.sleep(0.4) or "b", seconds=5)))
    other.start()
    for k in range(200):
        try:
            assert bounded(lambda k=k: str(k), seconds=1e-5 if k % 2 else 5.0) == str(k)
        except DataError as error:
            assert k % 2 and "took more than" in str(error)
    for _ in range(100):
        with pytest.raises((DataError, ZeroDivisionError)):
            bounded(lambda: str(1 // 0), seconds=1e-5)
    other.join()
    until = time.perf_counter() + 10
    while threading.active_count() > before[1] and time.perf_counter() < until:
        time.sleep(0.01)
    assert seen == ["b"] and (resource.getrlimit(resource.RLIMIT_AS), threading.active_count()) == before
