"""Plan, autopilot, verdict and benchmark on texts: pure functions, and a language model that was never trained."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from worlds import copied, same, small, state

from expunge.audits import core
from expunge.audits.core import Probe, audit
from expunge.audits.verdict import blind, checks_for, default_rules, judge, selftest
from expunge.bench import run
from expunge.core.errors import DataError, SettingError, SplitError
from expunge.core.registry import CHECKS, METHODS
from expunge.core.session import scratch
from expunge.core.types import Split, concat
from expunge.engine.run import unlearn
from expunge.modalities.language import autopilot
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.worlds import authors
from expunge.modalities.language.worlds import build as language
from expunge.modalities.worlds import World
from expunge.parts import reading, training
from expunge.parts.reading import Scores, score
from expunge.parts.training import pace, train
from expunge.parts.updates.descend import descend
from expunge.planning import outcome, plan


@pytest.fixture(scope="module")
def taught():
    """The small model after some steps on forget and part of retain: it tells what it was taught from what it was not, no more."""
    model, task, split = small("causal_lm")
    few = split.retain.take(range(8))
    train(model, task, concat(split.forget, few), epochs=12, batch_size=4, seed=0, lr=1e-2, optimizer="adamw", clip=1.0)
    return model, task, replace(split, retain=few)


def watched(monkeypatch) -> list:
    """Every data set that is scored from now on, in order."""
    seen = []
    original = reading.score

    def spy(model, task, data, *args):
        seen.append(data)
        return original(model, task, data, *args)

    monkeypatch.setattr(autopilot, "score", spy)
    monkeypatch.setattr(core, "score", spy)
    return seen


def closeness(model, task, split):
    """The validation score of a split that has validation."""
    found = plan.closeness(model, task, split)
    assert found is not None
    return found


# The settings that the autopilot uses.


def test_recipe_changes_only_what_a_method_has():
    _, _, split = small("causal_lm")
    npo = METHODS["npo"].defaults
    changes = autopilot.recipe(npo, split)
    assert changes == {"batch_size": 8, "accumulate": 1, "retain_size": 32, "epochs": 10.0}  # its retain loss is ce already
    assert METHODS["npo"].settings(changes)["retain"] == "ce"
    assert autopilot.recipe({**npo, "epochs": 25.0}, split)["epochs"] == 25.0
    assert autopilot.recipe({**npo, "retain": "none"}, split)["retain"] == "ce"
    assert "retain" not in autopilot.recipe({**npo, "retain": "kl"}, split)
    assert "retain" not in autopilot.recipe({**npo, "retain": "none"}, replace(split, retain=None))
    assert autopilot.recipe(METHODS["guardrail"].defaults, split) == {}
    for record in METHODS.values():
        if "causal_lm" in record.tasks:
            assert set(autopilot.recipe(record.defaults, split)) <= set(record.defaults), record.name
            record.settings(autopilot.recipe(record.defaults, split))


def test_stride_follows_the_width_and_lora():
    model, task, _ = small("causal_lm")
    assert autopilot.stride({"lora": 0}, task, model) == autopilot.stride({}, task, model) == pace(task, model)["lr"] == 0.1 / 32
    assert autopilot.stride({"lora": 8}, task, model) == pytest.approx(autopilot.LORA * 0.1 / 32)
    wide = copied(model)
    config: Any = wide.config
    config.hidden_size = 3200
    assert autopilot.stride({}, task, wide) == pytest.approx(0.1 / 3200)


def test_plan_prices_methods_as_the_autopilot_runs_them():
    _, task, split = small("causal_lm")
    found = {o.method: o for o in plan.plan(task, split, retrain_passes=1000.0)}
    npo = METHODS["npo"]
    assert (found["npo"].forward, found["npo"].backward) == npo.expected(split, {**npo.defaults, **autopilot.recipe(npo.defaults, split)})
    assert found["npo"].share == pytest.approx((found["npo"].forward + found["npo"].backward) / 1000)
    assert not found["salun"].feasible and "salun works on classification" in found["salun"].why
    without = {o.method: o for o in plan.plan(task, replace(split, anchor=None))}
    assert found["idk_dpo"].feasible and not without["idk_dpo"].feasible and "split lacks anchor" in without["idk_dpo"].why
    assert all(o.assurance == "suppression" for o in found.values() if o.method == "guardrail")


# The score on validation.


def test_closeness_reads_no_test_and_no_anchor(monkeypatch, taught):
    model, task, split = taught
    seen = watched(monkeypatch)
    facts = split.forget.format.texts(authors.world_facts(4), 500 + torch.arange(4))
    full = replace(split, general=facts)
    closeness(model, task, full)(model)
    digests = {d.digest for d in seen}
    assert {full.forget.digest, full.validation.digest, full.general.digest} <= digests
    assert not digests & {full.test.digest, full.anchor.digest}
    texts = {name: set(getattr(full, name).keys) for name in ("test", "anchor")}
    assert all(not set(d.keys) & keys for d in seen for keys in texts.values())
    assert plan.closeness(model, task, replace(full, validation=None)) is None


def test_closeness_reads_at_most_so_many_retain_records(monkeypatch, taught):
    model, task, split = taught
    seen = watched(monkeypatch)
    monkeypatch.setattr(autopilot, "MOST", 3)
    closeness(model, task, split)(model)
    kept = set(split.retain.keys)
    assert max(len(d) for d in seen if set(d.keys) <= kept) == 3


def test_closeness_is_0_at_best_and_falls_when_retain_is_harmed(taught):
    """Doing nothing reads -1 (all of the gap stands, nothing was lost); a model whose forget texts read as unseen ones reads 0; less kept reads less."""
    model, task, split = taught
    before = state(model)
    validate = closeness(model, task, split)
    assert validate(model) == pytest.approx(-1.0, abs=1e-6)
    level = closeness(model, task, replace(split, validation=split.forget))  # unseen and forget loss are one and the same
    assert level(model) == 0.0
    harmed = copied(model)
    descend(scratch(harmed), lambda b: -task.forward(harmed, b).mean.mean(), task.batches(split.retain, 8, epochs=2, seed=0), lr=1e-2, optimizer="adamw")
    harmed.eval()
    lost = 1 - float((-score(harmed, task, split.retain).nll).exp().mean() / (-score(model, task, split.retain).nll).exp().mean())
    assert lost > 0.1
    assert level(harmed) == pytest.approx(-autopilot.price(lost), abs=1e-3)
    apart = [float((score(m, task, split.validation).nll.mean() - score(m, task, split.forget).nll.mean()).abs()) for m in (model, harmed)]
    assert validate(harmed) == pytest.approx(-apart[1] / apart[0] - autopilot.price(lost), abs=1e-3)
    better = copied(model)
    train(better, task, split.retain, epochs=6, batch_size=4, seed=1, lr=3e-3, optimizer="adamw", clip=1.0)
    assert float((-score(better, task, split.retain).nll).exp().mean()) > float((-score(model, task, split.retain).nll).exp().mean())
    assert level(better) == 0.0  # what retain gains is no credit
    assert same(before, state(model))


def test_closeness_without_retain_reads_what_validation_lost(taught):
    model, task, split = taught
    alone = replace(split, retain=None, validation=split.forget)
    fresh, now = closeness(model, task, alone), training.fresh(model, 3)
    left = float((-score(now, task, split.forget).nll).exp().mean() / (-score(model, task, split.forget).nll).exp().mean())
    assert left < 0.9
    assert fresh(now) == pytest.approx(-autopilot.price(1 - left), abs=1e-4)


# The search.


def test_tuned_tries_every_step_and_grades_it(taught):
    model, task, split = taught
    before = state(model)
    validate = closeness(model, task, split)
    runs = plan.tuned("npo", model, task, split, validate, scales=(1.0, 0.3))
    assert [t.attempt.settings["lr"] for t in runs] == pytest.approx([0.1 / 32, 0.03 / 32])
    for t in runs:
        assert t.attempt.outcome == "ok" and t.attempt.settings["retain_size"] == 32 and not t.rows
        assert t.score == pytest.approx(validate(outcome.patched(model, t.attempt)), abs=1e-6)
    assert plan.best_of(runs).score == max(t.score for t in runs) > -1.0  # better than doing nothing
    assert same(before, state(model))


def test_tuned_runs_once_as_given_or_without_validation():
    model, task, split = small("causal_lm")
    (given,) = plan.tuned("npo", model, task, split, closeness(model, task, split), scales=(1.0, 0.3), fixed={"epochs": 1, "lr": 1e-3})
    assert given.attempt.settings == METHODS["npo"].settings({"epochs": 1, "lr": 1e-3}) and given.score is not None
    blindly = plan.tuned("npo", model, task, replace(split, validation=None), None, scales=(1.0, 0.3))
    assert len(blindly) == 1 and blindly[0].score is None and blindly[0].attempt.settings["lr"] == METHODS["npo"].defaults["lr"]


def test_tuned_falls_back_where_a_method_refuses_a_retain_loss():
    model, task, split = small("causal_lm")
    assert METHODS["task_vector"].defaults["retain"] == "none" and autopilot.recipe(METHODS["task_vector"].defaults, split)["retain"] == "ce"
    (one,) = plan.tuned("task_vector", model, task, split, closeness(model, task, split), scales=(1.0,))
    assert one.attempt.outcome == "ok", one.attempt.reason
    assert one.attempt.settings["retain"] == "none" and one.attempt.settings["lr"] == pytest.approx(0.1 / 32)
    drawn = METHODS["task_vector"].expected(split, one.attempt.settings)
    assert one.attempt.meter.backward == drawn[1]  # the refused run is not counted
    (refused,) = plan.tuned("task_vector", model, task, split, closeness(model, task, split), scales=(1.0,), fixed={"retain": "kl"})
    assert refused.attempt.outcome == "refused" and "set retain=none" in refused.attempt.reason  # what the user fixed stays


# Rules and baselines.


def test_default_rules_follow_the_parts_at_hand():
    model, task, split = small("causal_lm")

    def rules(references=(), **parts):
        return default_rules(Probe(model, model, task, replace(split, **parts), references))

    assert len(split.forget) < 10
    back, free, unseen = {"repair.p": ">= 0.025"}, {"repair.free": "<= 0.5"}, {"unseen.p": ">= 0.05"}
    said = {"memorised.extraction_strength.forget": "<= 0.2"}
    kept = {"drop.retain": "<= 0.05", "wording.retain.lost": "<= 0.1"}
    assert rules() == {**unseen, **back, **kept}
    assert rules(test=None) == {**said, **free, **kept}
    assert rules(general=split.test) == {**unseen, **back, **kept, "drop.general": "<= 0.05"}
    assert rules(retain=None) == {**unseen, **back, "wording.test.broken": "<= 0.25"}
    assert rules(retain=None, test=None) == {**said, **free, "wording.forget.broken": "<= 0.5"}
    near = {"known.excess": "<= 0.1", "gap_closed.margin": ">= 0.5", "drop.retain": "<= 0.05"}
    assert rules((model,)) == {**near, **unseen, **back} and rules((model,), test=None) == {**near, **free}
    many = replace(split, forget=concat(*[split.forget] * 5))
    whole = default_rules(Probe(model, model, task, many, (model,)))
    assert {n: whole[n] for n in ("gap_closed.relearning", "repair.free")} == {"gap_closed.relearning": ">= 0.5", **free} and "unseen.p" not in whole
    for found in (rules(), rules(test=None), rules((model,))):
        checks = checks_for(found)
        assert {"nearness" if name.startswith("gap_closed") else name.split(".")[0] for name in found} == set(checks)
        assert all("causal_lm" in CHECKS[c].tasks for c in checks)


@pytest.mark.parametrize("parts", [{}, {"test": None}])
def test_every_default_rule_has_its_row(parts):
    model, task, split = small("causal_lm")
    p = Probe(model, model, task, replace(split, **parts))
    rules = default_rules(p)
    assert set(rules) <= {r.name for r in audit(p, checks_for(rules), slow=False)}


@pytest.mark.slow
def test_an_untrained_model_certifies_nothing():
    """It never knew the texts, so that doing nothing cannot be told from forgetting, and the verdict says so (24 records: enough for the rule's interval)."""
    model, task, split = small("causal_lm")
    split = replace(split, forget=split.retain, retain=split.forget, anchor=None)
    p = Probe(model, model, task, replace(split, test=None))
    trials = selftest(p, default_rules(p))
    assert blind(trials)
    assert any("no usable check of forgetting" in reason for reason in judge([], trials))
    verdict = outcome.audited(model, model, task, replace(split, test=None), slow=False)
    assert not verdict.passed and "No retrained reference" in " ".join(verdict.notes)
    json.loads(json.dumps(verdict.document()["verdict"]))


def test_trivial_baselines_are_those_of_the_task():
    _, task, _ = small("causal_lm")
    _, images, _ = small("classification")
    assert set(outcome.trivial(images)) == {"fine_tune", "reset_last"} == set(outcome.TRIVIAL) - {"guardrail"}
    found = outcome.trivial(task)
    assert found == {label: f for label, f in outcome.TRIVIAL.items() if "causal_lm" in METHODS[f[0]].tasks}
    model, _, split = small("causal_lm")
    rows = outcome.baselines(Probe(model, model, task, split), {"drop.retain": "<= 0.05"}, ["drop"], slow=True)
    assert set(rows) == {"original", "fine_tune", "reset_last", *found}


# What checks read.


def test_scores_of_texts_are_losses_per_target_token(monkeypatch):
    model, task, split = small("causal_lm")
    p = Probe(model, model, task, split, (copied(model),))
    found = p.scores("before", "forget")
    with torch.no_grad():
        out = task.forward(model, task.collate(split.forget, torch.arange(len(split.forget)), None))
    torch.testing.assert_close(found.nll, out.nll / out.count, rtol=1e-5, atol=1e-5)
    assert (found.logits, found.labels, found.pred, found.target) == (None, None, None, None)
    torch.testing.assert_close(score(model, task, split.retain, size=1).nll, score(model, task, split.retain, size=500).nll, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(core, "score", None)
    assert p.scores("after", "forget") is p.scores("before", "forget") is found  # one model, one pass
    assert p.removed() == []
    with pytest.raises(TypeError):
        p.scores("reference0", "forget")


def test_margin_of_texts_is_the_log_odds_of_the_mean_token():
    p = torch.tensor([0.5, 0.9, 0.1])
    s = Scores(-p.log(), None, None, None, None)
    torch.testing.assert_close(s.margin, torch.tensor([0.0, math.log(9), -math.log(9)]), rtol=1e-5, atol=1e-5)
    sure = Scores(torch.tensor([0.0, 200.0]), None, None, None, None).margin
    assert torch.isfinite(sure).all() and float(sure[0]) == pytest.approx(-float(sure[1]), rel=1e-3) and float(sure[0]) > 10
    image = Scores(torch.tensor([0.1]), torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]), None, None)
    assert float(image.margin) == pytest.approx(2.1972, abs=1e-4)


