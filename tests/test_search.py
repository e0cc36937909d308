"""The search on validation: strengths by bracketing, methods by halving, general texts as a second retain part, a limit of time, what is said at the end."""

from __future__ import annotations

import math
import types
from dataclasses import replace

import pytest
import torch
from worlds import copied, same, small, state

from expunge.audits.core import Row, audit
from expunge.audits.grade import Finding, Grade
from expunge.core.errors import SettingError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import IGNORE, concat
from expunge.engine.run import Attempt, unlearn
from expunge.modalities.language import autopilot, baselines, general, tuning
from expunge.modalities.language.worlds import authors, tiny
from expunge.planning import advice, outcome, plan, recipe, search
from expunge.planning.outcome import Try
from expunge.planning.search import Course, bracketed, changed, further, halved, rung


def tried(score: float | None, outcome: str = "ok", name: str = "npo", **settings) -> Try:
    return Try(Attempt(name, {**METHODS[name].defaults, **settings}, 0, outcome, "", None), score=score)


def climbed(scores: dict[int, float], most: int = 9) -> list[int]:
    """The exponents that a search over these scores tries, in order."""
    seen: dict[int, Try] = {}
    while len(seen) < most and (k := rung(seen)) is not None:
        seen[k] = tried(scores[k])
    return list(seen)


# Strengths.


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ({0: -0.5, -1: -0.8, 1: -0.9}, [0, -1, 1]),  # best where it starts
        ({0: -0.5, -1: -0.3, -2: -0.2, -3: -0.4}, [0, -1, -2, -3]),  # down
        ({0: -0.5, -1: -0.8, 1: -0.3, 2: -0.1, 3: -0.6}, [0, -1, 1, 2, 3]),  # up
    ],
)
def test_a_strength_is_bracketed_on_both_sides(scores, order):
    assert climbed(scores) == order


def test_a_run_that_harms_is_followed_by_a_weaker_one_and_one_that_moves_nothing_by_a_stronger():
    assert rung({0: tried(-3.0, "harmed")}) == rung({0: tried(None, "diverged")}) == -1
    assert rung({0: tried(None, "no_op")}) == 1
    assert rung({0: tried(-3.0, "harmed"), -1: tried(-0.4)}) == -2
    assert rung({0: tried(None, "refused")}) is None and rung({0: tried(None, "failed")}) is None
    assert rung({}) == 0
    assert rung({0: tried(-0.5), -1: tried(-0.5)}) == 1  # of equals the one that was not changed is kept, and looked at from its other side


def test_a_try_that_may_be_released_beats_a_better_score_that_may_not():
    good, harmful = tried(-0.9), tried(-0.1, "harmed")
    assert search.best_of([harmful, good]) is good
    assert search.best_of([tried(None, "no_op"), harmful]) is harmful


def test_what_is_changed_at_a_strength():
    model, task, split = small("causal_lm")
    step = autopilot.pace(model)["lr"]
    assert changed("npo", model, task, split, {}, 0.5)["lr"] == pytest.approx(0.5 * step)
    assert changed("npo", model, task, split, {"lora": 2}, 0.5)["lr"] == pytest.approx(0.5 * autopilot.LORA * step)
    rmu = changed("rmu", model, task, split, {}, 0.5)
    assert rmu["lr"] == pytest.approx(step) and rmu["kappa"] == METHODS["rmu"].defaults["kappa"] / 2  # its strength is where it pushes to
    assert changed("rmu", model, task, split, {"kappa": 3.0}, 0.5)["lr"] == pytest.approx(0.5 * step)  # that is fixed, so the step is searched for
    assert changed("task_vector", model, task, split, {}, 2.0)["scale"] == 2 * METHODS["task_vector"].defaults["scale"]
    longer = changed("npo", model, task, split, {}, 1.0, True)
    assert longer["epochs"] == autopilot.LONGER * autopilot.LEAST_EPOCHS
    assert "epochs" not in changed("npo", model, task, split, {"epochs": 2.0}, 1.0, True)
    images = small("classification")
    assert changed("scrub", *images, {}, 1.0) == {} and changed("scrub", *images, {}, 2.0) == {"lr": 2 * METHODS["scrub"].defaults["lr"]}


