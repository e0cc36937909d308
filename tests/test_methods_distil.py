"""Baselines and distillation: the numbers of cards bad-teacher-scrub-negrad and stochastic-teacher, determinism, and cost against the meter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import accuracy, copied, diabetes, digits, same, small, state

from expunge.core import guard
from expunge.core.errors import SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import Out, Split
from expunge.engine.run import unlearn
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.losses import kl, kl_to, nll
from expunge.parts.losses.distil import targets
from expunge.parts.reading import outputs
from expunge.parts.training import fresh

NAMES = ("retrain", "fine_tune", "negrad_plus", "random_label", "amnesiac", "scrub", "bad_teacher", "stochastic_teacher")
QUICK = {name: {"erase": 1, "rebuild": 1} if name == "stochastic_teacher" else {"epochs": 1} for name in NAMES}
VARIANTS = [
    *[(name, settings) for name, settings in QUICK.items()],
    ("fine_tune", {"epochs": 1, "k": 2, "reset": True, "anchor": 0.1}),
    ("negrad_plus", {"epochs": 2, "batch_size": 50, "bound": 0}),
    ("random_label", {"epochs": 1, "fixed": True}),
    ("scrub", {"epochs": 2, "msteps": 1, "rewind": True}),
    ("bad_teacher", {"epochs": 1, "share": 0.5, "reduction": "mean"}),
    ("stochastic_teacher", {"erase": 2, "rebuild": 1, "redraw_every": "epoch"}),
    ("duck", {"epochs": 2, "target": 0.0, "polish": 2.0}),
    ("stochastic_teacher", {"erase": 2, "rebuild": 1, "redraw_every": "batch", "labels": True}),
]
IDS = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in VARIANTS]


def student(*logits: float) -> Out:
    """One example that a model gives these logits, with label 0."""
    values = torch.tensor([logits], requires_grad=True)
    return Out(nll=nn.functional.cross_entropy(values, torch.zeros(1, dtype=torch.long), reduction="none"), count=torch.ones(1), logits=values)


def batch_of(data: Examples) -> dict:
    return classification().batches(data, len(data))[0]


# numbers of the cards


@pytest.mark.parametrize(("temperature", "value", "slope"), [(4.0, 0.4949, 0.4898), (1.0, 0.4338, 0.3808)])
def test_kl_and_its_gradient(temperature, value, slope):
    """Student (2, 0), teacher (0, 0): SCRUB's KL_T and the stochastic teacher's erase loss."""
    out = student(2.0, 0.0)
    loss = kl(out, torch.zeros(1, 2), temperature=temperature)
    assert float(loss.detach()) == pytest.approx(value, abs=5e-5)
    (grad,) = torch.autograd.grad(loss.sum(), out.logits)
    assert grad[0].tolist() == pytest.approx([slope, -slope], abs=5e-5)


def test_rebuilding_from_an_equal_teacher_does_nothing():
    out = student(2.0, 0.0)
    loss = kl(out, torch.tensor([[2.0, 0.0]]))
    (grad,) = torch.autograd.grad(loss.sum(), out.logits)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7) and grad.abs().max() < 1e-7


def fixed_logits() -> nn.Linear:
    """A model that answers (2, 0) to the input 1."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [0.0]]))
    return model


def one(label: int, x: float = 1.0) -> Examples:
    return Examples(torch.full((1, 1), x), torch.tensor([label]), torch.tensor([label]))


def first_loss(monkeypatch, name: str, split: Split, model: nn.Module | None = None, **settings) -> float:
    """The loss that the named method computes in its first step, read from the training loop."""
    seen: list[float] = []
    check = Guard.check_loss
    monkeypatch.setattr(Guard, "check_loss", lambda self, value, step, lr: (seen.append(value), check(self, value, step, lr))[1])
    METHODS[name](model or fixed_logits(), classification(), split, **settings)
    return seen[0]


