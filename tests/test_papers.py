"""Settings traceable to papers, stable and experimental: the fields of every method, the preset in library, command line and recipe, and the page."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import make_net
from torch import nn

from expunge.cli import app as cli
from expunge.cli import catalogue
from expunge.cli import forget as flags
from expunge.core.errors import SettingError
from expunge.core.registry import METHODS, Method
from expunge.parts.losses.features import cosine_distance
from expunge.parts.scopes.saliency import gradient_sum, top
from expunge.planning import recipe
from expunge.planning.outcome import Try, Verdict

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

CARDS, MEASURED = build.data("cards"), build.data("measured")
KINDS = {"audit": "audits", "data": "data", "guarantee": "guarantees"}


def tables() -> dict[tuple[str, str], dict[str, str]]:
    """(world, method) -> column -> cell, of the tables in docs/benchmarks.md."""
    out: dict[tuple[str, str], dict[str, str]] = {}
    world, head = "", []
    for line in (ROOT / "docs/benchmarks.md").read_text().splitlines():
        if found := re.match(r"#+ (.*)|\*\*([^*]+)\*\*", line):
            title, bold = found.groups()
            world, head = bold.rstrip(".") if bold else title.split(": ")[0 if " seed(s)" in title else -1], []
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else [""]
        if cells[0] == "method":
            head = cells
        elif len(cells) == len(head) and cells[0].strip("-"):
            out[world, cells[0]] = dict(zip(head, cells, strict=True))
    return out


ROWS = tables()

# the fields of every method


@pytest.mark.parametrize("name", sorted(METHODS))
def test_published_settings_are_settings_that_differ(name):
    record = METHODS[name]
    assert set(record.published) <= set(record.defaults)
    read = record.settings(record.published)
    for key, value in record.published.items():
        assert type(read[key]) is type(record.defaults[key]) and read[key] == value != record.defaults[key], key
    assert record.place and not record.place.endswith(".")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_stable_or_says_in_one_sentence_why_not(name):
    record = METHODS[name]
    assert record.stable == (record.reason == "") == (record.lacks == "")
    assert record.stable or (record.reason[0].islower() and not record.reason.endswith("."))
    page = build.method_page(record)
    assert (f"[Stable](../papers.md), by {MEASURED[name]['holds']}." if record.stable else f"[Experimental](../papers.md): {record.reason}.") in page


def test_a_method_that_says_nothing_is_experimental():
    found = METHODS["salun"]
    bare = Method("mine", found.function, "", found.tasks, found.needs, found.forgets, "approximate", found.cost, {})
    assert not bare.stable and bare.published == {} and "nobody has said" in bare.reason


@pytest.mark.parametrize("name", sorted(m for m in METHODS if METHODS[m].stable))
def test_a_stable_method_has_a_card_and_a_measured_row(name):
    assert name in MEASURED and any(name in of.get("methods", ()) for of in CARDS.values())


# the rule, read from the tables again


def number(text: str) -> float:
    return float(text.split()[0])


def least(text: str) -> float:
    return float(text.split("(")[-1].split(" to ")[0])


def most(text: str) -> float:
    return float(text.split(" to ")[-1].rstrip(")"))


def beside(rows: dict, world: str, name: str, columns: tuple[str, ...]) -> float:
    """Most points that a method lies below doing nothing, over some columns."""
    return max(number(rows[world, "nothing"][c]) - number(rows[world, name][c]) for c in columns if c in rows[world, name])


def test_stable_classifiers_keep_the_rule():
    rows, worlds = ROWS, ("digits, class", "mnist, class", "cifar10, random", "cifar10, class")
    for name in (m for m in METHODS if METHODS[m].stable and "classification" in METHODS[m].tasks):
        stands = [w for w in worlds if (w, name) in rows]
        lost = {w: beside(rows, w, name, ("RA", "TA")) for w in stands}
        good = [w for w in stands if least(rows[w, name]["gap closed, KLOM"]) >= 0.5 and lost[w] <= 3.01]
        assert len(good) >= len(stands) / 2 and max(lost.values()) < 10, name
        if (found := re.match(r"(\d) of (\d) tables", MEASURED[name]["holds"])) is not None:
            assert (int(found[1]), int(found[2])) == (len(good), len(stands)), name


def test_stable_language_methods_keep_the_rule():
    rows, world = ROWS, "tofu-tiny, forget10"
    names = [m for m in METHODS if METHODS[m].stable and "causal_lm" in METHODS[m].tasks]
    assert names
    for name in names:
        row = rows[world, name]
        assert most(row["KS D / critical"]) < 1 and number(row["drop retain"]) <= 0.05, name
        assert number(row["model utility"]) >= 0.95 * number(rows[world, "nothing"]["model utility"]), name


def test_stable_diffusion_methods_keep_the_rule():
    rows, worlds = ROWS, ("text2digit", "shapes, style", "shapes, object", "ddpm-digits")
    for name in (m for m in METHODS if METHODS[m].stable and "diffusion" in METHODS[m].tasks):
        stands = [w for w in worlds if (w, name) in rows]
        assert len(stands) >= 3
        for w in stands:
            assert number(rows[w, name]["UA"]) >= 98 and beside(rows, w, name, ("IRA", "CRA")) <= 5, (name, w)


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_measured_cells_stand_in_the_tables(name):
    row = MEASURED[name]
    assert name in METHODS and row["what"] and len(row["what"]) == len(row["value"])
    assert [ROWS[row["world"], name][column] for column in row["what"]] == row["value"]


# cases of cards that stable methods rest on, and that no other file has


def test_saliency_of_card_salun():
    """Logits W x, x = (1, 2), p = (.5, .3, .2), label 0: gradient [[-.5, -1], [.3, .6], [.2, .4]], of which half is three entries; opposite batches cancel."""
    net = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, 0.0], [0.3, 0.0], [0.2, 0.0]]).log().where(torch.tensor([True, False]), 0.0))
    from expunge.modalities.classification.task import classification

    batch = {"x": torch.tensor([[1.0, 2.0]]), "y": torch.tensor([0]), "i": torch.tensor([0])}
    g = gradient_sum(net, classification(), [batch])["weight"]
    torch.testing.assert_close(g, torch.tensor([[-0.5, -1.0], [0.3, 0.6], [0.2, 0.4]]), atol=1e-6, rtol=0)
    assert top({"weight": g.abs()}, 0.5).masks["weight"].int().tolist() == [[1, 1], [0, 1], [0, 0]]
    with torch.no_grad():
        net.weight.zero_()
    both = gradient_sum(net, classification(), [batch, {**batch, "x": -batch["x"]}])["weight"]
    assert float(both.abs().max()) == 0


def test_distance_of_card_duck_has_no_radial_gradient():
    e = torch.tensor([[3.0, 1.0]], requires_grad=True)
    (g,) = torch.autograd.grad(cosine_distance(e, torch.tensor([[0.0, 1.0]])).sum(), e)
    assert abs(float((g * e.detach()).sum())) < 1e-6 < float(g.abs().max())


# the preset


def test_the_preset_is_the_defaults_under_what_was_published():
    salun = METHODS["salun"]
    assert salun.preset("paper") == {**salun.defaults, "epochs": 10, "batch_size": 256}
    assert METHODS["uce"].preset("paper") == METHODS["uce"].defaults
    with pytest.raises(SettingError, match=r"salun has no preset 'papr'; did you mean 'paper'\? There are: paper"):
        salun.preset("papr")


def test_settings_named_as_flags_overlay_the_preset():
    assert flags.settings("salun", ["--keep", "0.3", "--epochs", "3"], "paper") == {**METHODS["salun"].preset("paper"), "keep": 0.3, "epochs": 3}
    assert flags.settings("salun", ["--keep", "0.3"]) == {"keep": 0.3}
    with pytest.raises(SettingError, match="--preset needs --method"):
        flags.settings("", [], "paper")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A folder with a regression of 120 rows as a user has it; the words of a request on it."""
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=g)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    for name, rows in (("train", slice(0, 80)), ("test", slice(80, 120))):
        lines = [",".join(f"{v:.6f}" for v in (*a, b)) for a, b in zip(x[rows].tolist(), y[rows].tolist(), strict=True)]
        (tmp_path / f"{name}.csv").write_text("a,b,c,target\n" + "\n".join(lines) + "\n")
    (tmp_path / "mytable.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))\n")
    yield tmp_path
    sys.modules.pop("mytable", None)


