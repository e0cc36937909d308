"""The benchmark's splits, cells and table."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from worlds import original, retrained, trained

from expunge.bench import run, table
from expunge.core.errors import DataError, SettingError
from expunge.modalities.worlds import World, world


def test_forget_and_retain_are_the_training_set():
    w = world("digits")
    for scenario in ("class", "random"):
        split = w.split(scenario)
        split.check()
        ids = torch.cat([split.forget.ids, split.retain.ids]).sort().values
        assert torch.equal(ids, w.train.ids.sort().values)
        assert torch.equal(split.forget.ids, w.split(scenario).forget.ids)


def test_worlds_say_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="set EXPUNGE_DATA"):
        world("mnist")
    with pytest.raises(SettingError, match="did you mean 'digits'"):
        world("digit")


@pytest.fixture
def kept():
    """The cache that holds digits' original and four retrained models."""
    original("digits")
    for k in range(4):
        retrained("digits", "class", k)
    return trained()


def test_bench_runs_and_goes_on(tmp_path, kept):
    """Cells are written as they are done; a second call runs nothing new; the table ranks."""
    kwargs = {"methods": ["gradient_ascent"], "seeds": 1, "scenarios": ("class",), "out": tmp_path, "cache": kept}
    cells = run.bench("digits", **kwargs)
    every = ["nothing", "fine_tune", "reset_last", "retrain", "gradient_ascent"]  # the baselines stand in every table
    assert [c["method"] for c in cells] == every
    lines = (tmp_path / "digits.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == every
    run.bench("digits", **kwargs)
    assert (tmp_path / "digits.jsonl").read_text().splitlines() == lines
    rows = table.by_name(next(c for c in cells if c["method"] == "retrain"))
    assert 0.9 < rows["gap_closed.klom"]["value"] < 1.1  # one more retrained model, read against three others
    last = next(c for c in cells if c["method"] == "reset_last")
    assert last["settings"]["k"] == 1 and last["settings"]["reset"]
    text = (tmp_path / "digits.md").read_text()
    assert "| gradient_ascent |" in text
    assert "floor" in text


@pytest.mark.slow
def test_changed_settings_run_again(tmp_path, kept, monkeypatch):
    kwargs = {"methods": ["gradient_ascent"], "seeds": [0], "scenarios": ("class",), "out": tmp_path, "cache": kept, "references": 2}
    run.bench("digits", **kwargs)
    monkeypatch.setitem(run.PRESETS, "digits", {"gradient_ascent": {"epochs": 1.0}})
    cell = next(c for c in run.bench("digits", **kwargs) if c["method"] == "gradient_ascent")
    assert cell["settings"]["epochs"] == 1.0
    assert len((tmp_path / "digits.jsonl").read_text().splitlines()) == 6


def _cell(method: str, gap: float | None, far: float = 2.0, seed: int = 0) -> dict:
    def row(name, value):
        return {"name": name, "value": value, "low": value, "high": value, "n": 10}

    rows = [row("klom_before.forget", far), row("klom_floor.forget", 0.5)] + ([] if gap is None else [row("gap_closed.klom", gap)])
    return {
        "world": "w", "scenario": "random", "method": method, "seed": seed, "outcome": "ok", "share": 0.1, "references": 3, "date": "d", "machine": "m",
        "rows": rows,
    }  # fmt: skip


def test_drawings_train_no_references(tmp_path, monkeypatch):
    """Their checks read none; `all` stands beside labels of variants."""
    seen = []

    def cell(w, scenario, method, seed, original, refs, *_):
        seen.append((method, len(refs)))
        return {**_cell(method, None, seed=seed), "scenario": scenario, "settings": run.settings(w, method)}

    monkeypatch.setattr(World, "_model", lambda *_: nn.Identity())
    monkeypatch.setattr(run, "run_cell", cell)
    run.bench("text2digit", ["all", "esd+retain"], 1, out=tmp_path, cache=tmp_path)
    assert {n for _, n in seen} == {0} and {"uce", "esd", "esd+retain", "retrain", "nothing"} <= {m for m, _ in seen}
    assert not {"scrub", "fine_tune", "adapt_then_unlearn"} & {m for m, _ in seen}
    seen.clear()
    run.bench("digits", "scrub", 1, ("class",), out=tmp_path, cache=tmp_path)
    assert set(seen) == {(m, 3) for m in ("nothing", "fine_tune", "reset_last", "retrain", "scrub")}


def test_cpu_seconds_have_a_column_where_they_were_measured():
    cells = [{**_cell("uce", 0.5), "cpu_seconds": 1.5}, {**_cell("retrain", 1.0), "cpu_seconds": None}]
    text = table.markdown(cells)
    assert "| CPU s |" in text and "| 1.5 | 0.1 | ok |" in text and "| - | 0.1 | ok |" in text
    assert "CPU s" not in table.markdown([_cell("uce", 0.5)])


def test_texts_are_ranked_by_what_is_not_told_apart():
    """`a` reaches a gold model on one seed alone, `b` on both but loses utility on one, `c` reaches it on both."""

    def cell(method: str, d: float, utility: float, seed: int) -> dict:
        names = {"tofu.d_over_critical": d, "tofu.model_utility": utility}
        rows = [{"name": n, "value": v, "low": v, "high": v, "n": 40} for n, v in names.items()]
        return {**_cell(method, None, seed=seed), "rows": rows}

    read = {"nothing": ((1.8, 0.9), (2.0, 0.8)), "a": ((0.2, 0.9), (1.2, 0.8)), "b": ((0.3, 0.8), (0.3, 0.8)), "c": ((1.0, 0.86), (0.9, 0.8))}
    cells = [cell(m, *values, seed) for m, both in read.items() for seed, values in enumerate(both)]
    assert table.ranked(cells) == ["c", "b", "a", "nothing"]
    assert "doing nothing 1.9 (1.8 to 2)" in (text := table.markdown(cells)) and "on every seed: c." in text


def test_tables_without_klom_say_why_nothing_is_ranked():
    cell = {**_cell("slug", None), "rows": [{"name": "zero_shot.forget", "value": 0.5, "low": 0.4, "high": 0.6, "n": 40}]}
    assert "have no KLOM: alphabetical" in table.apart([cell]) and "No retrained models" in table.apart([{**cell, "references": 0}])


def test_drawings_have_columns_of_their_own():
    rows = [{"name": n, "value": v, "low": v, "high": v, "n": 40} for n, v in (("canvas.ua", 0.95), ("canvas.ira", 1.0))]
    text = table.markdown([{**_cell("uce", None), "rows": rows}])
    assert "| method | UA | IRA |" in text and "| uce | 95 | 100 |" in text and "judge" in text
    assert "Drawings per seed: 40 of the concept, 40 of its neighbours." in text


def test_table_ranks_only_valid_worlds():
    cells = [_cell("nothing", 0.0), _cell("b", 0.4), _cell("b", 0.6, seed=1), _cell("a", 0.1), _cell("broken", None)]
    text = table.markdown(cells)
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "method" not in line]
    assert order == ["b", "a", "nothing", "broken"]
    assert "0.5 (0.4 to 0.6)" in text
    near = [_cell("nothing", 0.0, far=0.6), _cell("b", 0.9, far=0.6), _cell("a", 0.1, far=0.6)]
    assert "not valid for ranking" in table.apart(near)
    assert table.ranked(near) == ["a", "b", "nothing"]