def test_negrad_plus_number(monkeypatch):
    """CE(label 0) = .1269, CE(label 1) = 2.1269: alpha .95 gives .0142; beyond the bound the forget term stands still."""
    assert float(nll(student(2.0, 0.0)).detach()) == pytest.approx(0.1269, abs=5e-5)
    split = Split(one(1), one(0))
    assert first_loss(monkeypatch, "negrad_plus", split, alpha=0.95, epochs=1) == pytest.approx(0.0142, abs=5e-5)
    assert first_loss(monkeypatch, "negrad_plus", split, alpha=0.95, epochs=1, bound=1.0) == pytest.approx(0.95 * 0.1269 - 0.05, abs=5e-5)


@pytest.mark.parametrize(("reduction", "value"), [("mean", 0.5034), ("batchmean", 1.0068)])
def test_bad_teacher_number(monkeypatch, reduction, value):
    """Student (2, 0), random teacher (0, 1); the retain half of the batch is its own teacher and adds 0."""
    monkeypatch.setattr("expunge.methods.classifiers.bad_teacher.fresh", lambda model, seed: _answering(0.0, 1.0))
    found = first_loss(monkeypatch, "bad_teacher", Split(one(1), one(0)), reduction=reduction, epochs=1)
    assert 2 * found == pytest.approx(value, abs=1e-4)
    assert float(kl_to(student(2.0, 0.0), torch.tensor([[0.0, 1.0]]).softmax(-1)).detach()) == pytest.approx(1.0068, abs=5e-5)


def _answering(*logits: float) -> nn.Linear:
    model = fixed_logits()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(logits)[:, None])
    return model


def test_bad_teacher_at_temperature_two_leaves_an_equal_student_alone(monkeypatch):
    """Both softmaxes carry T: student (2, 0) taught by (2, 0) has loss 0 at any T."""
    monkeypatch.setattr("expunge.methods.classifiers.bad_teacher.fresh", lambda model, seed: _answering(2.0, 0.0))
    assert first_loss(monkeypatch, "bad_teacher", Split(one(1), one(0)), temperature=2.0, epochs=1) == pytest.approx(0, abs=1e-6)


def test_scrub_begins_where_its_teacher_stands(monkeypatch):
    """Step 0: the student is its own teacher, so -KL is 0."""
    split = Split(one(1), one(0, 2.0))
    assert first_loss(monkeypatch, "scrub", split, epochs=1, msteps=1) == pytest.approx(0, abs=1e-6)


# determinism, cost, and what the model keeps


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=IDS)
def test_same_seed_same_patch_and_cost_is_what_the_meter_counts(name, settings):
    model, task, split = digits()
    before, found = state(model), []
    for seed in (1, 1, 2):
        attempt = unlearn(name, model, task, split, seed=seed, **settings)
        assert attempt.outcome in ("ok", "harmed"), attempt.reason
        found.append(attempt.patch.digest)
        assert METHODS[name].expected(split, attempt.settings) == (attempt.meter.forward, attempt.meter.backward)
    assert found[0] == found[1] != found[2]
    assert same(before, state(model))


@pytest.mark.parametrize("name", ["retrain", "fine_tune", "negrad_plus"])
def test_regression_cost(name):
    model, task, split = diabetes()
    attempt = unlearn(name, model, task, split, **QUICK[name])
    assert attempt.outcome == ("harmed" if name == "retrain" else "ok"), attempt.reason  # retrained for one pass, it is good for nothing yet
    assert METHODS[name].expected(split, attempt.settings) == (attempt.meter.forward, attempt.meter.backward)


@pytest.mark.parametrize("name", NAMES)
def test_toy_forgets_the_class_and_keeps_the_rest(name):
    model, task, split = digits()
    twin = copied(model)
    unlearn(name, model, task, split, **METHODS[name].toy).patch.apply(twin)
    assert accuracy(twin, split.forget) < accuracy(twin, split.retain) - 0.3


# single methods