def test_drop_reads_the_parts_that_are_there(taught):
    model, task, split = taught
    worse = training.fresh(model, 5)

    def names(found):
        return [r.name for r in audit(Probe(model, worse, task, found), ["drop"])]

    assert names(split) == ["drop.retain", "drop.test"]
    assert names(replace(split, general=split.test)) == ["drop.retain", "drop.test", "drop.general"]
    assert names(replace(split, test=None)) == ["drop.retain"]
    assert names(replace(split, retain=None)) == ["drop.test"]
    (row,) = audit(Probe(model, worse, task, replace(split, test=None)), ["drop"])
    lost = (-score(model, task, split.retain).nll).exp() - (-score(worse, task, split.retain).nll).exp()
    assert row.value == pytest.approx(float(lost.mean()), abs=1e-5) and row.n == len(split.retain)
    assert row.value > 0.05 and row.low < row.value < row.high
    (mine,) = audit(Probe(model, worse, task, replace(split, test=None), (worse, worse)), ["drop"])
    assert mine.value == pytest.approx(0.0, abs=1e-6) and "2 retrained models" in mine.note


# The benchmark.


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    """A language world and its twin, small enough to be made at once."""
    return {name: language.generated(name, n=4, per=4) for name in ("authors", "authors-moe")}


def test_a_label_names_its_method_and_how_it_is_run(worlds):
    w = worlds["authors"]
    assert run.resolve("npo") == run.resolve("npo:published") == ("npo", {})
    assert run.resolve("reset_last") == ("fine_tune", outcome.TRIVIAL["reset_last"][1])
    own, published, defaults = run.settings(w, "npo"), run.settings(w, "npo:published"), METHODS["npo"].defaults
    assert published == {**defaults, "lr": "width"} and "recipe" not in published
    assert own == {**defaults, "recipe": {**autopilot.RECIPE, "epochs": autopilot.LEAST_EPOCHS}}
    assert json.loads(json.dumps(own)) == own and json.loads(json.dumps(published)) == published  # cells are compared with what a file holds
    assert run.settings(w, "nothing") == {} and run.settings(w, "retrain") == w.recipe
    assert run.settings(w, "guardrail") == METHODS["guardrail"].defaults  # it takes no step
    with pytest.raises(SettingError, match="no method 'npoo'"):
        run.settings(w, "npoo:published")


