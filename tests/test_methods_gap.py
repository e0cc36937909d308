"""JiT and KGA: losses worked out by hand, what their gradients do, what they read, cost against the meter, and what they forget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_methods_distil import first_loss, fixed_logits, one
from torch import nn
from worlds import accuracy, copied, digits, same, small, state

from expunge.core.errors import SettingError, SplitError
from expunge.core.guard import Guard, watching
from expunge.core.registry import METHODS
from expunge.core.types import Split
from expunge.engine.run import unlearn
from expunge.methods.classifiers.jit import ratio
from expunge.methods.classifiers.kga import gap
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.reading import score

TASK = classification()


def scaled(w: float) -> nn.Linear:
    """f(x) = w x for x of two numbers."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(w * torch.eye(2))
    return model


def points(n: int = 4) -> Examples:
    g = torch.Generator().manual_seed(0)
    return Examples(torch.randn(n, 2, generator=g), torch.arange(n) % 2, torch.arange(n))


# JiT


def test_ratio_is_per_record_and_nothing_where_the_input_stood_still():
    x, shaken = torch.zeros(3, 1, 2), torch.tensor([[[0.0, 2.0]], [[3.0, 4.0]], [[0.0, 0.0]]])
    here, there = torch.zeros(3, 2, requires_grad=True), torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    value = ratio(here, there, x, shaken)
    assert value.tolist() == pytest.approx([2.5, 0.2, 0.0])
    (grad,) = torch.autograd.grad(value.sum(), here)
    assert torch.isfinite(grad).all() and grad[2].abs().max() == 0


@pytest.mark.parametrize("detach", [True, False])
def test_jit_loss_of_a_scaling_is_its_factor(monkeypatch, detach):
    """||3 x - 3 x'|| / ||x - x'|| = 3 for every perturbation."""
    found = first_loss(monkeypatch, "jit", Split(points()), scaled(3.0), n=3, clip=False, detach=detach)
    assert found == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_jit_step_against_the_gradient_by_hand(detach):
    """One step on f(x) = w x. Full gradient: d|w|/dw = 1. Cut at f(x'): sign(w (x - x')) x / |x - x'|."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3.0)
    x = torch.tensor([[0.7], [-1.1], [0.4]])
    torch.manual_seed(5)
    noise = 0.5 * torch.randn(3, 1)
    data = Examples(x, torch.zeros(3, dtype=torch.long), torch.arange(3))
    order = TASK.batches(data, 3, seed=5)[0]["i"]
    slope = float((torch.sign(-noise) * x[order] / noise.abs()).mean()) if detach else 1.0
    twin = copied(model)
    METHODS["jit"](model, TASK, Split(data), n=1, sigma=0.5, clip=False, lr=0.1, detach=detach, seed=5).apply(twin)
    assert float(twin.weight.detach()) == pytest.approx(3.0 - 0.1 * slope, rel=1e-4)


@pytest.mark.parametrize("clip", [True, False])
def test_jit_stays_within_the_range_of_the_batch_when_told(clip):
    model, task, split = small("classification")
    seen = []
    watched = replace(task, forward=lambda m, b: (seen.append(b["x"]), task.forward(m, b))[1])
    METHODS["jit"](model, watched, split, n=2, sigma=2.0, clip=clip)
    inside = all(float(x.min()) >= float(split.forget.x.min()) and float(x.max()) <= float(split.forget.x.max()) for x in seen)
    assert inside == clip


def test_jit_does_not_count_dropout_as_movement():
    model, task, split = small("classification")
    other = copied(model)
    other[5].p = 0.0
    assert METHODS["jit"](model, task, split, n=2).digest == METHODS["jit"](other, task, split, n=2).digest


@pytest.mark.parametrize("detach", [True, False])
def test_jit_cost_and_determinism(detach):
    model, task, split = small("classification")
    before = state(model)
    runs = [unlearn("jit", model, task, split, n=3, epochs=2, detach=detach, seed=seed) for seed in (1, 1, 2)]
    assert METHODS["jit"].expected(split, runs[0].settings) == (runs[0].meter.forward, runs[0].meter.backward)
    assert runs[0].patch.digest == runs[1].patch.digest != runs[2].patch.digest
    assert same(before, state(model)) and set(runs[0].meter.seen) == {"forget"}


def test_jit_forgets_the_class_only_with_the_gradient_cut():
    """Cut: the class falls first. Full gradient: the class stays while the kept ones fall."""
    model, task, split = digits()
    found = {}
    for detach, lr in ((True, 0.02), (False, 0.2)):
        twin = copied(model)
        METHODS["jit"](model, task, split, lr=lr, detach=detach).apply(twin)
        found[detach] = accuracy(twin, split.forget), accuracy(twin, split.retain)
    assert found[True][0] < found[True][1] - 0.2 and found[True][1] > 0.8
    assert found[False][0] > 0.9 > found[False][1] + 0.3


@pytest.mark.parametrize("settings", [{"n": 0}, {"sigma": 0.0}, {"sigma": -1.0}])
def test_jit_settings_are_checked(settings):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match="n must be at least 1 and sigma above 0"):
        METHODS["jit"](model, task, split, **settings)


def test_jit_needs_real_inputs():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    data = Examples(torch.randint(5, (4, 2)), torch.zeros(4, dtype=torch.long), torch.arange(4))
    with pytest.raises(SplitError, match="must be real numbers; forget holds int64"):
        METHODS["jit"](model, TASK, Split(data))


# KGA


def answering(*logits: float) -> nn.Linear:
    model = nn.Linear(1, 2, bias=False)
    model.weight.data.copy_(torch.tensor(logits)[:, None])
    return model


def test_gap_and_its_reverse():
    """(.8808, .1192) against (.5, .5): ln 2 - H = .3278 one way, .4338 the other; 0 to itself."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    assert float(gap(a, b)) == pytest.approx(0.3278, abs=5e-5)
    assert float(gap(b, a)) == pytest.approx(0.4338, abs=5e-5)
    assert float(gap(a, a + 7)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("forgot", "new", "reverse", "value"),
    [
        ((0.0, 0.0), (2.0, 0.0), False, 0.3278),
        ((0.0, 0.0), (2.0, 0.0), True, 0.4338),
        ((0.0, 0.0), (0.0, 0.0), False, 0.0),
        ((2.0, 0.0), (0.0, 0.0), True, 0.4338),
    ],
)
def test_kga_first_loss(monkeypatch, forgot, new, reverse, value):
    """A_D answers (2, 0) to everything; at step 0 A* is A_D, so retain adds 0 and the loss is | gap to A_f - gap of A_D to A_n |."""
    helpers = [answering(*forgot), answering(*new)]
    monkeypatch.setattr("expunge.methods.classifiers.kga.fresh", lambda model, seed: helpers[seed])
    monkeypatch.setattr("expunge.methods.classifiers.kga.train", lambda *args, **options: [])
    split = Split(one(1), one(0), validation=one(0))
    assert first_loss(monkeypatch, "kga", split, fixed_logits(), reverse=reverse, epochs=1) == pytest.approx(value, abs=1e-4)


