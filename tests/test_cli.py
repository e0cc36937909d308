"""The command line and recipes, as a user would call them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from worlds import FACTORY, digits, original

from expunge.cli import app as cli
from expunge.cli import forget as flags
from expunge.core.errors import DataError, ModelError, RecipeError, SettingError, SplitError
from expunge.core.patch import difference
from expunge.engine.run import unlearn
from expunge.modalities.examples import Examples
from expunge.modalities.files import models, selectors
from expunge.modalities.files import readers as load
from expunge.planning import recipe


def call(*words: str) -> tuple[int, str, str]:
    found = subprocess.run([sys.executable, "-m", "expunge", *words], capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.slow
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
    assert {p.name for p in (home / "out" / "latest").iterdir()} >= {"report.html", "report.json", "patch.safetensors"}
    page = (home / "out" / "latest" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    code, out, _ = call("inspect", "out/latest/patch.safetensors", "--json")
    assert json.loads(out)["meta"]["method"] == "fisher_forgetting"
    common = ["--model", "py:mynet:build"]
    assert call("apply", "out/latest/patch.safetensors", *common, "--weights", "model.safetensors", "--out", "new.safetensors")[0] == 0
    code, _, err = call("apply", "out/latest/patch.safetensors", *common, "--weights", "new.safetensors", "--out", "twice.safetensors")
    assert code == 2 and "applied already" in err and not (home / "twice.safetensors").exists()
    assert call("revert", "new.undo.safetensors", *common, "--weights", "new.safetensors", "--out", "back.safetensors")[0] == 0
    assert (home / "back.safetensors").read_bytes() == (home / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_select_writes_ids_that_a_request_can_name(home):
    common = ["--model", "py:mynet:build", "--weights", "model.safetensors", "--train", "world:digits/train"]
    code, out, err = call("select", *common, "--size", "20", "--how", "easiest", "--json")
    assert code == 0, err
    ids = json.loads(out)["ids"]
    assert len(set(ids)) == 20 and [int(i) for i in (home / "gone.txt").read_text().split()] == ids
    forget, _ = selectors.resolve("ids:@gone.txt", load.load("world:digits/train", "classification", home, inside=False), home)
    assert sorted(forget.ids.tolist()) == sorted(ids)
    code, _, err = call("select", *common, "--size", "20", "--how", "vulnerable")
    assert code == 2 and "needs --shadows and --training" in err
    assert call("select", *common, "--size", "0")[0] == 2


@pytest.mark.slow
def test_audit_with_shadow_models_prints_sections(home):
    """Few and short shadows: rows of per-example attacks, U-LiRA by the patch's own method, and the sections, weakest first."""
    common = ["--model", "py:mynet:build", "--weights", "model.safetensors", "--train", "world:digits/train", "--test", "world:digits/test"]
    attempt = unlearn("fine_tune", original("digits"), *digits()[1:], epochs=0.2)
    attempt.patch.save(home / "some.safetensors")
    code, out, err = call("audit", *common, "--forget", "class:3", "--patch", "some.safetensors", "--shadows", "8", "--training",
                          "epochs=2 batch_size=50 lr=0.05", "--unlearn-shadows", "6", "--json")  # fmt: skip
    assert code == 1, err
    document = json.loads(out)
    names = {r["name"] for t in document["tries"] for r in t["rows"]}
    assert names >= {"lira.auc", "lira.epsilon", "rmia.auc", "ulira.auc", "quantile.auc"}
    order = ["FAIL", "UNKNOWN", "PASS"]
    found = [order.index(s["verdict"]) for s in document["sections"]]
    assert found == sorted(found) and {s["id"] for s in document["sections"]} == set("ABCD")
    assert len(list((home / ".cache" / "expunge").glob("shadows-*.safetensors"))) == 1
    code, out, _ = call("audit", *common, "--forget", "class:3", "--patch", "some.safetensors", "--quick", "--json")
    quick = json.loads(out)
    assert code == 1 and set(document["baselines"]) - set(quick["baselines"]) == {"fine_tune", "reset_last"}
    assert "relearn.steps" in names and "relearn.steps" not in {r["name"] for t in quick["tries"] for r in t["rows"]}
    code, _, err = call("audit", *common, "--forget", "class:3", "--patch", "some.safetensors", "--training", "epochs=2")
    assert code == 2 and "need --shadows" in err


@pytest.mark.slow
def test_gate_refusal_is_exit_code_1(home):
    words = ["forget", "--model", "py:mynet:build", "--weights", "model.safetensors", "--train", "world:digits/train", "--test", "world:digits/test"]
    code, out, err = call(*words, "--forget", "class:3", "--method", "gradient_ascent", "--lr", "0.00001", "--json")
    assert code == 1, err
    assert json.loads(out)["tries"][0]["settings"]["lr"] == 0.00001