def test_scrub_bound_stops_the_push_and_the_first_push_has_no_gradient():
    """Student = teacher: a pass of the forget phase alone moves nothing. Past the bound an example is left alone; bound=0 goes on pushing."""
    model, task, split = digits()
    still = {"epochs": 1, "msteps": 1, "lr": 0.05, "gamma": 0.0, "alpha": 0.0, "weight_decay": 0.0}
    moved, kept = copied(model), copied(model)
    METHODS["scrub"](model, task, split, **still).apply(moved)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(moved.parameters(), kept.parameters(), strict=True)) < 1e-4
    reached = {}
    for bound in (0.0, 1.0):
        twin = copied(model)
        METHODS["scrub"](model, task, split, epochs=2, msteps=2, lr=0.05, bound=bound).apply(twin)
        now, was = outputs(twin, task, split.forget), outputs(model, task, split.forget)
        reached[bound] = float(kl(Out(nll=torch.zeros(1), count=torch.ones(1), logits=now), was, temperature=4.0).mean())
    assert reached[1.0] < reached[0.0]


def test_retrain_is_training_from_fresh_weights(monkeypatch):
    """With lr 0 the patch holds the fresh weights and reset buffers; the weights before have no part in it."""
    model, task, split = small("classification")
    model[1].running_mean.fill_(3.0)
    other = copied(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-2)
    assert METHODS["retrain"](model, task, split, epochs=1).digest == METHODS["retrain"](other, task, split, epochs=1).digest
    twin = copied(model)
    METHODS["retrain"](model, task, split, epochs=1, lr=0.0, buffers="freeze").apply(twin)
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), fresh(model, 0).parameters(), strict=True))
    assert float(twin[1].running_mean.abs().max()) == 0


def test_fine_tune_last_layers_and_reset():
    """CF-k moves the last k layers only; EU-k with anchor is pulled to the fresh weights and forgets the old ones altogether."""
    model, task, split = small("classification")
    names = {e.name for e in METHODS["fine_tune"](model, task, split, k=1, epochs=1, buffers="freeze").edits}
    assert names == {"8.weight", "8.bias"}
    other = copied(model)
    with torch.no_grad():
        other[8].weight.add_(5.0)
    settings = {"k": 1, "reset": True, "anchor": 1.0, "epochs": 1, "buffers": "freeze"}
    assert METHODS["fine_tune"](model, task, split, **settings).digest == METHODS["fine_tune"](other, task, split, **settings).digest
    with pytest.raises(SettingError, match="reset=true needs k"):
        METHODS["fine_tune"](model, task, split, reset=True)