def test_methods_for_experts_are_feasible_on_the_twin_alone(worlds):
    assert METHODS["seuf"].twin == "moe"
    assert {name: run.feasible(w, "forget10", "seuf") for name, w in worlds.items()} == {"authors": False, "authors-moe": True}
    for w in worlds.values():
        assert run.feasible(w, "forget10", "npo") and run.feasible(w, "forget10", "idk_dpo") and run.feasible(w, "forget10", "retrain")
        assert not run.feasible(w, "forget10", "salun")
    bare = replace(worlds["authors"], asked={"forget10": replace(worlds["authors"].split("forget10"), anchor=None)})
    assert not run.feasible(bare, "forget10", "idk_dpo")
    asked = ["nothing", "npo:published", "seuf:published", "salun", "retrain"]
    assert [name for _, name, _ in run.cells(worlds["authors"], asked, ["forget10"], [0])] == ["nothing", "npo:published", "retrain"]
    assert [name for _, name, _ in run.cells(worlds["authors-moe"], asked, ["forget10"], [0])] == ["nothing", "npo:published", "seuf:published", "retrain"]


def test_retraining_is_counted_with_all_that_it_trains_on(worlds):
    """Every model of a language world is trained on the general knowledge too."""
    w = worlds["authors"]
    assert run.retrain_passes(w, "forget10") == 2 * w.recipe["epochs"] * (len(w.split("forget10").retain) + len(w.extra))