def inside_process(words, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and standard error of `expunge WORDS` without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("ignore")
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


TABLE = "u,v,label\n" + "".join(f"{3 * k},{k * k % 7},{k % 2}\n" for k in range(40))
FORGET = ["forget", "--model", "py:mynet:build", "--weights", "model.safetensors", "--train", "world:digits/train", "--test", "world:digits/test"]
ROWS = ["forget", "--model", "py:mynet:rows", "--weights", "none", "--train", "csv:a.csv?target=label"]
BAD = [
    (["methods", "salum"], "did you mean 'salun'"),
    ([*FORGET, "--forget", "class:3", "--method", "salun", "--kep", "0.3"], "did you mean 'keep'"),
    ([*FORGET, "--forget", "class:3", "--kep", "0.3"], "settings need --method"),
    ([*FORGET[:-1], "world:digits/train", "--forget", "class:3"], "of forget also stand in test"),
    ([*FORGET, "--forget", "ids:999999"], "not in the training data"),
    ([*FORGET, "--forget", "random:0.0"], "matches no record"),
    ([*FORGET, "--forget", "random:1.0"], "delete the model instead"),
    (["forget", "--model", "py:mynet:frozen", *FORGET[3:], "--forget", "class:3", "--method", "salun"], "no trainable weight"),
    (["forget", "--model", "py:mynet:tiny", *FORGET[3:], "--forget", "class:3"], "the model has"),
    (["forget", "--model", "py:nonet:build", *FORGET[3:], "--forget", "class:3"], "cannot call py:nonet:build"),
    ([*FORGET[:4], "none.safetensors", *FORGET[5:], "--forget", "class:3"], "no weight file"),
    ([*FORGET, "--forget", "class:3", "--task", "clasification"], "did you mean 'classification'"),
    ([*ROWS[:-1], "csv:a.csv?target=labels", "--forget", "class:1"], "no target column 'labels'"),
    ([*ROWS[:-1], "csv:short.csv?target=label", "--forget", "class:1"], "short.csv"),
    ([*ROWS[:-1], "csv:far.csv?target=label", "--forget", "class:1"], "labels must be integers in 0..1"),
    ([*ROWS, "--forget", "class:7"], "no class '7'"),
    (["run", "none.toml"], "cannot read none.toml"),
    (["run", "bad.toml"], "unknown key 'metod'"),
    (["run", "away.toml"], "leaves the folder"),
    (["inspect", "model.safetensors"], "no expunge patch"),
    (["apply", "cut.patch", "--model", "py:mynet:build", "--weights", "model.safetensors", "--out", "n.safetensors"], "cut.patch"),
    (["apply", "good.patch", "--model", "py:mynet:tiny", "--weights", "none", "--out", "n.safetensors"], "another model"),
    (["bench", "--seeds", "x"], "seeds must be a number"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_changes_nothing(home, words, message, monkeypatch, capsys):
    (home / "mynet.py").write_text(
        FACTORY + "from torch import nn\ndef frozen():\n    return build().requires_grad_(False)\n"
        "def tiny():\n    return small_cnn(8, width=4)\ndef rows():\n    return nn.Linear(2, 2)\n"
    )
    (home / "a.csv").write_text(TABLE)
    (home / "short.csv").write_text("u,v,label\n1,2,0\n3\n")
    (home / "far.csv").write_text(TABLE + "3,5,7\n")
    (home / "bad.toml").write_text('model = "py:mynet:build"\ntrain = "world:digits/train"\nforget = "class:3"\nmetod = "x"\n')
    (home / "away.toml").write_text('model = "py:mynet:build"\nweights = "../w.safetensors"\ntrain = "world:digits/train"\nforget = "class:3"\n')
    model = original("digits")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        after = {n: p + 1 for n, p in before.items()}
    raw = difference(before, after).stamped(model).save(home / "good.patch").read_bytes()
    (home / "cut.patch").write_bytes(raw[:-5])
    found = contents(home)
    code, err = inside_process(words, monkeypatch, capsys)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert contents(home) == found


def test_a_run_that_diverges_says_so_and_leaves_no_patch(home, monkeypatch, capsys):
    code, _ = inside_process([*FORGET, "--forget", "class:3", "--method", "gradient_ascent", "--bound", "inf", "--lr", "1e30", "--json"], monkeypatch, capsys)
    document = json.loads((home / "out" / "latest" / "report.json").read_text())
    assert code == 1
    assert document["tries"][0]["outcome"] == "diverged" and "lower" in document["tries"][0]["reason"]
    assert not (home / "out" / "latest" / "patch.safetensors").exists()


def test_settings_from_flags():
    assert flags.settings("salun", ["--keep", "0.3", "--soft"])["soft"] is True
    assert flags.settings("salun", ["--keep=0.3"])["keep"] == 0.3
    with pytest.raises(SettingError, match="write settings as"):
        flags.settings("salun", ["keep"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "py:m:f"\ntrain = "t"\nforget = "f"\nmetod = 1\n', "unknown key 'metod'"),
        ('model = 3\ntrain = "t"\nforget = "f"\n', "model in r.toml must be of type str"),
        ('model = "no such folder"\n', "no folder no such folder"),
        ('model = "py:m:f"\n', "lacks train, forget"),
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


def test_parquet_regression_goes_through_a_recipe(tmp_path, monkeypatch):
    """Tables as a user has them: two Parquet files, a factory, a range of targets to forget, a report and a patch."""
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(120, 3, generator=g), torch.tensor([1.0, -2.0, 0.5])
    for name, rows in (("train", slice(0, 80)), ("test", slice(80, 120))):
        columns = {c: x[rows, k].tolist() for k, c in enumerate("abc")}
        Dataset.from_dict({**columns, "price": (x[rows] @ w).tolist()}).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "pricenet.py").write_text("from expunge.modalities.nets import mlp\ndef build():\n    return mlp(3, 1, 8)\n")
    lines = ['model = "py:pricenet:build"', 'weights = "none"', "anyway = true", 'task = "regression"', 'train = "parquet:train.parquet?target=price"']
    lines += [
        'test = "parquet:test.parquet?target=price"',
        'forget = "range:1..10"',
        'methods = ["gaussian_amnesiac"]',
        "[with.gaussian_amnesiac]",
        "epochs = 1",
    ]
    (tmp_path / "r.toml").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, document = recipe.run(recipe.read(tmp_path / "r.toml"))
    assert document["task"] == "regression" and document["parts"]["forget"] > 5
    assert {"error.forget", "error.test"} <= {r["name"] for r in document["tries"][0]["rows"]}
    assert (tmp_path / "out" / "latest" / "report.html").exists()


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
