"""What the autopilot searches for when settings are named, which methods are feasible, and what a refused run leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from worlds import small

from expunge.cli import forget as flags
from expunge.core.errors import ExpungeError, ModelError, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.journal import Journal
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn
from expunge.modalities.language import autopilot
from expunge.planning import plan, search

STEP = 0.1 / 32
"""The step size that suits the width of the small model."""


def searched(name: str, fixed: dict, **parts):
    model, task, split = small("causal_lm")
    split = replace(split, **parts)
    return [t.attempt for t in plan.tuned(name, model, task, split, plan.closeness(model, task, split), scales=(1.0, 0.3), fixed=fixed)]


# The search for a step size.


@pytest.mark.parametrize(
    ("name", "fixed", "steps", "others"),
    [
        ("npo", {"beta": 0.2}, [STEP, 0.3 * STEP], {"beta": 0.2, "retain_size": 32, "epochs": 10.0, "retain": "ce"}),
        ("npo", {"epochs": 1.0, "lora": 2}, [autopilot.LORA * STEP, 0.3 * autopilot.LORA * STEP], {"epochs": 1.0, "lora": 2, "retain_size": 32}),
        ("npo", {"epochs": "1", "lora": "0"}, [STEP, 0.3 * STEP], {"epochs": 1.0, "lora": 0}),
        ("npo", {"epochs": 1.0, "retain_size": 4, "retain": "none"}, [STEP, 0.3 * STEP], {"retain_size": 4, "retain": "none", "batch_size": 8}),
        ("ce_u", {"epochs": 1.0}, [STEP, 0.3 * STEP], {"epochs": 1.0, "retain": "ce"}),
        ("npo", {"epochs": 1.0, "lr": 1e-3}, [1e-3], {"retain_size": 0}),
        ("npo", {"lr": "0.001", "epochs": 1}, [1e-3], {"epochs": 1.0}),
    ],
)
def test_the_step_size_is_searched_for_until_it_is_named(name, fixed, steps, others):
    runs = searched(name, fixed)
    assert [a.outcome for a in runs] == ["ok"] * len(steps), [a.reason for a in runs]
    assert [a.settings["lr"] for a in runs] == pytest.approx(steps)
    assert all(a.settings[n] == v for a in runs for n, v in others.items())


def test_without_validation_named_settings_run_once_as_given():
    model, task, split = small("causal_lm")
    (one,) = plan.tuned("npo", model, task, replace(split, validation=None), None, scales=(1.0, 0.3), fixed={"epochs": 1.0})
    assert one.attempt.settings == METHODS["npo"].settings({"epochs": 1.0})


def test_a_setting_of_another_search_is_left_as_published():
    """eco's lr is the step of its search for a strength, not that of weights."""
    runs = searched("eco", {"steps": 2})
    assert [a.settings["lr"] for a in runs] == [METHODS["eco"].defaults["lr"]] and runs[0].settings["steps"] == 2
    assert [a.settings["lr"] for a in searched("eco", {})] == pytest.approx([100.0, 30.0])


def test_records_are_run_once_when_a_setting_is_named():
    model, task, split = small("classification")
    validate = plan.closeness(model, task, split)
    runs = plan.tuned("negrad_plus", model, task, split, validate, scales=(1.0, 3.0), fixed={"epochs": 1})
    assert [t.attempt.settings for t in runs] == [METHODS["negrad_plus"].settings({"epochs": 1})]
    assert len(plan.tuned("negrad_plus", model, task, split, validate, scales=(1.0, 3.0))) == 2


def test_flags_give_the_named_settings_alone():
    assert flags.settings("npo", ["--beta", "0.2", "--lora", "4"]) == {"beta": 0.2, "lora": 4}
    assert flags.settings("npo", []) == {}


def test_prices_are_those_of_the_run_that_the_settings_ask_for():
    _, task, split = small("causal_lm")
    npo = METHODS["npo"]

    def priced(given) -> float:
        option = {o.method: o for o in plan.plan(task, split, settings={"npo": given})}["npo"]
        return option.forward + option.backward

    for given, run in (
        ({}, autopilot.recipe(npo.defaults, split)),
        ({"epochs": 3.0}, {**autopilot.recipe(npo.defaults, split), "epochs": 3.0}),
        ({"epochs": 3.0, "lr": 1e-4}, {"epochs": 3.0, "lr": 1e-4}),
    ):
        assert priced(given) == sum(npo.expected(split, npo.settings(run)))


def test_settings_that_are_no_settings_are_refused_before_anything_runs(monkeypatch):
    model, task, split = small("causal_lm")
    monkeypatch.setattr(search, "unlearn", None)
    with pytest.raises(SettingError, match="did you mean 'beta'"):
        plan.forget(model, task, split, settings={"npo": {"bta": 1}})
    with pytest.raises(SettingError, match="no method 'npoo'"):
        plan.forget(model, task, split, settings={"npoo": {}})


# What is feasible.


def refusals(**parts) -> dict[str, str]:
    model, task, split = small("causal_lm")
    return {o.method: o.why for o in plan.plan(task, replace(split, **parts), model=model) if not o.feasible and task.name in METHODS[o.method].tasks}