def test_a_language_world_keeps_its_parts_apart(worlds):
    for name, w in worlds.items():
        split = w.split("forget10")
        split.check()
        assert w.scenarios == ("forget10",) and w.name == name
        assert sorted(w.train.ids.tolist()) == sorted([*split.forget.ids.tolist(), *split.retain.ids.tolist()])
        every = torch.cat([part.ids for n, part in split.parts().items() if n != "anchor"])
        assert len(every.unique()) == len(every)
        who = {n: {r.get("author") for r in getattr(split, n).rows} - {None} for n in ("forget", "retain", "test", "validation")}
        assert who["forget"] and all(not a & b for a in who.values() for b in who.values() if a is not b)
        assert w.digest == replace(w).digest
        with pytest.raises(SettingError, match="scenario must be one of forget10"):
            w.split("class")
    experts = [m for m in worlds["authors-moe"].build().modules() if type(m).__name__.endswith("Experts")]
    assert experts and not any(type(m).__name__.endswith("Experts") for m in worlds["authors"].build().modules())


def test_general_knowledge_is_trained_on_and_given_to_no_method(worlds, monkeypatch):
    w = worlds["authors"]
    split = w.split("forget10")
    assert w.extra.digest == split.general.digest
    for part in ("forget", "retain", "test", "validation", "anchor"):
        assert not set(w.extra.keys) & set(getattr(split, part).keys), part
    assert not set(w.extra.keys) & set(w.train.keys)
    seen = []
    monkeypatch.setattr(training, "train", lambda model, task, data, **_: seen.append(data))
    w.original(0)
    w.retrained("forget10", 0)
    assert [d.digest for d in seen] == [concat(w.train, w.extra).digest, concat(split.retain, w.extra).digest]
    model, (task, watched_ids) = w.build(), spied(w.task)
    attempt = unlearn("npo", model, task, split, epochs=1, lr=1e-3)
    assert attempt.outcome == "ok"
    assert watched_ids and not watched_ids & {*split.general.keys, *split.test.keys}


