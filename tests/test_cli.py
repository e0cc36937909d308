"""The command line and recipes, as a user would call them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from worlds import digits, original

from expunge import cli, models, recipe
from expunge.data import load, selectors
from expunge.errors import DataError, ModelError, RecipeError, SettingError, SplitError
from expunge.types import Examples

FACTORY = "import functools\nfrom expunge.nets import small_cnn\ndef build():\n    return small_cnn(8)\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder: factory, weights, nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(FACTORY)
    models.save_state(original("digits"), tmp_path / "model.safetensors")
    yield tmp_path
    sys.modules.pop("mynet", None)


def call(*words: str) -> tuple[int, str, str]:
    found = subprocess.run([sys.executable, "-m", "expunge", *words], capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


def test_recipe_to_patch_to_revert(home):
    """A recipe forgets a class; the patch is inspected, applied and reverted through files; the restored weights are the same bits."""
    (home / "run.toml").write_text(
        'model = "py:mynet:build"\nweights = "model.safetensors"\ntrain = "world:digits/train"\ntest = "world:digits/test"\n'
        'forget = "class:3"\nmethods = ["fisher_forgetting"]\n[gate]\n"accuracy.forget" = "<= 0.05"\n'
    )
    code, out, err = call("run", "run.toml", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["verdict"]["passed"]
    assert "No retrained reference" in " ".join(document["notes"])
    assert {p.name for p in (home / "out").iterdir()} >= {"report.html", "report.json", "patch.safetensors"}
    page = (home / "out" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    code, out, _ = call("inspect", "out/patch.safetensors", "--json")
    assert json.loads(out)["meta"]["method"] == "fisher_forgetting"
    common = ["--model", "py:mynet:build"]
    assert call("apply", "out/patch.safetensors", *common, "--weights", "model.safetensors", "--out", "new.safetensors")[0] == 0
    code, _, err = call("apply", "out/patch.safetensors", *common, "--weights", "new.safetensors", "--out", "twice.safetensors")
    assert code == 2 and "applied already" in err and not (home / "twice.safetensors").exists()
    assert call("revert", "new.undo.safetensors", *common, "--weights", "new.safetensors", "--out", "back.safetensors")[0] == 0
    assert (home / "back.safetensors").read_bytes() == (home / "model.safetensors").read_bytes()


def test_gate_refusal_is_exit_code_1(home):
    words = ["forget", "--model", "py:mynet:build", "--weights", "model.safetensors", "--train", "world:digits/train", "--test", "world:digits/test"]
    code, out, err = call(*words, "--forget", "class:3", "--method", "gradient_ascent", "--lr", "0.00001", "--json")
    assert code == 1, err
    assert json.loads(out)["tries"][0]["settings"]["lr"] == 0.00001


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods", "salum"], "did you mean 'salun'"),
        (["forget", "--method", "salun", "--kep", "0.3"], "did you mean 'keep'"),
        (["run", "none.toml"], "cannot read none.toml"),
        (["inspect", "model.safetensors"], "no expunge patch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(home, words, message):
    if words[0] == "forget":
        words += ["--model", "py:mynet:build", "--train", "world:digits/train", "--forget", "class:3"]
    code, _, err = call(*words)
    assert code == 2
    assert message in err and "Traceback" not in err


def test_settings_from_flags():
    assert cli.settings("salun", ["--keep", "0.3", "--soft"])["soft"] is True
    assert cli.settings("salun", ["--keep=0.3"])["keep"] == 0.3
    with pytest.raises(SettingError, match="write settings as"):
        cli.settings("salun", ["keep"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"\ntrain = "t"\nforget = "f"\nmetod = 1\n', "unknown key 'metod'"),
        ('model = 3\ntrain = "t"\nforget = "f"\n', "model in r.toml must be of type str"),
        ('model = "m"\n', "lacks train, forget"),
        ("model =", "is not TOML"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipe.read(tmp_path / "r.toml")


def test_recipe_paths_stay_in_their_folder(tmp_path):
    (tmp_path / "r.toml").write_text('model = "py:a:b"\nweights = "../../x.safetensors"\ntrain = "world:digits/train"\nforget = "class:3"\n')
    with pytest.raises(DataError, match="leaves the folder"):
        recipe.run(recipe.read(tmp_path / "r.toml"))


def test_csv_and_its_faults(tmp_path):
    (tmp_path / "a.csv").write_text("u,v,label\n1,2.5,0\n3,4.5,1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load.load("csv:a.csv?target=label", "classification", tmp_path)
        assert data.x.tolist() == [[1, 2.5], [3, 4.5]] and data.y.tolist() == [0, 1]
        with pytest.raises(DataError, match=r"no target column 'labl'; did you mean 'label'"):
            load.load("csv:a.csv?target=labl", "classification", tmp_path)
        (tmp_path / "b.csv").write_text("u,name,label\n1,x,0\n3,y,1\n")
        with pytest.raises(DataError, match=r"column 'name' of b.csv is not numeric"):
            load.load("csv:b.csv?target=label", "classification", tmp_path)
    with pytest.raises(DataError, match=r"no file or folder c\.csv"):
        load.load("csv:c.csv?target=label", "classification", tmp_path)


def test_image_folder_names_the_broken_file(tmp_path):
    from PIL import Image

    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "im" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (k * 200, 0, 0)).save(tmp_path / "im" / name / "0.png")
    data = load.load("images:im", "classification", tmp_path)
    assert data.x.shape == (2, 3, 4, 4) and data.y.tolist() == [0, 1]
    (tmp_path / "im" / "dog" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"dog/1.png cannot be read"):
        load.load("images:im", "classification", tmp_path)


def test_selectors():
    data = Examples(torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(10, 16))
    forget, retain = selectors.resolve("class:1", data)
    assert forget.ids.tolist() == [12, 13] and len(retain) == 4
    assert selectors.resolve("ids:10,15", data)[0].ids.tolist() == [10, 15]
    assert len(selectors.resolve("random:0.5@3", data)[0]) == 3
    assert len(selectors.resolve("random:4", data)[0]) == 4
    for bad, message in (
        ("class:9", "no class '9'"),
        ("ids:99", "not in the training data"),
        ("ids:x", "whole numbers"),
        ("clas:1", "cannot read"),
        ("random:1", "every"),
    ):
        with pytest.raises(SplitError, match=message):
            selectors.resolve(bad, data)


def test_weights_are_never_pickles(home):
    torch.save(original("digits").state_dict(), home / "w.pt")
    with pytest.raises(ModelError, match="is a pickle"):
        models.load("py:mynet:build", home / "w.pt")
    raw = (home / "model.safetensors").read_bytes()
    (home / "cut.safetensors").write_bytes(raw[:-10])
    with pytest.raises(ModelError, match="damaged"):
        models.load("py:mynet:build", home / "cut.safetensors")


def test_digits_world_is_the_users_model(home):
    model, _, _ = digits()
    loaded = models.load("py:mynet:build", home / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
