"""Models that cannot be read, and models that moved by rounding alone: both are outcomes, of runs and of audits, and neither passes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from worlds import digits, original, small, small_answers

from expunge.audits import core
from expunge.audits.core import Probe, audit
from expunge.audits.named import RULES, lacking
from expunge.audits.references import believed
from expunge.core.edits import Hook, LowRank, Replace
from expunge.core.errors import Diverged, ModelError
from expunge.core.hooks import ATTRIBUTE
from expunge.core.patch import Patch
from expunge.core.registry import CHECKS, METHODS
from expunge.engine.rounding import alike
from expunge.engine.run import Attempt, unlearn
from expunge.engine.sound import ALL, broken
from expunge.modalities.files import models
from expunge.planning.outcome import audited
from expunge.report import html, table


def changed(model: nn.Module, how: str) -> nn.Module:
    """A copy with one value, or all, replaced; `huge` leaves all finite."""
    after = copy.deepcopy(model)
    weights = list(after.parameters())
    with torch.no_grad():
        for p in weights:
            if how == "all":
                p.fill_(torch.nan)
            if how == "huge":
                p.mul_(1e30)
        if how in ("nan", "inf"):
            weights[-1].view(-1)[0] = float(how)
    return after


KINDS = ("classification", "regression", "multilabel", "causal_lm", "text_classification", "gan", "contrastive", "image_to_image")


@pytest.mark.parametrize("how", ["nan", "all", "inf", "huge"])
@pytest.mark.parametrize("kind", [*KINDS, pytest.param("diffusion", marks=pytest.mark.slow)])
def test_a_model_that_cannot_be_read_is_an_outcome(kind, how):
    model, task, split = small(kind)
    after = changed(model, how)
    if not (why := broken(after, task, split)):
        assert (kind, how) == ("causal_lm", "huge"), "norms take the scale out"
        return
    verdict = audited(model, after, task, split)
    (one,) = verdict.tries
    assert (verdict.passed, verdict.chosen, one.attempt.outcome, verdict.grade and verdict.grade.grade) == (False, None, "diverged", "refuted")
    assert verdict.reasons == [f"diverged: the model after {why}: it answers nothing that can be audited"]
    name = next(n for n, p in after.named_parameters() if not bool(torch.isfinite(p).all())) if how != "huge" else ""
    assert f"first in {name}:" in verdict.reasons[0] if name else "a loss on forget is" in verdict.reasons[0]
    document = verdict.document()
    assert document["identity"]["after"] and document["pictures"] == {} and document["sections"] == []
    page = html.render(document)
    assert "Not passed: refuted" in page and why in page and table.columns(document)[-1].outcome == "diverged"
    assert json.loads(table.dump(document))["verdict"]["grade"] == "refuted"


def test_finite_weights_with_answers_that_are_not():
    """A variance below zero: a root of it is no number, though every tensor is finite."""
    model, task, split = small("classification")
    after = copy.deepcopy(model)
    after[1].running_var.fill_(-1)
    assert broken(model, task, split) == "" and broken(after, task, split) == "gives answers that are not finite: a loss on forget is nan"
    assert audited(model, after, task, split).reasons[0].startswith("diverged: the model after gives answers")
    with pytest.raises(ModelError, match="the model before gives answers that are not finite"):
        audited(after, model, task, split)
    with pytest.raises(ModelError, match=r"the model before holds values that are not finite, first in 8\.bias"):
        audited(changed(model, "nan"), model, task, split)
    assert unlearn("gradient_ascent", after, task, split).reason == "the model given gives answers that are not finite: a loss on forget is nan"


def test_only_some_records_that_are_answered_by_no_number():
    """One input of test is beyond what the model can take."""
    model, task, split = small("classification")
    x = split.test.x.clone()
    x[3] = 1e38
    assert broken(model, task, replace(split, test=replace(split.test, x=x * 10)), ALL) == "gives answers that are not finite: a loss on test is nan"


def test_a_run_whose_model_answers_with_no_number_diverged(monkeypatch):
    model, task, split = small("classification")

    def some(model, task, split, *, lr: float = 0.1, seed: int = 0) -> Patch:
        task.collate(split.forget, torch.arange(len(split.forget)), None)
        return Patch((Replace("8.bias", model[8].bias.detach() + 1), Replace("1.running_var", model[1].running_var * 0 - 1)))

    monkeypatch.setitem(METHODS._found, "gradient_ascent", replace(METHODS["gradient_ascent"], function=some, cost=lambda n, s: (0, 0)))
    attempt = unlearn("gradient_ascent", model, task, split)
    assert (attempt.outcome, attempt.patch) == ("diverged", None)
    assert attempt.reason == "the model that it leaves gives answers that are not finite: a loss on forget is nan; lower lr or set clip; rolled back"
    assert float(model[1].running_var.min()) > 0


@pytest.mark.parametrize("how", ["nan", "huge"])
def test_a_reference_that_cannot_be_read_is_not_believed(how):
    model, task, split = small("classification")
    bad = changed(model, how)
    kept, refused = believed(Probe(model, model, task, split), [bad])
    assert not kept and "not finite" in refused[0].why


def test_an_attack_that_diverges_is_a_row(monkeypatch):
    """The audit goes on, and named checks say why theirs is not there."""
    model, task, split = small("classification")

    def diverges(p):
        raise Diverged("loss is nan at step 0")

    monkeypatch.setitem(CHECKS._found, "relearning", replace(CHECKS["relearning"], function=diverges))
    p = Probe(model, model, task, split, (copy.deepcopy(model),))
    rows = audit(p, ["relearning", "accuracy"])
    (row,) = [r for r in rows if r.name == "relearning"]
    assert row.note == "the attack's own training diverged on this model: loss is nan at step 0" and len(rows) > 2
    b3 = next(r for r in RULES if r.id == "B3")
    assert lacking(p, b3, {r.name: r for r in rows}) == row.note
    assert core.gate(rows, {"gap_closed.relearning": ">= 0.55"}) == ["gap_closed.relearning was not measured; the rule asks for >= 0.55"]


def edited(model: nn.Module, change: Any) -> nn.Module:
    after = copy.deepcopy(model)
    with torch.no_grad():
        for p in after.parameters():
            p.copy_(change(p))
    return after


@pytest.mark.parametrize(("change", "says"), [
    (lambda p: p, "has the weights of the model before, bit for bit"),
    (lambda p: p.bfloat16().float(), "is the model before, rounded to bfloat16"),
    (lambda p: p.half().float(), "is the model before, rounded to float16"),
    (lambda p: p * (1 + 2**-22), "differs from the model before by rounding alone, at most 4 units in the last place"),
    (lambda p: p * (1 + 2**-18), ""),
    (lambda p: p.bfloat16().float() * (1 + 2**-7), ""),
])  # fmt: skip
def test_how_little_separates_two_models(change, says):
    model, task, split = digits()
    assert alike(model, edited(model, change), task, split) == says


def test_what_stands_beside_the_weights_counts():
    """A guard, a hook of someone's own, another architecture, a buffer that counts: the weights alone do not make two models alike."""
    model, task, split = small("causal_lm")
    guarded = copy.deepcopy(model)
    Patch((Hook("none", "prefix", {}, {"tokens": [1], "bos": -1}),)).apply(guarded)
    assert alike(model, copy.deepcopy(model), task, split) and not alike(model, guarded, task, split)
    silent = copy.deepcopy(model)
    setattr(silent, ATTRIBUTE, {"of prompts that are not here": None})
    assert not alike(model, silent, task, split)
    model, task, split = small("classification")
    for change in (lambda p: p, lambda p: p.bfloat16().float()):
        hooked = edited(model, change)
        assert alike(model, hooked, task, split)
        hooked[8].register_forward_hook(lambda module, given, out: out * 3)
        assert not alike(model, hooked, task, split)
    assert not alike(model, nn.Sequential(*model[:-1], nn.Linear(16, 9)), task, split)
    counted = copy.deepcopy(model)
    counted[1].running_mean += 1
    assert not alike(model, counted, task, split)


