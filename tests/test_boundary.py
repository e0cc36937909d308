"""Where things break: one outcome, one line, one exit code; a user's mistake is theirs, a method's failure a try, a bug a file to send."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from worlds import copied, same, small, state

from expunge.cli import app, boundary
from expunge.core import guard
from expunge.core.errors import DataError, ModelError, RecipeError, SettingError, SplitError, plain
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn
from expunge.parts.updates import gradients
from expunge.planning import plan, recipe
from expunge.planning.outcome import audited


@pytest.fixture
def called(monkeypatch, capsys, tmp_path):
    """(words, or what raises) -> exit code and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(words, call=None):
        if call is not None:
            return boundary.ended(call, words), capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["expunge", *words])
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code, capsys.readouterr().err

    return call


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("two\nlines \x1b[31m"), 2, "expunge: two\\nlines \\x1b[31m\n"),
        (KeyboardInterrupt(), 130, "expunge: interrupted; the same command goes on where it was stopped\n"),
        (OSError(28, "No space left on device", "out/x.json"), 2, "expunge: x.json: No space left on device\n"),
        (PermissionError(13, "Permission denied", "/srv/out"), 2, "expunge: out: Permission denied\n"),
        (MemoryError(), 2, "expunge: MemoryError: no message\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "expunge: there is not enough memory"),
        (BrokenPipeError(), 141, ""),
        (SystemExit(1), 141, ""),
        (SystemExit(0), 0, ""),
    ],
)
def test_exit_codes(error, code, said, called):
    """1 is the gate's alone."""
    found, err = called(["forget"], raising(error))
    assert found == code
    assert err.startswith(said) and err.count("\n") <= 1


def test_codes_of_commands(called):
    assert boundary.ended(lambda: None, []) == 0
    assert boundary.ended(lambda: 1, ["forget"]) == 1
    assert called(["forget", "--nosuch"])[0] == 2
    assert called(["nosuch"])[0] == 2
    assert called(["inspect", "none.safetensors"])[0] == 2
    assert called(["--version"])[0] == 0


def test_a_bug_is_a_file_without_data(called, tmp_path):
    """Types, places and versions; neither the message nor any argument."""
    try:
        {}["Alice Example"]
    except KeyError as error:
        kept = error
    code, err = called(["forget", "--model", "secret-model", "--forget=ids:17", "--task", "causal-lm"], raising(kept))
    assert code == 3 and "bug of expunge" in err
    (path,) = tmp_path.glob("expunge-bug-*.json")
    text = path.read_text()
    found = json.loads(text)
    assert found["command"] == "forget" and found["options"] == ["--model", "--forget", "--task"]
    assert found["errors"][0]["type"] == "KeyError" and any("test_boundary.py:" in f for f in found["errors"][0]["frames"])
    assert found["versions"]["torch"]
    assert not [secret for secret in ("Alice", "secret-model", "ids:17", str(Path.home()), str(tmp_path)) if secret in text]


def test_a_factory_that_fails_is_the_users(called, tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("def make():\n    raise RuntimeError('no\\nweights')\ndef leave():\n    raise SystemExit(1)\n")
    for name, said in (("make", "RuntimeError: no"), ("leave", "SystemExit: 1")):
        code, err = called(["forget", "--model", f"py:broken_net:{name}", "--train", "world:digits/train", "--forget", "class:3", "--weights", "none"])
        assert code == 2 and said in err and "(broken_net.py, line" in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("methods = [1]", "methods in r.toml must list texts, not 1"), ("references = [[]]", "must list texts"), ("seed = -1", "seed must be a whole number"),
        ("seed = 99999999999", "seed must be"), ("minutes = inf", "finite"), ("retrain_epochs = nan", "finite"), ("twins = -2", "finite number, 0 or more"),
        ("[gate]\n'accuracy.forget' = 3", "must map rows to rules"),
    ],
)  # fmt: skip
def test_recipes_of_wrong_kinds(line, said, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(f'model = "py:m:f"\ntrain = "world:digits/train"\nforget = "class:3"\n{line}\n')
    with pytest.raises(RecipeError, match=said) as raised:
        recipe.read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given", [{"epochs": "inf"}, {"epochs": "1e400"}, {"lr": "nan"}, {"lr": "inf"}, {"batch_size": 0}, {"batch_size": "inf"}, {"lr": -1.0}]
)
def test_settings_out_of_range(given):
    with pytest.raises(SettingError, match=r"scrub's (epochs|lr|batch_size) must be"):
        METHODS["scrub"].settings(given)


def test_settings_that_may_be_infinite():
    assert METHODS["rmu"].settings({"clip": "inf"})["clip"] == METHODS["gradient_ascent"].settings({"bound": "inf"})["bound"] == float("inf")


@pytest.mark.parametrize("seed", [-1, 1 << 32, True, 1.5, "3", None])
def test_seeds_out_of_range(seed):
    model, task, split = small("classification")
    for call in (
        lambda: unlearn("scrub", model, task, split, seed=seed),
        lambda: METHODS["scrub"](model, task, split, seed=seed),
        lambda: plan.forget(model, task, split, seed=seed),
        lambda: audited(model, copied(model), task, split, seed=seed),
    ):
        with pytest.raises(SettingError, match="seed must be a whole number from 0 to 4294967295"):
            call()