# Methods.


class Played:
    """A search whose runs are scores: method -> score by exponent; longer runs gain `gain`."""

    def __init__(self, scores, gain=0.0):
        self.scores, self.gain, self.ran = scores, gain, []

    def run(self, course, name, change, label="", place="0"):
        self.ran.append((name, place))
        k, long = int(place.removesuffix("-long")), place.endswith("-long")
        return tried(self.scores[name].get(k, -9.0) + (self.gain if long else 0.0), name=name)


@pytest.fixture
def played(monkeypatch):
    def make(scores, gain=0.0) -> tuple[Course, Played]:
        game = Played(scores, gain)
        monkeypatch.setattr(Course, "run", lambda self, *args: game.run(self, *args))
        return Course(*small("causal_lm"), lambda model: 0.0), game

    return make


def test_halving_spends_its_runs_on_the_better_half(played):
    names = ["npo", "wga", "tnpo", "ce_u", "undial", "simnpo", "flat", "jensun"]
    course, game = played({name: {0: -0.1 * k, -1: -0.1 * k - 0.05, 1: -0.1 * k - 0.05} for k, name in enumerate(names)}, gain=0.01)
    found = halved(course, names, 2)
    assert list(found)[:2] == ["npo", "wga"] and set(found) == set(names)
    runs = {name: len([1 for n, _ in game.ran if n == name]) for name in names}
    assert [runs[n] for n in names] == [5, 5, 2, 2, 1, 1, 1, 1]  # bracketed, then longer; once more; once
    assert game.ran[: len(names)] == [(name, "0") for name in names]  # all once before any twice


def test_a_method_whose_first_strength_is_off_is_not_lost(played, monkeypatch):
    """Harmful where it starts and best of all at half of that, like LoRA methods at full weights' steps."""
    course, _game = played({"loku": {0: -3.0, -1: -0.01, -2: -0.2}, "npo": {0: -0.3}, "wga": {0: -0.4}})
    run = Course.run
    monkeypatch.setattr(Course, "run", lambda self, name, change, label="", place="0": replace(
        t := run(self, name, change, label, place), attempt=replace(t.attempt, outcome="harmed" if (name, place) == ("loku", "0") else "ok")))  # fmt: skip
    assert next(iter(halved(course, ["loku", "npo", "wga"], 1))) == "loku"


def test_a_search_ends_with_its_time(played):
    course, game = played({"npo": {}, "wga": {}})
    over = replace(course, until=-math.inf)
    assert over.over and halved(over, ["npo", "wga"], 1) == {} and not further(over, "npo", {}) and game.ran == []
    assert bracketed(over, "npo") == [] and not course.over


def test_the_same_seed_gives_the_same_field():
    model, task, split = small("causal_lm")
    before, fields = state(model), []
    for _ in range(2):
        course = Course(model, task, split, plan.closeness(model, task, split), fixed={n: {"epochs": 1.0} for n in ("npo", "wga")})
        found = halved(course, ["npo", "wga"], 1)
        fields.append([(n, k, t.score, t.attempt.patch and t.attempt.patch.digest) for n, runs in found.items() for k, t in runs.items()])
    assert fields[0] == fields[1] and len(fields[0]) >= 4
    assert same(before, state(model))


# The autopilot.


def test_minutes_end_the_search_and_say_what_was_not_tried():
    model, task, split = small("classification")
    verdict = plan.forget(model, task, split, minutes=1e-6, methods=("negrad_plus", "scrub"), rules={"accuracy.forget": "<= 1"}, slow=False)
    assert len({t.attempt.method for t in verdict.tries}) <= 1
    assert any("The time was up" in note and "scrub" in note + str(verdict.tries) for note in verdict.notes)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(SettingError, match="minutes must be above 0"):
            plan.forget(model, task, split, minutes=wrong)