def test_anchor_holds_weights_near_their_start():
    model, task, split = small("classification")
    moved = {}
    for anchor in (0.0, 10.0):
        twin = copied(model)
        METHODS["fine_tune"](model, task, split, epochs=30, lr=0.02, weight_decay=0.0, anchor=anchor).apply(twin)
        moved[anchor] = sum(float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert moved[10.0] < 0.5 * moved[0.0]


def trained_labels(monkeypatch, name: str, split: Split, model: nn.Module, **settings) -> dict[int, set[int]]:
    """id -> labels that the record was trained on, read where the loss is computed."""
    found: dict[int, set[int]] = {}
    task = classification()
    if name == "amnesiac":
        forward = task.forward
        task = replace(task, forward=lambda m, b: (_note(found, b["x"], b["y"]) if torch.is_grad_enabled() else None, forward(m, b))[1])
    else:
        forward, last = task.forward, {}
        task = replace(task, forward=lambda m, b: (last.update(x=b["x"]), forward(m, b))[1])
        original = METHODS[name].function.__globals__["relabel"]

        def spy(out: Out, labels: torch.Tensor) -> torch.Tensor:
            _note(found, last["x"], labels)
            return original(out, labels)

        monkeypatch.setitem(METHODS[name].function.__globals__, "relabel", spy)
    METHODS[name](model, task, split, **settings)
    return found


def _note(found: dict[int, set[int]], x: torch.Tensor, labels: torch.Tensor) -> None:
    for row, label in zip(x, labels.tolist(), strict=True):
        found.setdefault(hash(row.numpy().tobytes()), set()).add(label)


@pytest.mark.parametrize(("name", "settings", "once"), [("amnesiac", {}, True), ("random_label", {"fixed": True}, True), ("random_label", {}, False)])
def test_labels_that_forgotten_records_are_trained_on(monkeypatch, name, settings, once):
    """Wrong ones, one per record when fixed, several over 6 epochs when not; retained records keep the true one."""
    model, _, split = small("classification")
    found = trained_labels(monkeypatch, name, split, model, epochs=6, **settings)
    for part, gone in ((split.forget, True), (split.retain, False)):
        for x, y in zip(part.x, part.y.tolist(), strict=True):
            labels = found[hash(x.numpy().tobytes())]
            assert (y not in labels) if gone else labels == {y}
    counts = [len(found[hash(x.numpy().tobytes())]) for x in split.forget.x]
    assert max(counts) == 1 if once else min(counts) > 1


def test_labels_come_from_all_outputs_of_the_model(monkeypatch):
    """Ten outputs, data of classes 0 and 1 only: wrong labels reach beyond the largest label at hand."""
    model, _, split = small("classification")
    low = replace(split, forget=replace(split.forget, y=split.forget.y % 2), retain=replace(split.retain, y=split.retain.y % 2))
    found = trained_labels(monkeypatch, "amnesiac", low, model, epochs=1)
    assert max(max(found[hash(x.numpy().tobytes())]) for x in low.forget.x) > 1


def test_scrub_rewinds_to_the_round_nearest_to_the_goal():
    """True labels ask for the last round, held-out records that are all wrong for the second: forget error rises, then falls again."""
    model, task, split = digits()
    settings = {"epochs": 4, "msteps": 2, "lr": 0.05, "momentum": 0.0, "decay": 1.0}

    def error(m, data) -> float:
        return 1 - accuracy(m, data)

    rounds = []
    for epochs in range(1, 5):
        twin = copied(model)
        METHODS["scrub"](model, task, split, **{**settings, "epochs": epochs, "msteps": min(2, epochs)}).apply(twin)
        rounds.append(twin)
    true = split.validation.take((split.validation.y == 3).nonzero().squeeze(1))
    zeros = split.validation.take((split.validation.y == 0).nonzero().squeeze(1))
    chosen = []
    for held in (true, replace(zeros, y=torch.full_like(zeros.y, 3))):
        gaps = [abs(error(m, split.forget) - error(rounds[-1], held)) for m in rounds]
        chosen.append(gaps.index(min(gaps)))
        twin = copied(model)
        METHODS["scrub"](model, task, replace(split, validation=held), rewind=True, **settings).apply(twin)
        for p, q in zip(twin.parameters(), rounds[chosen[-1]].parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert chosen == [3, 1]


def test_scrub_rewind_needs_held_out_records_of_the_class():
    model, task, split = digits()
    with pytest.raises(SplitError, match="split lacks validation"):
        METHODS["scrub"](model, task, replace(split, validation=None), rewind=True)
    without = split.validation.take((split.validation.y != 3).nonzero().squeeze(1))
    with pytest.raises(SplitError, match="no record of the forgotten classes"):
        METHODS["scrub"](model, task, replace(split, validation=without), rewind=True)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("stochastic_teacher", {"redraw_every": "x"}, "redraw_every must be one of never, epoch, batch, not 'x'"),
        ("bad_teacher", {"reduction": "sum"}, "reduction must be batchmean or mean"),
        ("negrad_plus", {"alpha": 1.5}, "alpha must be in 0..1"),
        ("scrub", {"epochs": 0}, "epochs must be 1 or larger"),
    ],
)
def test_settings_out_of_range(name, settings, words):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match=words):
        METHODS[name](model, task, split, **settings)


# teachers


def test_cached_targets_are_the_teacher_and_cost_one_pass():
    model, task, split = small("classification")
    with guard.watching(Guard()) as g:
        find = targets(model, guard.metered(task, split, g.meter), split.forget)
        batches = task.batches(split.forget, 5, seed=1, epochs=2)
        for k in range(len(batches)):
            torch.testing.assert_close(find(batches[k]), model(batches[k]["x"]).detach())
    assert g.meter.forward == len(split.forget)