def test_few_units_that_records_feel_are_no_rounding():
    model, task, split = small("classification")
    with torch.no_grad():
        model[-1].weight.mul_(1e6)
    assert not alike(model, edited(model, lambda p: p * (1 + 2**-22)), task, split)


@pytest.mark.parametrize("change", [lambda p: p, lambda p: p * (1 + 2**-22)])
def test_an_audit_of_what_did_not_move_says_so_and_never_passes(change, monkeypatch):
    """Under a rule that the model meets as it is, and without named checks, which see that it knows the class."""
    monkeypatch.setattr("expunge.planning.outcome.named", lambda *_: [])
    model, task, split = digits()
    after, small_step = edited(model, change), edited(model, lambda p: p * (1 + 2**-12))
    given = {"slow": False, "rules": {"accuracy.test": ">= 0.5"}, "require": "supported"}
    verdict = audited(model, after, task, split, **given)
    assert verdict.tries[0].attempt.outcome == "no_op" and not verdict.passed and verdict.chosen is None
    assert verdict.reasons[0] == f"no op: the model after {alike(model, after, task, split)}: nothing was unlearned"
    assert verdict.grade and verdict.grade.grade == "inconclusive" and verdict.tries[0].rows
    moved = audited(model, small_step, task, split, **given)
    assert moved.tries[0].attempt.outcome == "ok" and moved.passed


def test_a_run_that_came_with_its_own_outcome_keeps_it():
    model, task, split = small_answers()
    attempt = Attempt("salun", {}, 0, "partial", "worked on 1 of 2", Patch((LowRank("x", torch.ones(1, 1), torch.ones(1, 1)),)))
    assert audited(model, copy.deepcopy(model), task, split, attempt=attempt, slow=False).tries[0].attempt.outcome == "partial"


@pytest.mark.parametrize("form", ["after", "patch"])
def test_the_command_line_reports_what_cannot_be_read(form, tmp_path, monkeypatch):
    """A report and exit code 1, as for any candidate that is refuted."""
    from expunge.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wide.py").write_text("from expunge.modalities.nets import small_cnn\ndef build():\n    return small_cnn(8)\n")
    model = original("digits")
    models.save_state(model, tmp_path / "model.safetensors")
    after = changed(model, "nan")
    models.save_state(after, tmp_path / "after.safetensors")
    name, tensor = list(after.named_parameters())[-1]
    Patch((Replace(name, tensor.detach().clone()),)).stamped(model).save(tmp_path / "patch.safetensors")
    words = ["audit", "--model", "py:wide:build", "--weights", "model.safetensors", "--train", "world:digits/train", "--test", "world:digits/test",
             "--forget", "class:3", f"--{form}", f"{form}.safetensors", "--out", "out"]  # fmt: skip
    said, left = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(left), pytest.raises(SystemExit) as ended:
        app.main()
    sys.modules.pop("wide", None)
    assert ended.value.code == 1, left.getvalue()
    printed = " ".join(said.getvalue().split())
    assert "REFUTED" in printed and f"first in {name}" in printed
    assert json.loads((tmp_path / "out" / "latest" / "report.json").read_text())["tries"][0]["outcome"] == "diverged"
    assert f"first in {name}" in (tmp_path / "out" / "latest" / "report.html").read_text()