def spied(task):
    """The task, and the keys of all texts that it was asked to collate."""
    seen: set[bytes] = set()

    def collate(data, index, generator):
        seen.update(data.take(index).keys)
        return task.collate(data, index, generator)

    return replace(task, collate=collate), seen


def test_refusals_stand_under_the_forget_questions():
    _, _, split = small("causal_lm")
    form, choices = split.forget.format, authors.refusals()
    found = language.refused(form, split.forget, choices, seed=3)
    assert torch.equal(found.ids, split.forget.ids)
    for row, before in zip(found.rows, split.forget.rows, strict=True):
        assert row["question"] == before["question"] and row["answer"] in choices and row["answer"] != before["answer"]
    assert found.digest == language.refused(form, split.forget, choices, seed=3).digest
    many = language.refused(form, concat(split.retain, split.forget), choices, seed=3)
    assert len({r["answer"] for r in many.rows}) > 1
    assert many.digest != language.refused(form, concat(split.retain, split.forget), choices, seed=4).digest


def test_build_makes_the_world_of_its_records():
    rows = authors.authors(6, per=4)
    parts = {"forget": rows[:4], "retain": rows[4:12], "holdout": rows[12:16], "validation": rows[16:20], "general": rows[20:24]}
    made = {name: language.build(name, parts, ["I do not know."], {"epochs": 3}, {"width": 16, "layers": 1, "heads": 2}, 300) for name in ("a", "a-moe")}
    split = made["a"].split("forget10")
    assert {n: len(p) for n, p in split.parts().items()} == {"forget": 4, "retain": 8, "test": 4, "validation": 4, "anchor": 4, "general": 4}
    assert [r["question"] for r in split.test.rows] == [r["question"] for r in rows[12:16]]
    assert {r["answer"] for r in split.anchor.rows} == {"I do not know."}
    model, data = made["a"].build(), concat(*split.parts().values())
    config: Any = model.config
    assert max(int(t.max()) for t in data.tokens) < config.vocab_size == len(split.forget.format.tokenizer)
    assert "Mixtral" in type(made["a-moe"].build()).__name__ and "Llama" in type(model).__name__
    torch.manual_seed(9)
    assert same(state(model), state(made["a"].build()))  # weights do not depend on the global generator