def test_kga_helpers_see_their_own_data_and_the_same_share_of_retain(monkeypatch):
    model, task, split = small("classification")
    seen = []
    monkeypatch.setattr("expunge.methods.classifiers.kga.train", lambda net, task, data, **options: seen.append(data.ids.tolist()))
    METHODS["kga"](model, task, split, sample=0.25, epochs=1)
    forgot, new = seen
    assert forgot[:16] == split.forget.ids.tolist() and new[:32] == split.validation.ids.tolist()
    assert forgot[16:] == new[32:] and len(forgot[16:]) == 16 and set(forgot[16:]) <= set(split.retain.ids.tolist())


@pytest.mark.parametrize("new", ["validation", "anchor"])
def test_kga_reads_the_part_that_it_is_told_and_never_test(new):
    model, task, split = small("classification", kind="records")
    split = replace(split, anchor=split.validation.take(range(16)))
    attempt = unlearn("kga", model, task, split, new=new, helper_epochs=1, epochs=1)
    assert attempt.outcome == "ok", attempt.reason
    assert {"forget", "retain", new} <= set(attempt.meter.seen) and not {"test", "validation", "anchor"} - {new} & set(attempt.meter.seen)


@pytest.mark.parametrize("settings", [{}, {"ratio": 3, "sample": 0.5, "reverse": True}])
def test_kga_cost_and_determinism(settings):
    model, task, split = small("classification", kind="records")
    before = state(model)
    runs = [unlearn("kga", model, task, split, helper_epochs=2, epochs=2, stop=0, batch_size=8, seed=seed, **settings) for seed in (1, 1, 2)]
    assert METHODS["kga"].expected(split, runs[0].settings) == (runs[0].meter.forward, runs[0].meter.backward)
    assert runs[0].patch.digest == runs[1].patch.digest != runs[2].patch.digest
    assert same(before, state(model))


def test_kga_stops_when_the_gap_is_closed():
    """Of a class, which the method itself, unguarded, takes out."""
    model, task, split = digits()
    steps = {}
    for stop in (0.0, 0.2):
        with watching(Guard()) as watch:
            METHODS["kga"](model, task, split, stop=stop, epochs=6, **METHODS["kga"].toy)
        steps[stop] = watch.meter.steps
    assert steps[0.2] < steps[0.0]


def test_kga_makes_records_look_unseen_and_keeps_the_rest():
    """Random records: the forget loss, near 0 before, becomes that of unseen records, within a factor of 3; retain and test stay."""
    model, task, split = digits("random")
    twin = copied(model)
    METHODS["kga"](model, task, split, helper_epochs=12, epochs=6).apply(twin)
    before, after, unseen = (float(score(m, task, part).nll.mean()) for m, part in ((model, split.forget), (twin, split.forget), (model, split.validation)))
    assert before < 0.01 and unseen / 3 < after < 3 * unseen
    assert accuracy(twin, split.retain) > 0.98 and accuracy(twin, split.test) > accuracy(model, split.test) - 0.03


def test_kga_leaves_a_class_known_when_its_helpers_are_well_trained():
    """A_f answers the class itself: what the manual says under Differs."""
    model, task, split = digits()
    twin = copied(model)
    METHODS["kga"](model, task, split, epochs=2).apply(twin)
    assert accuracy(twin, split.forget) > 0.95


def test_kga_validation_scores_are_of_the_model_alone():
    model, task, split = small("classification", kind="records")
    scored = []
    watch = Guard(validate=lambda m: (scored.append(m), 0.0)[1], every=1)
    unlearn("kga", model, task, split, guard=watch, helper_epochs=1, epochs=1)
    assert scored and all(m is model for m in scored)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"new": "test"}, "new must be one of validation, anchor, not 'test'"),
        ({"sample": 1.5}, "sample must be in 0..1"),
        ({"ratio": 0}, "ratio and epochs 1 or larger"),
        ({"stop": -1.0}, "stop 0 or larger"),
    ],
)
def test_kga_settings_are_checked(settings, words):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match=words):
        METHODS["kga"](model, task, split, **settings)


def test_kga_says_when_the_new_data_is_missing():
    model, task, split = small("classification")
    with pytest.raises(SplitError, match="split lacks anchor"):
        METHODS["kga"](model, task, replace(split, anchor=None), new="anchor")
