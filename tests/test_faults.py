"""The model that is given is never changed, whatever raises, and wrapped, compiled, quantised or offloaded models work or are refused in a line."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from worlds import copied, digits, small

import expunge
from expunge.core import journal
from expunge.core.digest import model_digest
from expunge.core.errors import ModelError
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn

RUNS = {
    "classifier": ("negrad_plus", "classification", False, {"epochs": 1.0, "batch_size": 8}),
    "weights": ("npo", "causal_lm", False, {"epochs": 1.0, "batch_size": 2}),
    "lora": ("npo", "causal_lm", False, {"epochs": 1.0, "batch_size": 2, "lora": 2, "retain": "kl"}),
    "mixture": ("grad_diff", "causal_lm", True, {"epochs": 1.0, "batch_size": 2, "lora": 2}),
    "checkpointing": ("npo", "causal_lm", False, {"epochs": 1.0, "batch_size": 2, "lora": 2, "checkpointing": True}),
    "started": ("loku", "causal_lm", False, {"epochs": 1.0, "batch_size": 2, "lora": 2}),
    "pictures": ("concept_ablation", "diffusion", False, {}),
}
SHORT = {"epochs": 1, "batch_size": 4, "steps": 4, "trajectories": 2, "path": 3}


def census(model) -> dict:
    """All that a caller could see of a model: each module, tensor and hook by identity, values, gradients, flags, modes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": [(n, id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        "hooks": [(n, k, list(v)) for n, m in model.named_modules() for k, v in vars(m).items() if k.endswith("hooks") and isinstance(v, dict)],
        "tensors": [(n, id(t), t.requires_grad, t.grad is None) for n, t in tensors.items()],
        "digest": model_digest(model), "rng": torch.get_rng_state().tolist(),
    }  # fmt: skip


class Fault(Exception):
    pass


def after(n: int, error):
    """A function that raises at its n-th call; `calls` counts."""

    def called(*args, **options):
        called.calls += 1
        if called.calls == n:
            raise error("out of paper")
        return called.then(*args, **options) if called.then else None

    called.calls, called.then = 0, None
    return called


def broken_run(kind: str, where: str, n: int, error, folder) -> tuple[int, dict, dict, str]:
    """(calls of what breaks, census before and after, outcome) of a run whose n-th forward pass, gradient, step or checkpoint raises."""
    name, task_name, moe, settings = RUNS[kind]
    model, task, split = small(task_name, moe, "records") if task_name == "classification" else small(task_name, moe)
    settings = settings or {k: type(METHODS[name].defaults[k])(v) for k, v in SHORT.items() if k in METHODS[name].defaults}
    fault = after(n, error)
    before = census(model)
    handles = []
    with pytest.MonkeyPatch.context() as patch:
        if where == "forward":
            fault.then = task.forward
            task = replace(task, forward=fault)
        elif where == "backward":
            fault.then = torch.Tensor.backward
            patch.setattr(torch.Tensor, "backward", lambda *a, **o: fault(*a, **o))
        elif where == "step":
            handles.append(register_optimizer_step_pre_hook(fault))
        else:
            fault.then = journal.Journal.step
            patch.setattr(journal.Journal, "step", lambda *a, **o: fault(*a, **o))
        try:
            outcome = unlearn(name, model, task, split, folder=folder, checkpoint_every=1, **settings).outcome
        except error:
            outcome = "raised"
        finally:
            for handle in handles:
                handle.remove()
    return fault.calls, before, census(model), outcome


@pytest.mark.parametrize("where", ["forward", "backward", "step", "save"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("weights", "checkpointing", "started") else k for k in RUNS])
def test_a_fault_at_any_call_leaves_the_model_as_it_was(kind, where, tmp_path):
    total, before, now, _ = broken_run(kind, where, 0, Fault, tmp_path / "whole")
    assert total and before == now
    for k, error in ((1, Fault), (total // 2 + 1, Fault), (total, KeyboardInterrupt)):
        _, before, now, outcome = broken_run(kind, where, k, error, tmp_path / f"{k}-{error.__name__}")
        assert outcome in ("failed", "raised", "refused") and (outcome == "raised" or error is Fault)
        assert before == now


def test_compiled_and_parallel_models_are_unlearned_as_what_they_wrap(monkeypatch):
    model, task, split = small("classification", False, "records")
    plain = unlearn("gradient_ascent", model, task, split, epochs=1)
    monkeypatch.setattr(sys.modules["torch.nn.parallel.data_parallel"], "_get_available_device_type", lambda: None)  # not the pretend device
    for wrap in (torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own, on importing its compiler
            over = wrap(copied(model))
        found = unlearn("gradient_ascent", over, task, split, epochs=1)
        assert found.patch.digest == plain.patch.digest and model_digest(over) == model_digest(model)
        undo = found.patch.apply(over)
        assert model_digest(over) == model_digest(plain.model()) != model_digest(model)
        undo.apply(over)
        assert model_digest(over) == model_digest(model)


def stored_as(dtype):
    def change(model):
        first = next(m for m in model.modules() if isinstance(m, nn.Linear))
        first.weight = nn.Parameter(first.weight.detach().to(dtype), requires_grad=False)
        return model

    return change


def offloaded(model):
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first._hf_hook = type("Hook", (), {"offload": True})()
    return model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (stored_as(torch.uint8), "is stored as uint8: the model is quantised; load it unquantised"),
        (stored_as(torch.float8_e4m3fn), "is stored as float8_e4m3fn: the model is quantised"),
        (lambda m: m.to("meta"), "is on the meta device, offloaded or never loaded"),
        (offloaded, "are offloaded by accelerate: load the model whole"),
    ],
)
def test_what_cannot_be_unlearned_is_said_in_a_line_before_anything_runs(change, why):
    model, task, split = digits()
    other = change(copy.deepcopy(model))
    for call in (
        lambda: unlearn("gradient_ascent", other, task, split),
        lambda: expunge.forget(other, task, split, methods=["gradient_ascent"]),
        lambda: expunge.audited(model, other, task, split),
        lambda: expunge.audited(other, model, task, split),
    ):
        with pytest.raises(ModelError, match=why) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