def test_forget_with_a_preset_runs_as_published_and_ends_with_what_is_experimental(table, capsys, monkeypatch):
    words = [
        "--model",
        "py:mytable:build",
        "--weights",
        "none",
        "--anyway",
        "--task",
        "regression",
        "--train",
        "csv:train.csv?target=target",
        "--test",
        "csv:test.csv?target=target",
    ]
    words += ["--forget", "random:0.1", "--method", "gaussian_amnesiac", "--preset", "paper", "--lr", "0.01", "--quick"]
    monkeypatch.setattr(sys, "argv", ["expunge", "forget", *words])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert f"gaussian_amnesiac is experimental: {METHODS['gaussian_amnesiac'].reason}" in out.splitlines()
    tried = json.loads((table / "out" / "latest" / "report.json").read_text())["tries"][0]["settings"]
    assert tried == {**METHODS["gaussian_amnesiac"].preset("paper"), "lr": 0.01}


def test_a_recipe_takes_a_preset(table):
    head = (
        'model = "py:mytable:build"\nweights = "none"\nanyway = true\n'
        'task = "regression"\ntrain = "csv:train.csv?target=target"\ntest = "csv:test.csv?target=target"\nforget = "random:0.1"\n'
        'methods = ["gaussian_amnesiac"]\n[with.gaussian_amnesiac]\nlr = 0.01\n'
    )
    (table / "run.toml").write_text(head + 'preset = "paper"\n')
    document = recipe.run(recipe.read(table / "run.toml"))[1]
    assert document["tries"][0]["settings"] == {**METHODS["gaussian_amnesiac"].preset("paper"), "lr": 0.01}
    (table / "run.toml").write_text(head + 'preset = "papr"\n')
    with pytest.raises(SettingError, match="There are: paper"):
        recipe.run(recipe.read(table / "run.toml"))


