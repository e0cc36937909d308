"""What comes back from `unlearn` and `forget` is used without any other call: the edited copy, the patch, the report, a folder."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from worlds import copied, digits, small

import expunge
from expunge.core.digest import model_digest
from expunge.core.errors import GateError, ModelError
from expunge.engine import results
from expunge.engine.likeness import likeness
from expunge.engine.run import Attempt, unlearn
from expunge.modalities.files import models
from expunge.planning.outcome import Try


@pytest.fixture(scope="module")
def world():
    model, task, split = digits()
    cut = replace(split, forget=split.forget.take(range(20)), retain=split.retain.take(range(60)), test=split.test.take(range(60)), validation=None)
    return copied(model), task, cut


@pytest.fixture(scope="module")
def attempt(world):
    return unlearn("gradient_ascent", *world, lr=0.01, epochs=1)


def verdict_of(world, rule):
    return expunge.forget(*world, methods=["gradient_ascent"], settings={"gradient_ascent": {"lr": 0.01, "epochs": 1}}, rules={"accuracy.forget": rule},
                          require="supported", slow=False)  # fmt: skip


def test_a_run_gives_its_model_its_report_and_a_marked_folder(world, attempt, tmp_path):
    model, task, split = world
    before = model_digest(model)
    after = attempt.model()
    twin = copied(model)
    attempt.patch.apply(twin)
    assert model_digest(after) == model_digest(twin) != before == model_digest(model) and after is not attempt.model()
    assert json.loads(json.dumps(attempt.report))["patch"] == {"digest": attempt.patch.digest, "places": attempt.patch.places}
    out = attempt.release(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "NOT-AUDITED.txt"} and "gradient_ascent" in (out / "NOT-AUDITED.txt").read_text()
    assert likeness(after, models.plain(model, out), task, split).told.startswith("loaded back it is the audited model bit for bit")
    with pytest.raises(ModelError, match="out is there already"):
        attempt.release(out)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_run_without_a_patch_or_from_another_process_says_so(world, attempt):
    none = unlearn("gradient_ascent", *world, lr=0.0, epochs=1)
    assert none.outcome == "no_op"
    with pytest.raises(ModelError, match="left no patch"):
        none.model()
    for there in (copy.copy(attempt), Attempt("given", {}, 0, "ok", "", attempt.patch)):
        assert there.patch.digest == attempt.patch.digest
        with pytest.raises(ModelError, match="is not known here"):
            there.model()


def test_a_verdict_that_passed_is_released_as_it_was_audited(world, tmp_path):
    model, _, _ = world
    verdict = verdict_of(world, "<= 1.0")
    assert verdict.shown is not None and verdict.patch is verdict.shown.attempt.patch
    assert verdict.report["verdict"]["passed"] is verdict.passed
    passed = replace(verdict, passed=True, chosen=verdict.shown, reasons=[])
    out = passed.release(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"model.safetensors"}
    assert model_digest(models.plain(model, out)) == model_digest(passed.model()) != model_digest(model)


def test_a_refused_candidate_is_looked_at_and_kept_marked(world, tmp_path):
    model, _, _ = world
    verdict = verdict_of(world, "<= -1.0")
    assert not verdict.passed and verdict.shown is not None
    assert model_digest(verdict.model()) == model_digest(verdict.model(verdict.tries[0])) != model_digest(model)
    with pytest.raises(GateError, match=r"nothing passed, so nothing is released .*anyway=True"):
        verdict.release(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = verdict.release(tmp_path / "out", anyway=True)
    assert "did not pass its gate" in (out / "NOT-PASSED.txt").read_text()
    never = replace(verdict, tries=tuple(Try(t.attempt) for t in verdict.tries))
    assert never.shown is None and never.patch is None and never.document()["front"]["of"] == {}


def test_a_language_model_goes_out_as_its_library_writes_it(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, task, split = small("causal_lm")
    found = unlearn("npo", model, task, split, epochs=1, lr=1e-2, lora=2)
    out = found.release(tmp_path / "out")
    assert model_digest(AutoModelForCausalLM.from_pretrained(out)) == model_digest(found.model())
    assert AutoTokenizer.from_pretrained(out).vocab_size == split.forget.format.tokenizer.vocab_size


def test_a_folder_that_is_not_the_edited_model_is_taken_away(world, attempt, tmp_path, monkeypatch):
    """The control: what is loaded back is the model before."""
    monkeypatch.setattr(results, "plain", lambda model, folder: copy.deepcopy(model))
    with pytest.raises(ModelError, match="the folder is not the edited model"):
        attempt.release(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_likeness_reads_more_than_the_bits(world):
    """A model of the same weights whose answers differ is another model; one that answers alike with other bits may stand for it."""
    model, task, split = world
    twin = copied(model)
    assert likeness(model, twin, task, split).bits
    twin.register_forward_hook(lambda *args: args[-1] * 1.01)
    found = likeness(model, twin, task, split)
    assert found.bits and not found.same and 0.005 < found.apart < 0.02
    twin = copied(model)
    with torch.no_grad():
        next(twin.parameters()).mul_(1 + 1e-6)
    found = likeness(model, twin, task, split)
    assert not found.bits and found.same and 0 < found.apart < 1e-4
    assert not likeness(model, twin, task, split, before=copied(twin)).same  # it is as far from the model before
