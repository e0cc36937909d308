"""Recipes for texts: a TOML file, a model folder and JSON lines -> a report, a patch and a released folder."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import copied, small

from expunge.cli import app as cli
from expunge.core.errors import DataError, ExpungeError, ModelError, RecipeError
from expunge.modalities.language import checkpoints
from expunge.parts import training
from expunge.planning import recipe

ROOT = Path(__file__).parent.parent


def lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))


def saved(folder: Path, model, tokenizer) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder `authors` with a model that knows its forget file, and the files that recipes/authors.toml names."""
    home = tmp_path_factory.mktemp("recipes")
    model, task, split = small("causal_lm")
    tokenizer, model = split.forget.format.tokenizer, copied(model)
    training.train(model, task, split.forget, epochs=30, batch_size=4, seed=0, lr=1e-2, optimizer="adamw", clip=1.0)
    saved(home / "authors" / "model", model, tokenizer)
    for part in ("forget", "retain", "test", "validation", "anchor"):
        lines(home / "authors" / f"{part}.jsonl", getattr(split, part).rows)
    shutil.copytree(home / "authors", home.parent / "outside", dirs_exist_ok=True)
    return home


def written(home: Path, name: str = "r.toml", **changes: Any) -> Path:
    """A recipe file that names the folder's parts, with keys changed, added, or taken away by None."""
    raw = {"task": "causal-lm", "model": "authors/model", "forget": "authors/forget.jsonl", "retain": "authors/retain.jsonl", "out": "out", **changes}
    (home / name).write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in raw.items() if v is not None))
    return home / name