def test_the_screen_reads_validation_and_never_test(monkeypatch):
    model, task, split = small("classification")
    p = outcome.Probe(model, model, task, split)
    seen, trials = [], [plan.Trial("drop.test", "<= 0.03", "", "", True), plan.Trial("accuracy.forget", "<= 0.05", "", "", False)]
    monkeypatch.setattr(plan.core, "audit", lambda probe, names, slow: seen.append(probe.split) or audit(probe, names, slow=slow))
    excess = plan.screened(p, trials)(copied(model))
    assert seen[0].test.digest == split.validation.digest != split.test.digest
    (row,) = [r for r in audit(replace(p, split=replace(split, test=split.validation), cache={}), ["drop"]) if r.name == "drop.test"]
    assert excess > 0 and excess == pytest.approx(min(1.0, advice.beyond(row, "<= 0.03")))  # the rule that failed its self-test is left out


@pytest.mark.parametrize(("said", "minutes"), [("minutes = 2.5", 2.5), ("", math.inf)])
def test_a_recipe_limits_the_time(tmp_path, monkeypatch, said, minutes):
    (tmp_path / "r.toml").write_text(f'model = "py:m:f"\ntrain = "t"\nforget = "class:3"\n{said}\n')
    heard: list[float] = []
    opened = types.SimpleNamespace(model=torch.nn.Linear(1, 1), task=None, split=types.SimpleNamespace(asked=""), references=[], release=lambda *_: None)
    monkeypatch.setattr(recipe, "named", lambda task: types.SimpleNamespace(open=lambda request: opened))
    monkeypatch.setattr(recipe.plan, "forget", lambda *_, **options: (heard.append(options["minutes"]), None)[1])
    monkeypatch.setattr(recipe, "finished", lambda verdict, *_: (verdict, {}))
    asked = recipe.Recipe("m", "class:3", tmp_path, minutes=2.5 if said else 0.0)
    recipe.run(asked)
    assert heard == [minutes]
    monkeypatch.undo()
    assert recipe.read(tmp_path / "r.toml").minutes == asked.minutes


# General texts.


@pytest.fixture(scope="module")
def known():
    """The small split with general records beside it."""
    model, task, split = small("causal_lm")
    facts = split.forget.format.texts(authors.world_facts(12), 500 + torch.arange(12))
    return model, task, replace(split, general=concat(facts, facts.take([0, 1])))


def test_no_general_record_stands_on_both_sides(known):
    model, task, split = known
    parted = general.parts(model, task, split)
    mine, theirs = {*parted.trained.retain.keys, *parted.trained.general.keys} - set(split.retain.keys), set(parted.audited.general.keys)
    given = set(split.general.keys)
    assert mine & given and theirs and not mine & theirs and mine & given | theirs == given  # equal records stand together, too
    made = [t for t, key in zip(parted.trained.retain.tokens, parted.trained.retain.keys, strict=True) if key in mine - given]
    assert made and not general.runs(made) & (general.runs(parted.audited.general.tokens) - general.runs(split.retain.tokens))  # nor what the model says of it
    assert parted.audited.retain is split.retain and parted.audited.test is split.test
    assert len(parted.trained.retain) > len(split.retain)
    parted.trained.check()
    assert "the audit reads the other" in parted.notes[0]
    mixed = replace(split, general=split.general.take(list(reversed(range(len(split.general))))))
    assert {*general.parts(model, task, mixed, seed=5).audited.general.keys} == theirs  # neither order nor seed decides


def test_general_is_parted_only_where_methods_are_tuned(known):
    model, task, split = known
    for lacking in (replace(split, validation=None), replace(split, retain=None), replace(split, general=split.general.take([0]))):
        parted = general.parts(model, task, lacking)
        assert parted.trained is lacking and parted.audited is lacking and parted.notes == ()


def test_the_score_counts_what_general_lost_as_what_retain_lost(known):
    model, task, split = known
    one, both = (plan.closeness(model, task, s) for s in (replace(split, general=None), split))
    assert one is not None and both is not None
    worse = copied(model)
    with torch.no_grad():
        for p in worse.parameters():
            p.mul_(3.0)
    lost = 1 - autopilot.utility(autopilot.score(worse, task, split.general)) / autopilot.utility(autopilot.score(model, task, split.general))
    assert both(worse) == pytest.approx(one(worse) - autopilot.price(lost), abs=1e-6)
    assert autopilot.price(0.1) == pytest.approx(0.2 + autopilot.STEEP * 0.06) and autopilot.price(-0.5) == 0.0