# what a run says


def test_a_patch_and_a_document_name_it(task, split):
    from expunge.engine.run import unlearn
    from expunge.planning.outcome import audited

    split = replace(split, retain=replace(split.retain, ids=100 + split.retain.ids))
    for name, stable in (("fisher_forgetting", True), ("fine_tune", False)):
        attempt = unlearn(name, model := make_net(), task, split)
        assert attempt.patch.meta["stable"] is stable
        v = audited(model, model, task, split, attempt=attempt, slow=False)
        chosen = Verdict(True, [], Try(attempt), v.tries, v.rules, v.trials, v.probe)
        assert chosen.document(pictures=False)["chosen"]["stable"] is stable
        assert chosen.doubts == ([] if stable else [f"{name} is experimental: {METHODS[name].reason}"])


def test_the_list_of_methods_marks_them(capsys):
    catalogue.methods()
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert lines == {m: "stable" if METHODS[m].stable else "experimental" for m in METHODS}
    catalogue.methods(as_json=True)
    assert {m["name"]: m["stable"] for m in json.loads(capsys.readouterr().out)} == {m: METHODS[m].stable for m in METHODS}


# the page


def test_the_page_lists_every_card_and_every_method():
    page = build.papers_page()
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("| ")]
    named = {row[0].split("]")[0].lstrip("[") for row in rows if row[0].startswith("[")}
    assert named == set(METHODS)
    assert {c for row in rows for c in (row[2].split(", ") if len(row) > 3 else row[:1])} >= set(CARDS)
    lines = {row[0].split("]")[0].lstrip("["): row for row in rows if len(row) > 3}
    assert lines["salun"][5:7] == ["`epochs=10`, `batch_size=256`", "`epochs=2`, `batch_size=64`"] and "0.867" in lines["salun"][7]
    assert lines["guardrail"][5] == "not given" and lines["uce"][5] == "our defaults" and lines["seuf"][7] == "not tabled"


def test_what_the_cards_name_is_there():
    assert len(CARDS) == 82
    assert set(chain.from_iterable(of.get("methods", ()) for of in CARDS.values())) <= set(METHODS)
    for card, of in CARDS.items():
        assert of.get("methods") or of.get("paper"), card
        for kind, _, module in (h.partition(": ") for h in of.get("here", ())):
            path = ROOT / "src" / "expunge" / KINDS[kind] / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or path.is_dir(), f"{card}: {module}"