def test_augmented_data_is_taught_live_by_the_frozen_teacher():
    """The teacher sees the augmented batch, and stays what it was when the student moves."""
    model, task, split = small("classification")
    data = replace(split.forget, augment=lambda x, g: x + torch.rand(x.shape, generator=g))
    batch = task.batches(data, 8, seed=1)[0]
    want = model(batch["x"]).detach()
    find = targets(model, task, data)
    plain = outputs(model, task, split.forget)[batch["i"]]
    with torch.no_grad():
        model[8].weight.zero_()
    torch.testing.assert_close(find(batch), want)
    assert not find(batch).requires_grad
    assert not torch.allclose(want, plain)


@pytest.mark.parametrize("name", ["scrub", "bad_teacher", "stochastic_teacher"])
def test_augmentation_costs_a_teacher_pass_per_step(name):
    """Live teachers: as many teacher passes as student passes, where the cache needs one pass in all."""
    model, task, split = small("classification")
    live = replace(split, **{p: replace(getattr(split, p), augment=lambda x, g: x.flip(-1)) for p in ("forget", "retain")})
    settings = {"erase": 3, "rebuild": 3} if name == "stochastic_teacher" else {"epochs": 3}
    cached, augmented = (unlearn(name, model, task, s, **settings) for s in (split, live))
    assert cached.meter.backward == augmented.meter.backward
    assert augmented.meter.forward > cached.meter.forward
    assert cached.patch.digest != augmented.patch.digest


def test_redrawing_changes_the_teacher_when_it_says_so(monkeypatch):
    """16 examples in batches of 8 over 2 passes: 1, 2 and 4 draws, each from another seed."""
    model, task, split = small("classification")
    settings = {"erase": 2, "rebuild": 1, "batch_size": 8}
    seeds: list[int] = []
    real = fresh
    monkeypatch.setattr("expunge.methods.classifiers.stochastic_teacher.fresh", lambda m, seed: (seeds.append(seed), real(m, seed))[1])
    drawn = {}
    for when in ("never", "epoch", "batch"):
        seeds.clear()
        METHODS["stochastic_teacher"](model, task, split, seed=7, redraw_every=when, **settings)
        drawn[when] = list(seeds)
    assert drawn == {"never": [7], "epoch": [7, 8], "batch": [7, 8, 9, 10]}


def test_random_teacher_has_calibrated_statistics(monkeypatch):
    """The random network's running mean is that of the forget inputs, not 0."""
    model, task, split = small("classification")
    seen: list[nn.Module] = []
    real = fresh
    monkeypatch.setattr("expunge.methods.classifiers.stochastic_teacher.fresh", lambda m, seed: (seen.append(real(m, seed)), seen[-1])[1])
    METHODS["stochastic_teacher"](model, task, split, erase=1, rebuild=1)
    random = seen[0]
    activations = random[0](batch_of(split.forget)["x"])
    torch.testing.assert_close(random[1].running_mean, activations.mean((0, 2, 3)).detach(), atol=1e-5, rtol=1e-4)


def test_a_model_taught_wrong_labels_is_doubted():
    """reset_fine_tune copies the original's logits only where the original knows the forgotten records as well as the kept ones."""
    from expunge.methods.classifiers.reset_fine_tune import DOUBTED, doubted
    from expunge.parts.reading import outputs

    model, task, split = digits("random")
    wrong = replace(split, forget=replace(split.forget, y=(split.forget.y + 1) % 10))
    teacher = outputs(model, task, split.retain)
    assert not doubted(model, task, split, teacher, 0.5)
    assert doubted(model, task, wrong, teacher, 0.5) and not doubted(model, task, wrong, teacher, 0.0)
    settings = {"epochs": 0.5, "seed": 3}
    found = unlearn("reset_fine_tune", model, task, wrong, **settings).patch.digest
    assert found == unlearn("reset_fine_tune", model, task, wrong, **settings, **DOUBTED).patch.digest
    assert found != unlearn("reset_fine_tune", model, task, wrong, doubt=0.0, **settings).patch.digest