def test_a_mixture_of_experts_is_asked_for_by_name():
    for moe, told in ((False, "LlamaForCausalLM has no experts: a mixture-of-experts model is needed"), (True, "")):
        model, task, split = small("causal_lm", moe)
        found = {o.method: o for o in plan.plan(task, split, model=model)}
        assert (found["seuf"].feasible, found["seuf"].why) == (moe, told)
        unnamed = {o.method: o for o in plan.plan(task, split)}["seuf"]
        assert not unnamed.feasible and unnamed.why == "seuf works on a mixture of experts alone; name the model to see whether it is one"
    model, task, split = small("causal_lm")
    with pytest.raises(ModelError, match="has no experts"):
        plan.forget(model, task, split, methods=("seuf",))


@pytest.mark.parametrize("lacking", [(), ("retain",), ("anchor",), ("validation",), ("retain", "anchor", "validation", "test")])
def test_what_is_not_feasible_is_what_a_run_would_refuse(lacking):
    """Same reason in the plan and in the run; and the settings that ask for the part make the difference."""
    model, task, split = small("causal_lm")
    cut = replace(split, **dict.fromkeys(lacking))
    found = refusals(**dict.fromkeys(lacking))
    for name, why in found.items():
        if set(METHODS[name].needs) <= set(cut.parts()):
            attempt = unlearn(name, model, task, cut)
            assert attempt.outcome == "refused" and attempt.reason.replace("METHOD", name) in (why, f"split lacks retain; it has {', '.join(cut.parts())}"), (
                name
            )
    asked = {"retain": "retain=ce needs retain data", "anchor": "tool_free", "validation": "or set strength"}
    for part, words in asked.items():
        name = {"retain": "npo", "anchor": "tool_delete", "validation": "eco"}[part]
        assert (name in found) == (part in lacking or (name != "npo" and "retain" in lacking)), (part, name)
        if lacking == (part,):
            assert words in found[name]


def test_settings_that_do_without_a_part_make_a_method_feasible():
    model, task, split = small("causal_lm")
    bare = replace(split, retain=None, anchor=None)
    given = {
        "npo": {"retain": "none"},
        "wga": {"alpha": 0.0},
        "tool_delete": {"tool_free": "weights", "retain": "none"},
        "ascent_descent": {"general": True},
    }
    before, after = ({o.method: o for o in plan.plan(task, bare, settings=s)} for s in ({}, given))
    for name in given:
        assert not before[name].feasible
    assert after["npo"].feasible and after["wga"].feasible and after["tool_delete"].feasible
    assert after["ascent_descent"].why == "general=true needs anchor data, a general corpus; give some, or set general=false"
    assert "on the command line --npo.retain none" in before["npo"].why
    with pytest.raises(SplitError, match="retain=kl needs retain data"):
        plan.forget(model, task, bare, methods=("npo",), settings={"npo": {"retain": "kl"}})


def test_every_language_method_says_what_its_settings_ask_for():
    for record in METHODS.values():
        assert set(record.asks(record.defaults)) <= {"retain", "anchor", "validation", "test"}, record.name
        assert "retain" not in record.asks(record.defaults) or record.defaults.get("retain") != "none"


# What a refused run leaves.


LATE = {"lora": 4, "layers": "nope"}
"""npo reads the model as it was first, then finds no such layer."""


def listed(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_run_leaves_its_folder_as_it_was(tmp_path, there):
    model, task, split = small("causal_lm")
    folder = tmp_path / "out" / "checkpoints" / "npo-0"
    if there:
        folder.mkdir(parents=True)
        (folder / "reference-0123.safetensors").write_bytes(b"another run's")
        (folder / "notes.txt").write_text("mine")
    before = listed(tmp_path)
    attempt = unlearn("npo", model, task, split, folder=folder, **LATE)
    assert attempt.outcome == "refused" and "no linear layer fits 'nope'" in attempt.reason and attempt.meter.forward == 4
    assert listed(tmp_path) == before
    own = Guard(journal=Journal(folder, "a run", 25))
    assert unlearn("npo", model, task, split, guard=own, **LATE).outcome == "refused" and listed(tmp_path) == before
    assert unlearn("npo", model, task, split, folder=folder, epochs=1.0, lr=1e-3).outcome == "ok"  # and the folder can be used


def test_a_run_refused_for_checkpoints_of_another_run_keeps_them(tmp_path):
    model, task, split = small("causal_lm")

    def killed(text, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn("npo", model, task, split, folder=tmp_path / "a", epochs=5.0, lr=1e-3, checkpoint_every=1, progress=killed)
    before = listed(tmp_path)
    assert any("step-" in name for name in before) and any("reference-" in name for name in before)
    other = unlearn("npo", model, task, split, folder=tmp_path / "a", epochs=5.0, lr=2e-3)
    assert other.outcome == "refused" and "checkpoints of another run" in other.reason
    assert listed(tmp_path) == before
    assert unlearn("npo", model, task, split, folder=tmp_path / "a", epochs=5.0, lr=1e-3, checkpoint_every=1).outcome == "ok"
    assert listed(tmp_path) == {}


def test_what_is_asked_late_is_an_error_of_its_own():
    with pytest.raises(ExpungeError):
        METHODS["npo"](*small("causal_lm"), **LATE)
