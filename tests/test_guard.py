"""Outcomes, budgets, validation and checkpoints of guarded runs."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import copied, same, small, state

from expunge.core.errors import ScopeError, SplitError
from expunge.core.guard import Guard
from expunge.engine.run import unlearn

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm"])


def test_diverged_rolls_back():
    model, task, split = small("classification")
    before = state(model)
    attempt = unlearn("gradient_ascent", model, task, split, lr=1e30, bound=0.0, epochs=20)
    assert attempt.outcome == "diverged"
    assert attempt.patch is None
    assert "lower lr" in attempt.reason
    assert same(before, state(model))


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": 1e-60}])
def test_no_op_is_named(settings):
    model, task, split = small("classification")
    attempt = unlearn("gradient_ascent", model, task, split, **settings)
    assert (attempt.outcome, attempt.patch) == ("no_op", None)
    assert "bit-identical" in attempt.reason


def test_saturated_bound_reaches_no_weight():
    model, task, split = small("classification")
    attempt = unlearn("gradient_ascent", model, task, split, bound=1e-6)
    assert attempt.outcome == "no_op"


def test_budget_stops_and_is_ok():
    model, task, split = small("classification")
    attempt = unlearn("salun", model, task, split, epochs=5, guard=Guard(max_steps=4))
    assert (attempt.outcome, attempt.meter.steps) == ("ok", 4)
    assert "budget" in attempt.reason


def test_best_on_validation_is_kept():
    """A score that prefers the first evaluation gives the patch of exactly that many steps."""
    model, task, split = small("classification")
    calls = []

    def falling(_) -> float:
        calls.append(1)
        return -float(len(calls))

    kept = unlearn("gradient_ascent", model, task, split, epochs=3, batch_size=4, guard=Guard(validate=falling, every=2))
    short = unlearn("gradient_ascent", model, task, split, epochs=3, batch_size=4, guard=Guard(max_steps=2))
    assert kept.patch.digest == short.patch.digest


def test_a_method_with_several_sessions_can_be_validated():
    """SLUG opens one session per layer tried; each is settled on its own tensors."""
    model, task, split = small("classification")
    scores = iter(range(100, 0, -1))
    attempt = unlearn("slug", model, task, split, guard=Guard(validate=lambda _: float(next(scores)), every=1))
    assert attempt.outcome in ("ok", "no_op")


def test_validation_never_looks_at_a_helper_network():
    """A proxy that a method trains first is not what validation is about: scoring it would put its weights into the model."""
    model, task, split = small("regression")
    seen = []
    attempt = unlearn("blindspot", model, task, split, guard=Guard(validate=lambda m: seen.append(m) or 0.0, every=1))
    assert attempt.outcome == "ok"
    assert len(seen) >= 2 and all(m is seen[-1] for m in seen)


def test_patience_stops():
    model, task, split = small("classification")
    attempt = unlearn("salun", model, task, split, epochs=9, batch_size=4, guard=Guard(validate=lambda _: 0.0, every=1, patience=2))
    assert attempt.meter.steps == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"test": s.forget}, "also stand in test"),
        (lambda s: {"forget": s.forget.take([])}, "forget is empty"),
        (lambda s: {"retain": s.retain.take([])}, "retain is empty"),
        (lambda s: {"forget": replace(s.forget, y=s.forget.y + 10)}, "labels must be integers in 0..9"),
        (lambda s: {"forget": replace(s.forget, x=s.forget.x * torch.nan)}, "not finite"),
        (lambda s: {"forget": replace(s.forget, x=s.forget.x.repeat(1, 3, 1, 1))}, "cannot take"),
    ],
)
def test_bad_splits_change_nothing(change, words):
    model, task, split = small("classification")
    before = state(model)
    with pytest.raises(SplitError, match=words):
        unlearn("salun", model, task, replace(split, **change(split)))
    assert same(before, state(model))


def test_frozen_model_is_refused():
    model, task, split = small("classification")
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ScopeError, match="no trainable weight"):
        unlearn("salun", model, task, split)


def test_damaged_checkpoint_is_skipped(tmp_path, monkeypatch):
    from expunge.core.journal import Journal

    model, task, split = small("classification")
    whole = unlearn("salun", model, task, split, epochs=2, batch_size=4)
    close = Journal.close

    def stop(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "close", stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn("salun", model, task, split, epochs=2, batch_size=4, folder=tmp_path, checkpoint_every=7)
    monkeypatch.setattr(Journal, "close", close)
    files = sorted(tmp_path.glob("step-*"))
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-50])
    with pytest.warns(UserWarning, match="damaged and was skipped"):
        again = unlearn("salun", model, task, split, epochs=2, batch_size=4, folder=tmp_path, checkpoint_every=7)
    assert again.patch.digest == whole.patch.digest
    assert not list(tmp_path.glob("step-*"))


def test_half_precision_resumes_with_its_masters(tmp_path, monkeypatch):
    """The float32 masters of bfloat16 weights are part of a checkpoint: the weights alone would resume from rounded values."""
    from expunge.core.journal import Journal

    def half() -> tuple:
        model, task, split = small("classification")
        model.bfloat16()
        forward = lambda m, b: task.forward(m, {**b, "x": b["x"].bfloat16()})  # noqa: E731
        return model, replace(task, forward=forward), split

    whole = unlearn("gradient_ascent", *half(), epochs=4, batch_size=2, lr=1e-3)
    close = Journal.close

    def stop(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "close", stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn("gradient_ascent", *half(), epochs=4, batch_size=2, lr=1e-3, folder=tmp_path, checkpoint_every=3)
    monkeypatch.setattr(Journal, "close", close)
    again = unlearn("gradient_ascent", *half(), epochs=4, batch_size=2, lr=1e-3, folder=tmp_path, checkpoint_every=3)
    assert again.patch is not None and whole.patch is not None and again.patch.digest == whole.patch.digest


def test_another_runs_folder_is_refused(tmp_path, monkeypatch):
    from expunge.core.journal import Journal

    model, task, split = small("classification")
    with monkeypatch.context() as m:
        m.setattr(Journal, "clear", lambda self: None)
        unlearn("salun", model, task, split, epochs=1, folder=tmp_path)
    attempt = unlearn("salun", copied(model), task, split, epochs=2, folder=tmp_path)
    assert attempt.outcome == "refused"
    assert "another run" in attempt.reason


def kills(folder: Path, times: int, epochs: int = 12) -> None:
    """SIGKILL a run at random moments, `times` times, each followed by a resume; every result equals the uninterrupted one."""
    from forked import salun

    rng = random.Random(0)

    def start(where: Path, e: int = epochs) -> Any:
        child = FORKS.Process(target=salun, args=(e, where.with_suffix(".digest"), where))
        child.start()
        return child

    def end(where: Path, child: Any) -> str:
        child.join()
        return where.with_suffix(".digest").read_text()

    whole, control = (end(where, child) for where, child in [(folder / n, start(folder / n, e)) for n, e in (("whole", epochs), ("control", epochs + 1))])
    assert whole != control and len(whole) == 64
    killed = 0
    for k in range(times):
        where = folder / str(k)
        child = start(where)
        deadline = time.time() + 60
        while not list(where.glob("step-*")) and child.is_alive() and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.6)
        if child.is_alive():
            child.kill()
            killed += 1
        child.join()
        assert end(where, start(where)) == whole
    assert killed >= times // 2


@pytest.fixture
def found(monkeypatch):
    """The fork server finds the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def test_sigkill_and_resume(tmp_path, found):
    kills(tmp_path, 1)


@pytest.mark.slow
def test_sigkill_twenty_times(tmp_path, found):
    kills(tmp_path, 20)
