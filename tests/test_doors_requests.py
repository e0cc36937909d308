"""Requests and messages speak of records and classes by the user's names; the command line says what it understood."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from test_doors_files import pictures

from expunge.core.errors import SplitError
from expunge.core.modality import Request, named
from expunge.core.types import Split
from expunge.modalities.examples import Examples

FORGET = ["forget", "--model", "py:mynet:build", "--train", "world:digits/train", "--test", "world:digits/test", "--forget", "class:3"]


def call(words, capsys, monkeypatch):
    from expunge.cli.app import main

    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with pytest.raises(SystemExit) as found:
        main()
    out, err = capsys.readouterr()
    return found.value.code, out, err


def test_forgotten_weights_and_random_ones_stop(home, capsys, monkeypatch):
    code, out, err = call(FORGET, capsys, monkeypatch)
    assert code == 2 and out == "" and "--weights is missing: py:mynet:build alone gives" in err
    torch.manual_seed(0)
    code, out, err = call([*FORGET, "--weights", "none"], capsys, monkeypatch)
    assert code == 2 and out == "" and "the model is near chance on kept records (accuracy" in err and len(err.strip().splitlines()) == 1
    assert {p.name for p in home.iterdir()} <= {"mynet.py", "model.safetensors", "__pycache__"}


def test_what_was_understood_is_said_and_kept(home, capsys, monkeypatch):
    words = [*FORGET, "--weights", "model.safetensors", "--method", "gradient_ascent", "--lr", "1e-6", "--epochs", "1", "--quick"]
    _, out, _ = call(words, capsys, monkeypatch)
    lines = out.splitlines()
    assert lines[0].startswith("read world:digits/train: data, inputs 1 x 8 x 8") and lines[1].startswith("forget class:3: class 3, ")
    assert lines[2].startswith("The model as it is fed: accuracy 1 on kept records (n = 512; chance 0.1") and "chance" in lines[2]
    document = json.loads((home / "out" / "latest" / "report.json").read_text())
    assert document["data"]["schema"]["shape"] == [1, 8, 8] and len(document["data"]["forgotten"]) == document["parts"]["forget"]
    other = ["--schema", "out/latest/report.json"]
    code, _, _ = call([*words, *other], capsys, monkeypatch)
    assert code == 1
    pictures(home / "im", ["0", "1"], side=9, mode="L")
    mixed = [w if w != "world:digits/train" else "images:im" for w in FORGET]
    code, _, err = call([*mixed, "--weights", "model.safetensors", *other], capsys, monkeypatch)
    assert code == 2 and "im has inputs of shape (1, 9, 9), the training data (1, 8, 8)" in err


def test_options_of_other_data_are_refused(home, capsys, monkeypatch):
    code, _, err = call([*FORGET, "--weights", "model.safetensors", "--mean", "0.5", "--std", "0.5"], capsys, monkeypatch)
    assert code == 2 and "--mean is not for world: data" in err


def test_leaks_are_told_by_name():
    x = torch.arange(8.0).reshape(4, 2)
    forget = Examples(x[:2], torch.tensor([0, 1]), torch.arange(2), names={0: "cat/1.png", 1: "dog/2.png"})
    test = Examples(x[1:3], torch.tensor([0, 0]), torch.arange(2))
    with pytest.raises(SplitError, match=r"under another target \(a leak\), the first has id dog/2.png"):
        Split(forget, None, test).check()


def test_names_go_along_with_rows():
    data = Examples(torch.zeros(3, 1), torch.zeros(3), torch.tensor([5, 6, 7]), names={5: "a", 6: "b", 7: "c"})
    both = data.take([2]).joined(Examples(torch.zeros(1, 1), torch.zeros(1), torch.tensor([9]), names={9: "z"}))
    assert [both.called(i) for i in both.ids.tolist()] == ["c", "z"]


def test_a_test_folder_is_read_by_the_schema_of_train(home):
    pictures(home / "train", [str(k) for k in range(12)], n=3, side=8, mode="L")
    pictures(home / "test", ["10", "11"], n=1, side=8, mode="L", value=200)
    (home / "nets12.py").write_text("from expunge.modalities.nets import small_cnn\ndef build():\n    return small_cnn(8, classes=12)\n")
    modality = named("classification")
    given = {o.name: o.default for o in modality.options} | {"train": "images:train", "test": "images:test", "weights": "none", "validation": ""}
    opened = modality.open(Request("py:nets12:build", "class:2", given))
    assert opened.split.test.y.tolist() == [10, 11]
    assert opened.read[0].endswith("classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")
    assert opened.read[1].startswith("preprocessing: nothing: pixels are fed as 0 to 1")
    assert opened.read[2] == "forget class:2: class 2, 3 of 36 records"
    sys.modules.pop("nets12")
