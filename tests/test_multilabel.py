"""Multi-label classifiers: the loss against PyTorch's, requests, gate, world, and the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import copied, small, toy

from expunge import Examples, Split, unlearn
from expunge.audits.core import Probe
from expunge.audits.verdict import selftest
from expunge.cli import app as cli
from expunge.core.errors import DataError, ModelError, SplitError
from expunge.core.modality import MODALITIES, Request
from expunge.core.registry import CHECKS, METHODS
from expunge.engine.run import preflight
from expunge.modalities.multilabel.modality import LEFT_OUT, MULTILABEL
from expunge.modalities.multilabel.request import read, sized
from expunge.modalities.multilabel.task import multilabel
from expunge.modalities.multilabel.worlds import ANSWERS, WRONG, answers
from expunge.modalities.worlds import world
from expunge.parts.reading import score


def batch(z: torch.Tensor, y: torch.Tensor) -> dict:
    return {"x": z, "y": y, "i": torch.arange(len(z))}


def test_loss_and_gradient_are_those_of_pytorch():
    g = torch.Generator().manual_seed(0)
    z = (20 * torch.randn(50, 7, generator=g)).clamp(-20, 20).requires_grad_()
    y = torch.randint(2, (50, 7), generator=g).float()
    out = multilabel().forward(nn.Identity(), batch(z, y))
    slow = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)
    torch.testing.assert_close(out.nll, slow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.mean, slow / 7, atol=1e-5, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(v.sum(), z)[0] for v in (out.nll, slow))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.pred.float(), z.detach().sigmoid())
    assert torch.equal(out.target.float(), y) and out.logits is out.labels is None and out.nll.dtype == torch.float32


def test_answers_beyond_measure_stay_finite():
    """A loss of a label is at most some 36.7, and its gradient there is 0 or right, never nan."""
    z = torch.tensor([[500.0, -500.0]], requires_grad=True)
    out = multilabel().forward(nn.Identity(), batch(z, torch.tensor([[0.0, 1.0]])))
    assert 73 < float(out.nll.detach()) < 74 and torch.isfinite(torch.autograd.grad(out.nll.sum(), z)[0]).all()
    half = multilabel().forward(nn.Identity(), batch(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)))
    assert half.nll.dtype == torch.float32 and half.pred.dtype == torch.float64


def test_preflight_says_what_is_wrong():
    model, task, split = small("multilabel")
    preflight(model, task, split)
    kept = split.retain
    for y, message in (
        (kept.y[:, 0], r"retain has targets of shape \(64,\); the model has 5 outputs, so they must be \(64, 5\)"),
        (kept.y[:, :4], r"targets of shape \(64, 4\)"),
        (kept.y.long(), "int64 targets from 0 to 1; they must be floating-point 0 and 1"),
        (kept.y / 2, "float32 targets from 0 to 0.5; they must be floating-point 0 and 1"),
    ):
        with pytest.raises(SplitError, match=message):
            preflight(model, task, replace(split, retain=replace(kept, y=y)))
    with pytest.raises(SplitError, match="the model cannot take the forget set's inputs"):
        preflight(nn.Linear(3, 5), task, split)
    with pytest.raises(SplitError, match="it must give K logits"):
        preflight(nn.Conv2d(1, 2, 3), task, split)
    MULTILABEL.fits(copied(model), split, "reference 1")
    with pytest.raises(SplitError, match="reference 1 gives answers of shape"):
        MULTILABEL.fits(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), split, "reference 1")
    with pytest.raises(SplitError, match="reference 1 cannot take the inputs"):
        MULTILABEL.fits(nn.Linear(3, 5), split, "reference 1")
    with pytest.raises(ModelError, match="there must be one per label"):
        task.forward(nn.Identity(), batch(torch.zeros(2, 3), torch.zeros(2, 2)))


def request(what: str = "ids:3,14", **options) -> Request:
    given = {o.name: o.default for o in MULTILABEL.options} | {"train": "world:digits-multi/train", "test": "world:digits-multi/test"} | options
    return Request("", what, given)


def test_requests():
    _, split, _ = sized(request("random:0.1@3"))
    assert len(split.forget) == 100 and split.forget.y.shape == (100, 5) and len(split.validation) == 150
    for asked, message in (
        (request("class:3"), "named by ids:17,42, ids:@file or random:0.1, not by 'class:3'"),
        (request("range:0..1"), "not by 'range:0..1'"),
    ):
        with pytest.raises(SplitError, match=message):
            sized(asked)
    for option in ({"train": "csv:a.csv?target=y"}, {"test": "parquet:a"}, {"validation": "images:a"}):
        with pytest.raises(DataError, match=r"records of several labels come from py:module:function or world:digits-multi, not from (csv|parquet|images):"):
            read(request(**option))
    assert MULTILABEL.kinds(split) == ("records",) and MULTILABEL.removed(split) == [] and MULTILABEL.holds("py:a:b") == 0


def test_what_is_adopted_is_what_runs():
    """The law tests run the methods; checks of any loss read something here, and KLOM, left out, reads the first answer alone."""
    model, task, split = small("multilabel")
    assert LEFT_OUT.keys() == {"klom"}
    both = {name for registry in (METHODS, CHECKS) for name, r in registry.items() if {"classification", "regression"} <= {*r.tasks}}
    found = {name for registry in (METHODS, CHECKS) for name, r in registry.items() if r.suits(task)}
    assert found == both - {"klom"} and "gradient_ascent" in found and "membership" in found and "scrub" not in found
    other = copied(model)
    with torch.no_grad():
        other[-1].bias[1:] += 3.0
    p = Probe(model, other, task, split, (model, copied(model), copied(model)), 0, {"forward": 1.0, "backward": 1.0, "seconds": 1.0})
    assert {r.name: r.value for r in CHECKS["klom"](p)}["klom.forget"] == 0, "all answers but the first moved"
    assert {r.name: r.value for r in CHECKS["drop"](p)}["drop.test"] > 0.03
    for name, check in CHECKS.items():
        if check.suits(task) and not check.slow:
            assert check(p), name


def test_the_gate_tells_a_model_that_knows_from_one_that_does_not():
    """Without references: doing nothing is refused, and a model trained without the records passes the rule of forgetting."""
    w = world("digits-multi")
    model, task, _ = toy("multilabel")
    split = w.split("random")
    p = Probe(model, model, task, split)
    rules = MULTILABEL.rules(p)
    assert rules.keys() == {"membership.loss_auc", "drop.test", "drop.retain"}
    assert all(t.usable for t in selftest(p, rules))
    assert MULTILABEL.rules(replace(p, references=(model, model))).keys() == {"membership.excess", "drop.test", "drop.retain"}


def test_world():
    """Each answer by hand for some digits; about WRONG of them are turned round, in every part."""
    from sklearn.datasets import load_digits

    w = world("digits-multi")
    assert w.scenarios == ("random", "digit") and w.train.y.shape == (1000, len(ANSWERS)) and len(w.split("random").forget) == 100
    y = load_digits().target
    assert set(y[w.split("digit").forget.ids.numpy()]) == {3} and 3 not in y[w.split("digit").retain.ids.numpy()]
    for part in (w.train, w.validation, w.test):
        true = answers(torch.as_tensor(y)[part.ids].long(), part.x)
        assert abs(float((true != part.y).float().mean()) - WRONG) < 0.02
    assert answers(torch.tensor([0, 3, 8]), torch.zeros(3, 1, 8, 8))[:, :4].tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1]]
    upper = torch.zeros(1, 1, 8, 8)
    upper[:, :, 3] = 1
    assert float(answers(torch.tensor([0]), upper)[0, 4]) == 1 and float(answers(torch.tensor([0]), upper.flip(2))[0, 4]) == 0
    model = toy("multilabel")[0]
    right = [float(((s := score(model, w.task, d)).pred.round() == s.target).float().mean()) for d in (w.train, w.test)]
    assert right[0] > 0.99 and 0.84 < right[1] < 0.92, right


def test_a_library_user_needs_five_lines():
    model, _, split = small("multilabel")
    data = split.retain
    gone, kept = data.take([3, 14]), data.take([k for k in range(len(data)) if k not in (3, 14)])
    attempt = unlearn("fine_tune", model, multilabel(), Split(gone, kept, split.test), epochs=1)
    assert attempt.outcome == "ok" and isinstance(gone, Examples)


def test_command_line_end_to_end(tmp_path, capsys, monkeypatch):
    """plan, forget, apply, revert and audit with a factory, weights and data of one's own."""
    from expunge.modalities.files.models import save_state

    model = toy("multilabel")[0]
    save_state(model, tmp_path / "m.safetensors")
    (tmp_path / "answering.py").write_text(
        "from expunge.modalities.worlds import world\n\n\ndef model():\n    return world('digits-multi').build()\n\n\n"
        "def train():\n    d = world('digits-multi').train\n    return d.x, d.y\n"
    )
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expunge", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    about = ("--task", "multilabel", "--model", "py:answering:model", "--weights", "m.safetensors", "--train", "py:answering:train",
             "--test", "world:digits-multi/test", "--forget", "random:0.1")  # fmt: skip
    code, out, err = call("plan", "py:answering:train", "random:0.1", "--task", "multilabel")
    assert code == 0 and "gradient_ascent" in out, err
    code, out, err = call("forget", *about, "--method", "retrain", "--epochs", "20", "--quick", "--out", "out", "--json")
    document = json.loads(out)
    assert document["task"] == "multilabel" and document["tries"][0]["outcome"] == "ok", err
    patch = unlearn("fine_tune", model, multilabel(), world("digits-multi").split("random"), epochs=1).patch.save(tmp_path / "p.safetensors")
    code, out, err = call("apply", patch.name, "--model", "py:answering:model", "--weights", "m.safetensors", "--out", "clean.safetensors")
    assert code == 0 and "wrote clean.safetensors" in out, err
    code, out, err = call("revert", "clean.undo.safetensors", "--model", "py:answering:model", "--weights", "clean.safetensors", "--out", "back.safetensors")
    assert code == 0 and (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes(), err
    code, out, err = call("audit", *about, "--after", "clean.safetensors", "--quick", "--json")
    assert code in (0, 1) and json.loads(out)["task"] == "multilabel", err
    code, out, err = call("forget", *about[:-1], "class:3")
    assert code and err.strip().count("\n") == 0 and "not by 'class:3'" in err
    assert MODALITIES["multilabel"].spelling == "multilabel"
