"""The house: rooms and their sizes, what may be named where, public names, the records of modalities. `make check` holds the import contracts."""

from __future__ import annotations

import ast
import importlib
import pydoc
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import expunge
from expunge.core import modality
from expunge.core.errors import SettingError, SplitError
from expunge.core.modality import MODALITIES, Later, Modality, Option, holding, named, of
from expunge.core.registry import CHECKS, METHODS
from expunge.modalities.worlds import worlds

ROOT = Path(expunge.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
KINDS = {"Texts", "Pictures", "Examples"}
OWN = ("modalities/", "methods/", "audits/*/", "data/*/")
"""Where record types may be named and tasks told apart: a modality's folder, methods, and the rooms of checks and of data, each of which is about one kind."""


def home(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def asked(path: Path) -> list[str]:
    """Names of record types in the code of a file (docstrings are no code), and comparisons of a task's name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        found += [n for n in (getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")) if n in KINDS]
        if isinstance(node, ast.Compare):
            found += [ast.unparse(node) for side in (node.left, *node.comparators) if ast.unparse(side).endswith("task.name")]
    return found


def test_at_most_14_rooms_and_14_files_in_a_room():
    rooms = [p.name for p in ROOT.iterdir() if not p.name.startswith("__") and p.name != "py.typed"]
    assert len(rooms) <= 14
    for folder in {p.parent for p in FILES}:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= 14 or folder.parent.name == "methods", f"{home(folder)} holds {len(files)} files"


def test_outside_its_own_rooms_nothing_asks_which_modality_it_is():
    for path in FILES:
        if not any(path.relative_to(ROOT).match(f"{own}**/*") or home(path).startswith(own) for own in OWN[:2]) and not _inner(path):
            assert asked(path) == [], home(path)


def _inner(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return parts[0] in ("audits", "data") and len(parts) > 2


def test_that_law_finds_what_it_looks_for(tmp_path):
    (tmp_path / "a.py").write_text('"""Examples in words."""\nfrom x import Texts\nif task.name == "y" or isinstance(z, Pictures): pass\n')
    assert sorted(asked(tmp_path / "a.py")) == ["Pictures", "Texts", "task.name == 'y'"]


def test_public_names():
    """No public name is a submodule (a function at first, a module ever after), all are seen by dir, help and type checkers."""
    assert {p.stem for p in ROOT.iterdir()} & set(expunge.__all__) == set()
    assert dir(expunge) == sorted(expunge.__all__)
    import expunge.planning.plan as module

    assert expunge.plan is module.plan and callable(expunge.plan) and expunge.forget is module.forget
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    typed = {
        (alias.asname, f"{node.module}".removeprefix("expunge."), alias.name) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    packages = {n: expunge._WHERE[n] for n in expunge._PACKAGES}
    assert typed == {(n, *(packages[n].rsplit(".", 1) if n in packages else (where, n))) for n, where in expunge._WHERE.items()}
    assert (ROOT / "py.typed").exists()
    assert "forget" in pydoc.render_doc(expunge)
    for factory in ("classification", "regression", "causal_lm", "diffusion", "gan", "image_to_image", "contrastive", "text_classification", "multilabel"):
        assert of(expunge.classification()).name == "classification" and getattr(expunge, factory) is MODALITIES[factory].task.found


@pytest.mark.parametrize("name", list(MODALITIES))
def test_a_modality_is_whole(name):
    """Its functions are there and stand in its own folder or in what several share; its options have a type and say something; its worlds are its own."""
    m = MODALITIES[name]
    folder = f"expunge.modalities.{importlib.import_module(m.task.found.__module__).__name__.split('.')[2]}."
    shared = tuple(f"expunge.modalities.{n}" for n in ("records", "near", "files.requests", "examples", "classification.rules"))
    for f in fields(Modality):
        value = getattr(m, f.name)
        for it in (value, getattr(value, "func", None), *(vars(value).values() if f.name == "search" else ())):
            if isinstance(it, Later):
                assert callable(it.found)
                assert it.where.startswith(folder) or it.where.split(":")[0] in shared, it.where
    assert all(isinstance(o.default, (str, int, float, bool)) and o.help.endswith(".") for o in m.options)
    assert m.filed == (m.load is not Modality("", "", m.task).load), "models in files can be loaded alone, to be held to a report"
    assert m.worlds and all(worlds()[w] is m for w in m.worlds)
    assert [c for c in CHECKS if CHECKS[c].suits(type("T", (), {"name": name})())], "no check reads it"
    assert [k for k in METHODS if METHODS[k].suits(type("T", (), {"name": name})())], "no method works on it"


def test_tasks_are_named_with_either_stroke():
    assert named("causal-lm") is named("causal_lm") is MODALITIES["causal_lm"]
    with pytest.raises(SettingError, match="no task 'causal'; did you mean 'causal-lm'"):
        named("causal")
    with pytest.raises(SettingError, match="no task 'gan'"):
        named("gan")  # read by the library alone


def test_a_folder_or_factory_is_told_by_its_modality(tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    asked = (tmp_path / "pipe", tmp_path / "model", tmp_path / "texts", "py:models:factory")
    assert [holding(str(p)).name for p in asked] == ["diffusion", "causal_lm", "text_classification", "classification"]


def test_a_modality_of_someone_else_is_found(monkeypatch):
    """By entry point, as methods and checks are; its options are on the command line."""
    from expunge.cli.options import known
    from expunge.core.lookup import Registry

    mine = Modality("sound", "sound models", lambda: None, options=(Option("pitch", 1.0, "How high."),), open=lambda request: None)
    registry = Registry("expunge.modalities", "modality", only="^nothing$")
    monkeypatch.setattr("expunge.core.lookup.entry_points", lambda group: [type("E", (), {"load": lambda self: registry.add(mine)})()])
    assert dict(registry) == {"sound": mine} and mine.filed and mine.spelling == "sound"
    monkeypatch.setattr("expunge.cli.options.MODALITIES", registry)
    assert known() == {"pitch": [(mine, mine.options[0])]}
    assert modality.MODALITIES is MODALITIES and "sound" not in MODALITIES


def test_inputs_may_have_names():
    """Token ids and masks: taken, joined and told apart as rows of one tensor are."""
    x = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3, dtype=torch.long)}
    data = expunge.Examples(x, torch.tensor([0, 1, 0, 1]), torch.arange(4))
    assert len(data) == 4 and data.take([2]).x["input_ids"].tolist() == [[6, 7, 8]] and data[1][0]["input_ids"].tolist() == [3, 4, 5]
    assert data.take([0, 1]).joined(data.take([2, 3])).keys == data.keys and len(set(data.keys)) == 4
    other = expunge.Examples({**x, "attention_mask": x["attention_mask"] * 0}, data.y, data.ids)
    assert not set(other.keys) & set(data.keys) and "'input_ids': (3,)" in repr(data)
    assert data.fault == "" and expunge.Examples({"x": torch.tensor([[torch.nan]])}, data.y[:1], data.ids[:1]).fault
    with pytest.raises(SplitError, match="found 3 and 4, 4 and 4"):
        expunge.Examples({**x, "attention_mask": torch.ones(3, 3)}, data.y, data.ids)


def test_the_list_of_commands_says_what_they_say():
    """`expunge --help` imports no command: its lines are the first paragraphs of their help."""
    from expunge.cli.app import COMMANDS

    for name, (file, about) in COMMANDS.items():
        command = getattr(importlib.import_module(f"expunge.cli.{file}"), name.replace("-", "_"))
        assert " ".join((command.__doc__ or "").split("\n\n")[0].split()) == about