def test_a_world_without_its_files_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    for name in ("tofu-tiny", "tofu-moe"):
        with pytest.raises(DataError, match=f"world {name} needs .*set EXPUNGE_DATA"):
            language.world(name)


def test_a_cell_as_published_runs_at_the_step_that_suits_the_width():
    """One cell of each form on a world whose models are never trained: outcome, step size and rows."""
    model, task, split = small("causal_lm")
    w = World(
        "authors", task, lambda: copy.deepcopy(model), concat(split.retain, split.forget), split.validation, split.test, {"epochs": 2}, asked={"s": split}
    )
    scores: dict = {}
    cells = {m: run.run_cell(w, "s", m, 0, model, (), scores) for m in ("nothing", "npo:published", "npo")}
    assert [c["outcome"] for c in cells.values()] == ["no_op", "ok", "ok"]
    assert cells["npo:published"]["lr"] == cells["npo"]["lr"] == pytest.approx(0.1 / 32)
    assert {c["method"]: c["settings"] for c in cells.values()} == {m: run.settings(w, m) for m in cells}
    for cell in cells.values():
        names = {r["name"] for r in cell["rows"]}
        assert {"drop.retain", "membership.loss_auc", "memorised.extraction_strength.forget"} <= names
    assert cells["nothing"]["share"] == 0 and cells["npo"]["share"] > 0
    kept = {id(m) for _, m in scores.values()}
    assert kept == {id(model)}  # what candidates answered is not held on to
    cell = run.run_cell(replace(w, asked={"s": replace(split, anchor=None)}), "s", "idk_dpo", 0, model, (), {})
    assert cell["outcome"] == "refused" and "split lacks anchor" in cell["reason"]


def test_texts_cannot_be_planned_as_records():
    _, task, split = small("causal_lm")
    with pytest.raises(SplitError, match="delete the model instead"):
        Split(split.forget, split.retain.take([])).check()
    with pytest.raises(SettingError, match="did you mean"):
        plan.forget(small("causal_lm")[0], task, split, methods=("npoo",))
    assert isinstance(split.forget.format, Format)