def test_without_general_the_model_speaks_for_itself():
    model, task, split = small("causal_lm")
    parted, again = (general.parts(model, task, split, seed=3) for _ in range(2))
    made = general.said(model, split, 3)
    assert made is not None and made.digest in parted.notes[0]
    assert parted.trained.retain.digest == again.trained.retain.digest
    assert general.parts(model, task, split, seed=4).notes != parted.notes
    assert parted.audited is split  # what the model says is no evidence
    ours = general.runs(split.forget.tokens) - general.runs(split.retain.tokens)
    assert ours and not general.runs(made.tokens) & ours
    assert all(len(t) >= general.SHORT and bool(m[1:].all()) and not m[0] for t, m in zip(made.tokens, made.targets, strict=True))
    attempt = unlearn("npo", model, task, parted.trained, epochs=1, lr=1e-3)
    assert attempt.outcome == "ok", attempt.reason


def test_texts_of_the_model_that_repeat_forget_are_left_out(monkeypatch):
    model, _task, split = small("causal_lm")
    tokens = split.forget.tokens[0][-12:]
    monkeypatch.setattr(general, "generate", lambda *_, **__: [tokens] * general.SAID)
    assert general.said(model, split) is None


# Steps in slices.


def test_slices_of_a_step_give_the_gradient_of_the_whole(monkeypatch):
    model, task, split = small("causal_lm")
    found = []
    for held in (tuning.HELD, 1):
        monkeypatch.setattr(tuning, "HELD", held)
        monkeypatch.setattr(tuning, "JOINED", 100)
        parts = tuning.Steps({"retain": task.batches(split.retain, 12)}, 1, most=max(100, held // 4))[0]
        found.append((len(parts), sum(len(b["retain"]["x"]) for b, _ in parts)))
        twin = copied(model)
        loss = sum(share * tuning.pooled(task.forward(twin, b["retain"]).nll, None, b["retain"]) for b, share in parts)
        loss.backward()
        found[-1] += (float(loss.detach()), torch.cat([p.grad.flatten() for p in twin.parameters()]))
    assert found[0][0] == 1 < found[1][0] and found[0][1] == found[1][1]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    torch.testing.assert_close(found[0][3], found[1][3], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 7, 12])
def test_no_slice_is_larger_than_it_may_be(rows):
    _, task, split = small("causal_lm")
    batch = {**task.batches(split.retain, rows)[0], "tokens": 10.0}
    _n, width = batch["x"].shape
    for most in (1, width, 3 * width, 100 * width):
        parts = tuning.sliced(batch, 0.5, most)
        assert all(b["x"].numel() <= max(most, width) for b, _ in parts)
        assert sum(share for _, share in parts) == pytest.approx(0.5)
        assert torch.equal(torch.cat([b["i"] for b, _ in parts]), batch["i"])
        assert all(bool((b["y"] != IGNORE).any()) for b, _ in parts)


def test_a_run_settles_on_retain_alone_and_validation_sees_that_alone():
    model, task, split = small("causal_lm")
    drawn, scored = [], []
    watched = replace(
        task, collate=lambda data, index, generator: (drawn.append("forget" if data is split.forget else "retain"), task.collate(data, index, generator))[1]
    )
    settings = {"epochs": 4.0, "batch_size": 4, "lr": 1e-3, "settle": 0.5, "accumulate": 1}
    watch = Guard(validate=lambda m: float(scored.append(len(drawn)) or len(scored)), every=1)
    attempt = unlearn("grad_diff", model, watched, split, guard=watch, **settings)
    assert attempt.outcome == "ok", attempt.reason
    steps = len(task.batches(split.forget, 4, epochs=4.0))
    assert watch.meter.steps == steps + round(0.5 * steps)
    assert len(scored) == round(0.5 * steps) + 1  # each of the last steps, and the end
    assert (attempt.meter.forward, attempt.meter.backward) == METHODS["grad_diff"].expected(split, attempt.settings)
    plain = unlearn("grad_diff", model, task, split, **{**settings, "settle": 0.0})
    assert plain.meter.steps == steps and plain.patch.digest != attempt.patch.digest


# Baselines.


def test_trivial_baselines_of_texts_move_what_they_say():
    model, task, split = small("causal_lm")
    before = state(model)
    found = baselines.trivial(model, task, split)
    assert set(found) == {"fine_tune", "reset_last"} and same(before, state(model))
    body = [n for n, _ in model.named_parameters() if "lm_head" not in n]
    moved = {label: [n for n in body if not torch.equal(state(made)["tensors"][n], before["tensors"][n])] for label, made in found.items()}
    assert moved["fine_tune"] and not moved["reset_last"]
    again = baselines.trivial(model, task, split)["reset_last"]
    assert same(state(again), state(found["reset_last"]))
    assert not torch.equal(found["reset_last"].get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert baselines.trivial(model, task, replace(split, retain=None)) == {}


# What is said when nothing passes.


def stopped(name: str, score: float, *rows: tuple[str, str, float, str]) -> Try:
    findings = tuple(Finding("utility" if n.startswith("drop") else "output", n, rule, s, f"{v:g}") for n, rule, v, s in rows)
    grade = Grade("refuted" if any(r[3] == "broken" for r in rows) else "inconclusive", findings, ("why",))
    return replace(tried(score, name=name, lr=2e-3), rows=tuple(Row(n, v, v, v, 20) for n, _, v, _ in rows), grade=grade)


def test_a_refusal_names_the_rule_the_margin_and_what_may_help():
    far = stopped("npo", -0.1, ("known.excess", "<= 0.1", 0.9, "broken"), ("drop.retain", "<= 0.05", 0.2, "broken"))
    near = stopped("wga", -0.9, ("drop.retain", "<= 0.05", 0.06, "broken"))
    thin = stopped("tnpo", -0.5, ("drop.general", "<= 0.05", 0.04, "thin"))
    said = advice.explained([far, near, thin, tried(-0.2)])
    assert [s.split()[0] for s in said[:3]] == ["tnpo", "wga", "npo"]  # the fewest rules broken first
    assert "drop.retain <= 0.05: 0.06 (broken)" in said[1] and "lr=0.002" in said[1]
    assert "known.excess" in said[2] and "one rule more" in said[2]  # eight times its limit against three
    assert len(said) == 5 and "push less hard" in said[3]  # two of three broke utility
    assert advice.explained([tried(-0.2)]) == []
    remains = [stopped(n, -0.5, ("known.excess", "<= 0.1", 0.9, "broken")) for n in ("npo", "wga")]
    assert "push harder" in advice.explained(remains)[2]
    unusable = [stopped("npo", -0.5, ("klom", "<= 1", 0.9, "unusable"))]
    assert "references" in advice.explained(unusable)[1]
    near = [stopped("npo", -0.5, ("drop.general", "<= 0.05", 0.04, "near"))]
    assert "drop.general <= 0.05: 0.04 (near)" in advice.explained(near)[0] and "more records" in advice.explained(near)[1]


@pytest.mark.parametrize(
    ("value", "rule", "far"), [(0.9, ">= 0.8", 0.0), (0.4, ">= 0.8", 0.5), (0.2, "0.4..0.6", 0.5), (0.9, "0.4..0.6", 0.5), (0.5, "<= 0", 0.5)]
)
def test_how_far_a_row_lies_outside_its_rule(value, rule, far):
    assert advice.beyond(Row("r", value, value, value, 9), rule) == pytest.approx(far)
    assert advice.beyond(Row("r", math.nan, math.nan, math.nan, 9), rule) == 1.0


def test_rmu_bends_a_layer_that_has_blocks_below():
    """At a third of the depth: the first block of four was all it moved, which changed nothing."""
    _, task, split = small("causal_lm")
    model = tiny.llama(len(split.forget.format.tokenizer), width=32, layers=4, heads=2, seed=1, context=256)
    attempt = unlearn("rmu", model, task, split, epochs=1, lr=1e-3)
    assert {e.name.split(".")[2] for e in attempt.patch.edits} == {"0", "1"}
