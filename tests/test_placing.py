"""Devices and float types: one place names them, options choose them, random numbers of all devices stay what they were."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from away import BACKEND, DEVICE, Away
from torch import nn
from typer.testing import CliRunner
from worlds import copied, digits, small

import expunge
from expunge.cli.app import application
from expunge.core.errors import ExpungeError, SettingError
from expunge.core.machine import devices
from expunge.core.modality import DEVICE as OPTION
from expunge.core.modality import MODALITIES, Opened, Placing, Request
from expunge.core.registry import METHODS
from expunge.parts.provenance import Reference
from expunge.planning import recipe

SOURCE = Path(expunge.__file__).parent
HOME = SOURCE / "core" / "machine" / "devices.py"
NAMED = ("cuda", "mps", "xpu", "cpu", "accelerator", "random", "get_rng_state", "set_rng_state", "device")
"""Of torch: what names a device, or the random numbers of one."""
WORDS = ("cuda", "mps", "cpu", "meta")


def namings(source: str) -> list[int]:
    """Lines that name a device: attributes of torch that do, arguments and comparisons that are a device's name, seeds of all global generators."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in NAMED:
            found += [] if node.attr == "device" else [node.lineno]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = [*node.args, *(k.value for k in node.keywords)]
            words = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if called in ("torch.device", "torch.manual_seed") or (called.rpartition(".")[2] in ("to", "device", "zeros", "tensor", "ones", "full") and
                                                                   any(w.split(":")[0] in WORDS for w in words)):  # fmt: skip
                found.append(node.lineno)
            if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                found.append(node.lineno)
        if isinstance(node, ast.Compare) and any(isinstance(c, ast.Constant) and c.value in WORDS for c in node.comparators):
            found.append(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_mps"):
            found.append(node.lineno)
    return found


def test_one_place_names_devices():
    """No file but `core/machine/devices.py` names a device; that the search sees one is shown by that file and by lines made up."""
    assert len(namings(HOME.read_text())) > 8
    for line in ("x.to('cuda:1')", "torch.cuda.is_available()", "d.type == 'cuda'", "torch.manual_seed(0)", "x.is_cuda", "torch.random.fork_rng()", "x.cuda()"):
        assert namings(line), line
    assert not namings("torch.Generator().manual_seed(0); x.to(y.device); x.cpu()")
    elsewhere = {str(p.relative_to(SOURCE)): found for p in SOURCE.rglob("*.py") if p != HOME and (found := namings(p.read_text()))}
    assert not elsewhere


@pytest.mark.parametrize("name", ["gpu", "cuda:-1", "cuda:x", "cpu:0", "", "mps:1", "CUDA", "cuda:99999"])
def test_wrong_names_are_refused(name):
    with pytest.raises(SettingError, match="no device") as raised:
        devices.device(name)
    assert "\n" not in str(raised.value)


def test_devices_that_are_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.device("auto").type == "cuda" and devices.device("cuda:1").index == 1
    with pytest.raises(SettingError, match="sees 2 CUDA"):
        devices.device("cuda:2")
    with pytest.raises(SettingError, match="no dtype 'float23'"):
        devices.dtype("float23")


def test_placed_moves_and_casts():
    net = devices.placed(nn.Linear(2, 2), "cpu", "bfloat16")
    assert net.weight.dtype is torch.bfloat16
    assert devices.placed(nn.Linear(2, 2), "cpu").weight.dtype is torch.float32
    with pytest.raises(SettingError, match="not loaded"):
        devices.placed(nn.Linear(2, 2, device="meta"), "cpu")


@pytest.mark.parametrize("opened", [True, False])
def test_opened_models_stand_where_they_should(opened, monkeypatch):
    """All of a request's models are moved: model, references and the one to be audited."""
    monkeypatch.setattr(devices, "device", lambda name: DEVICE if name == "cuda:0" else devices.HOST)
    nets = [nn.Linear(2, 2) for _ in range(4)]
    with Away():
        reader = Placing(lambda request: Opened(nets[0], None, None, [nets[1], Reference(nets[2])], nets[3]) if opened else nets[0])
        reader(Request("", "", {"device": "cuda:0"}))
        assert [n.weight.device == DEVICE for n in nets] == ([True] * 4 if opened else [True, False, False, False])


def test_random_numbers_of_all_devices_are_kept():
    """A method leaves the generators of every device as they were, and one that fails does too; inside, the device draws from the seed."""
    model, task, split = small("classification")
    BACKEND.manual_seed(5)
    before, host = BACKEND.get_rng_state(), torch.get_rng_state()
    with Away(own=True):
        METHODS["gradient_ascent"](copied(model).to(DEVICE), task, split, epochs=1.0)
        with pytest.raises(RuntimeError, match="stop"), devices.reseeded(1):
            torch.randn(3, device=DEVICE)
            raise RuntimeError("stop")
        draws = []
        for _ in range(2):
            with devices.reseeded(7):
                draws.append(torch.randn(3, device=DEVICE).cpu())
    assert torch.equal(*draws)
    assert torch.equal(before, BACKEND.get_rng_state()) and torch.equal(host, torch.get_rng_state())


def test_every_modality_read_from_files_has_the_option():
    filed = [m for m in MODALITIES.values() if m.filed]
    assert len(filed) > 3
    for m in filed:
        assert [o for o in m.options if o.name == "device"] == [OPTION], m.name
        assert "dtype" in {o.name for o in m.options}, m.name


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model before and rows, as a user has them."""
    from expunge.modalities.files import models

    model, _, _ = digits()
    models.save_state(model, tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given_net.py").write_text("from expunge.modalities.nets import small_cnn\n\ndef make():\n    return small_cnn(8)\n")
    (tmp_path / "r.toml").write_text('model = "py:given_net:make"\nweights = "m.safetensors"\ntrain = "world:digits/train"\nforget = "class:3"\n')
    return tmp_path


@pytest.mark.parametrize("command", ["forget", "audit", "retrain", "select"])
def test_commands_refuse_devices_that_are_not_here(command, files):
    """One line, before anything is read: --device reaches the commands that load models."""
    given = ["--model", "py:no:where", "--device", "cuda:9999"]
    more = {
        "retrain": ["--training", "epochs=1", "--forget", "class:3", "--train", "world:digits/train"],
        "select": ["--weights", "no", "--train", "world:digits/train", "--size", "3"],
        "audit": ["--forget", "class:3", "--after", "x.safetensors"],
    }
    result = CliRunner().invoke(application([command]), [command, *given, *more.get(command, ["--forget", "class:3", "--train", "world:digits/train"])])
    assert result.exit_code
    wanted = "cannot call|no device" if command == "select" else "no device 'cuda:9999'"
    with pytest.raises(ExpungeError, match=wanted):
        raise result.exception or AssertionError(result.output)


def test_recipes_know_device_and_dtype(files):
    path = files / "r.toml"
    path.write_text(path.read_text() + 'device = "cuda:9999"\ndtype = "float64"\n')
    found = recipe.read(path)
    assert found.options["device"] == "cuda:9999" and found.options["dtype"] == "float64"
    with pytest.raises(SettingError, match="no device 'cuda:9999'"):
        recipe.run(found)


def test_a_cast_classifier_is_opened_in_its_type(files):
    path = files / "r.toml"
    found = recipe.read(path)
    modality = MODALITIES["classification"]
    for kind, wanted in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        options = {**{o.name: o.default for o in modality.options}, **found.options, "device": "cpu", "dtype": kind}
        net = modality.load(Request(found.model, "class:3", options, folder=files))
        assert {p.dtype for p in net.parameters()} == {wanted}