def quiet(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recipe.run(recipe.read(path))


@pytest.mark.slow
def test_the_finished_recipe_runs_on_a_tiny_folder(made, monkeypatch, capsys):
    """recipes/authors.toml as it stands, from another working folder: report, patch and released folder lie where it says."""
    shutil.copy(ROOT / "recipes" / "authors.toml", made / "authors.toml")
    monkeypatch.chdir(made.parent)
    monkeypatch.setattr(sys, "argv", ["expunge", "run", str(made / "authors.toml"), "--json"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("ignore")
        cli.main()
    found = capsys.readouterr()
    assert end.value.code in (0, 1) and found.err == ""
    document = json.loads(found.out)
    assert document["task"] == "causal_lm" and document["asked"] == "4 records of forget.jsonl"
    assert document["parts"] == {"forget": 4, "retain": 24, "test": 4, "validation": 8}
    assert {t["method"] for t in document["tries"]} == {"wga"} and len({t["settings"]["lr"] for t in document["tries"]}) >= 2
    assert all(t["settings"]["retain_size"] == 32 for t in document["tries"])
    assert {"unseen.p", "drop.retain"} <= set(document["rules"])
    out = made / "authors" / "out" / "latest"
    assert {"report.html", "report.json"} <= {p.name for p in out.iterdir()}
    assert document["verdict"]["passed"] == (end.value.code == 0) == (out / "released").exists() == (out / "patch.safetensors").exists()


def test_references_are_folders_and_all_parts_are_read(made):
    path = written(made, anchor="authors/anchor.jsonl", general="authors/test.jsonl", validation="share:0", references=["authors/model"], methods=["idk_nll"])
    path.write_text(path.read_text() + "[with.idk_nll]\nlr = 0.001\nepochs = 1\n")
    verdict, document = quiet(path)
    assert document["references"] == 0 and "weights of the original" in document["refused"][0]["why"]
    assert set(document["parts"]) == {"forget", "retain", "anchor", "general"}
    assert verdict.tries[0].attempt.outcome == "ok"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": None}, RecipeError, "r.toml lacks model"),
        ({"forget": None}, RecipeError, "r.toml lacks forget"),
        ({"classes": "a,b"}, RecipeError, "classes in r.toml is not for task causal-lm"),
        ({"weights": "w.safetensors"}, RecipeError, "weights in r.toml is not for task causal-lm"),
        ({"task": "causallm"}, RecipeError, "r.toml: no task 'causallm'; did you mean 'causal-lm'"),
        (
            {"task": "classification", "train": "world:digits/train"},
            RecipeError,
            "retain in r.toml is not for task classification: it is for language",
        ),
        ({"max_length": "long"}, RecipeError, "max_length in r.toml must be of type int"),
        ({"reatin": "x"}, RecipeError, "unknown key 'reatin'; did you mean 'retain'"),
        ({"validation": "share:much"}, RecipeError, "a share from 0 to below 1"),
        ({"validation": "share:1.5"}, RecipeError, "a share from 0 to below 1"),
        ({"form": "gguf"}, ExpungeError, "form must be one of auto, merged, peft, not 'gguf'"),
        ({"dtype": "half"}, ModelError, "dtype must be one of auto, float32, bfloat16"),
        ({"mask": "answr"}, DataError, "did you mean 'answer'"),
        ({"template": "chatt"}, DataError, "template must be plain, chat or a text"),
        ({"max_length": -5}, DataError, "max_length must be 2 or larger"),
        ({"retain": "authors/none.jsonl"}, DataError, "cannot read none.jsonl"),
        ({"test": "authors/forget.jsonl"}, DataError, "record 1 of forget also stands in test"),
        ({"model": "authors/nowhere"}, ModelError, "no folder"),
        ({"methods": ["npoo"]}, ExpungeError, "did you mean 'npo'"),
        ({"methods": ["npo"], "retain": None}, ExpungeError, "retain=ce needs retain data"),
        ({"model": "../outside/model"}, DataError, "leaves the folder"),
        ({"forget": "../outside/forget.jsonl"}, DataError, "leaves the folder"),
        ({"general": "../outside/test.jsonl"}, DataError, "leaves the folder"),
        ({"validation": "../outside/validation.jsonl"}, DataError, "leaves the folder"),
        ({"references": ["../outside/model"]}, DataError, "leaves the folder"),
        ({"out": "../outside/out"}, DataError, "leaves the folder"),
        ({"model": "lent"}, ModelError, "which leaves the folder"),
        ({"references": ["lent"]}, ModelError, "which leaves the folder"),
        ({"forget": "linked.jsonl"}, DataError, "leaves the folder"),
    ],
)
def test_bad_recipes_of_texts_are_one_line_and_write_nothing(made, changes, kind, message):
    (made / "lent").mkdir(exist_ok=True)
    (made / "lent" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../outside/model"}))
    if not (made / "linked.jsonl").exists():
        (made / "linked.jsonl").symlink_to(made.parent / "outside" / "forget.jsonl")
    path = written(made, **changes)
    before = {str(p) for p in made.parent.rglob("*")}
    with pytest.raises(kind, match=message) as error:
        quiet(path)
    assert len(str(error.value).splitlines()) == 1
    assert {str(p) for p in made.parent.rglob("*")} == before


def test_weights_that_a_setting_names_stay_in_the_folder_too(made):
    path = written(made, methods=["tool_delete"])
    path.write_text(path.read_text() + '[with.tool_delete]\ntool_free = "../outside/model"\n')
    with pytest.raises(DataError, match="leaves the folder"):
        quiet(path)
    path.write_text(path.read_text().replace("../outside/model", "authors/model") + "lr = 0.001\nepochs = 1\n")
    verdict, _ = quiet(path)
    (one,) = verdict.tries
    assert one.attempt.settings["tool_free"] == str(made / "authors" / "model")
    assert "the generator returned the old answer" in one.attempt.reason  # that model knows it, too


def test_settings_must_be_tables(tmp_path):
    (tmp_path / "r.toml").write_text('task = "causal-lm"\nmodel = "m"\nforget = "f"\n[with]\nnpo = 3\n')
    with pytest.raises(RecipeError, match=r"with\.npo in r\.toml must be a table of settings, not 3"):
        recipe.read(tmp_path / "r.toml")


def test_an_adapter_over_a_base_in_the_folder_is_read(made, monkeypatch):
    """The path of the base counts from the recipe, wherever it is run from."""
    from peft import LoraConfig, get_peft_model

    model, _ = checkpoints.load(made / "authors" / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(copied(model), LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False))  # pyright: ignore
        adapted.peft_config["default"].base_model_name_or_path = "authors/model"
        adapted.save_pretrained(made / "adapter")
    monkeypatch.chdir(made.parent / "outside")
    merged, _ = checkpoints.load(made / "adapter", within=made)
    moved = [n for n, p in merged.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])]
    assert moved and all("up_proj" in n for n in moved)