def test_a_run_of_years_is_refused_with_its_cost():
    """1e9 epochs are refused at once, with the time that they would take, with a budget too; what takes seconds is not."""
    model, task, split = small("classification")
    with pytest.raises(SettingError, match=r"scrub with epochs=1e\+09 would pass .* examples, \d+ days or more at this model's speed"):
        unlearn("scrub", model, task, split, epochs=10**9)
    with pytest.raises(SettingError, match="years"):
        unlearn("gradient_ascent", model, task, split, epochs=1e13, guard=guard.Guard(max_steps=3))
    assert unlearn("gradient_ascent", model, task, split, epochs=100.0, guard=guard.Guard(max_steps=3)).meter.steps == 3


class Flow(nn.Module):
    """Reads a value to choose its way, which cannot be mapped."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.l(x) if float(x.sum()) > 0 else 2 * self.l(x)


def test_per_sample_gradients_of_a_forward_pass_that_reads_values():
    """One after another where they cannot be mapped: the same gradients as those of a network without the branch."""
    _, task, split = small("classification")
    torch.manual_seed(0)
    flow, plainly = Flow(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    plainly[1].load_state_dict(flow.l.state_dict())
    a, b = gradients.rows(flow, task, split.forget), gradients.rows(plainly, task, split.forget)
    torch.testing.assert_close(a, b)
    assert unlearn("ssd", Flow(), task, split).outcome != "failed"


@pytest.mark.parametrize(("times", "held"), [(0, 64), (5, 5), (1, 1)])
def test_per_sample_gradients_take_no_more_than_their_memory(times, held, monkeypatch):
    """As many at once as there is memory for; the sum is the same."""
    model, task, split = small("classification")
    monkeypatch.setattr(gradients, "_each", (lambda seen, each: lambda f, p, b: (seen.append(len(b["i"])), each(f, p, b))[1])(seen := [], gradients._each))
    params = sum(p.numel() for p in model.parameters())
    whole, n = gradients.squares(model, task, split.retain)
    seen.clear()
    with guard.watching(guard.Guard(memory=times * params * 4)):
        found, m = gradients.squares(model, task, split.retain)
    assert n == m and max(seen) == held
    for name in whole:
        torch.testing.assert_close(whole[name], found[name])


def test_targets_that_are_not_numbers():
    model, task, split = small("regression")
    y = split.retain.y.clone()
    y[7] = float("nan")
    with pytest.raises(SplitError, match=f"retain holds targets that are not finite: 1 of 64 records, the first with id {int(split.retain.ids[7])}"):
        unlearn("fine_tune", model, task, replace(split, retain=replace(split.retain, y=y)))


def test_models_of_another_shape():
    """A model after that cannot take the data, and a reference that is no model, are one line."""
    model, task, split = small("classification")
    with pytest.raises(ModelError, match=r"the model after does not fit .* 5 outputs"):
        audited(model, nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), task, split, slow=False)
    with pytest.raises(ModelError, match="is str, no torch module"):
        audited(model, copied(model), task, split, references=["weights"], slow=False)


def test_batch_norm_of_one_record_is_told():
    _, task, split = small("classification")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).eval()
    attempt = unlearn("gradient_ascent", net, task, replace(split, forget=split.forget.take([0])))
    assert attempt.outcome != "failed" or "batch norm needs two records" in attempt.reason
    assert "batch norm needs two records" in plain(ValueError("Expected more than 1 value per channel when training, got input size torch.Size([1, 8])"))


def failing(name, error):
    """A method's record whose function raises."""

    def function(*_, **__):
        raise error

    return replace(METHODS[name], function=function)


def test_one_methods_exception_is_a_try_and_the_autopilot_goes_on(monkeypatch):
    """Its own failure is `failed` with its reason; the other method is tried; the model stays as it was."""
    model, task, split = small("classification")
    before, scrub = state(model), METHODS["scrub"]
    real = type(scrub).__call__
    monkeypatch.setattr(type(scrub), "__call__", lambda self, *a, **k: raising(TypeError("boom"))() if self.name == "scrub" else real(self, *a, **k))
    verdict = plan.forget(model, task, split, methods=["scrub", "gradient_ascent"], slow=False, stop=False, scales=(1.0,))
    outcomes = {t.attempt.method: t.attempt for t in verdict.tries}
    assert outcomes["scrub"].outcome == "failed" and "TypeError: boom" in outcomes["scrub"].reason
    assert outcomes["gradient_ascent"].outcome != "failed"
    assert same(before, state(model))


@pytest.mark.parametrize("what", ["audit", "validation"])
def test_an_exception_in_reading_a_try_is_that_try(what, monkeypatch):
    from expunge.planning import search

    model, task, split = small("classification")
    if what == "audit":
        monkeypatch.setattr(plan, "examined", lambda p, attempt, *a, **k: raising(TypeError("boom"))())
    else:
        monkeypatch.setattr(search, "patched", lambda *_: raising(TypeError("boom"))())
    verdict = plan.forget(model, task, split, methods=["scrub"], slow=False, stop=False, scales=(1.0,))
    assert not verdict.passed
    assert any(t.attempt.outcome == "failed" and f"{what} broke off: TypeError: boom" in t.attempt.reason for t in verdict.tries)
