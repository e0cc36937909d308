"""Stacks of models with parts of unequal lengths: each ends where it ends alone, stays there, and the paths by hand agree with autograd."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core import guard
from expunge.core.errors import Diverged, ScopeError, SettingError
from expunge.engine import stacked
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.regression.task import regression
from expunge.parts import training

LENGTHS = (50, 16, 33, 7, 50, 1)
RECIPE = {"epochs": 3, "batch_size": 16, "lr": 0.1, "weight_decay": 1e-2}
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "schedule": "linear"},
    "nesterov": {"optimizer": "nesterov", "momentum": 0.9, "schedule": "onecycle"},
    "adam": {"optimizer": "adam", "lr": 0.01, "schedule": "cosine"},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine"},
    "constant": {"optimizer": "nesterov", "momentum": 0.9},
}
BUILDS = {
    "head": lambda: nn.Linear(6, 3),
    "head without bias": lambda: nn.Linear(6, 3, bias=False),
    "mlp": lambda: nets.mlp(6, 3, 8),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    "any": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
}


def parts(lengths=LENGTHS, shape=(6,)) -> list[Examples]:
    g = torch.Generator().manual_seed(3)
    return [Examples(torch.randn(n, *shape, generator=g), torch.randint(0, 3, (n,), generator=g), torch.arange(n)) for n in lengths]


def built(build, k: int = len(LENGTHS)) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [build() for _ in range(k)]


def check(build, data: list[Examples], task=None, tolerance: float = 2e-5, **options) -> list[nn.Module]:
    """Trains one by one and in a stack; both must end at the same weights."""
    task, alone = task or classification(), built(build, len(data))
    together = copy.deepcopy(alone)
    for k, (model, part) in enumerate(zip(alone, data, strict=True)):
        training.train(model, task, part, seed=k, **{**RECIPE, **options})
    stacked.train(together, task, data, seeds=range(len(data)), **{**RECIPE, **options})
    for a, b in zip(alone, together, strict=True):
        assert not b.training
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=10 * tolerance)
    return together


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unequal_parts_end_where_each_model_ends_alone(build, optimizer):
    check(build, parts(), **OPTIMIZERS[optimizer])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unequal_parts_in_other_precisions(dtype):
    """Half precision goes through float32 masters, which a model that leaves the stack must not lose."""
    check(lambda: nets.mlp(6, 3, 8).to(dtype), parts(), tolerance=1e-10 if dtype is torch.float64 else 2e-2, **OPTIMIZERS["nesterov"])


def test_unequal_parts_of_images_augmented_and_of_regression():
    shift = lambda x, g: x + torch.rand(len(x), 1, 1, 1, generator=g)  # noqa: E731
    check(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), [replace(p, augment=shift) for p in parts((20, 9, 33), (1, 4, 4))])
    check(lambda: nets.mlp(6, 1, 8), [replace(p, y=p.x.sum(1)) for p in parts()], regression(), lr=0.01)


def test_a_model_whose_own_run_is_over_does_not_move():
    """Its neighbour's length changes nothing about it, to the last bit: momentum and decay are over as well."""
    ends = []
    for length in (48, 800):
        models = built(BUILDS["mlp"], 2)
        stacked.train(models, classification(), parts((48, length)), seeds=[0, 1], **{**RECIPE, **OPTIMIZERS["constant"]})
        ends.append(models[0].state_dict())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("build", [n for n in BUILDS if n != "any"])
def test_the_gradient_by_hand_is_that_of_autograd(build):
    models, data = built(BUILDS[build], 4), parts((9, 9, 9, 9))
    task = classification()
    batches = [task.batches(d, 16) for d in data]
    by_hand, vectorised = stacked._product(models[0], task, batches), stacked._vectorised(models[0], task)
    assert by_hand is not None
    batch = {name: torch.stack([b[0][name] for b in batches]) for name in ("x", "y", "i")}
    for weights in (None, stacked._weights([9, 4, 1, 7])):
        found = []
        for gradient in (by_hand, vectorised):
            params, buffers = stacked.stack(models)
            found.append((gradient(params, buffers, batch, weights), [p.grad for p in params.values()]))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        for a, b in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(a, b)


def test_who_is_computed_by_hand():
    """Only what the formula holds for: anything else goes through autograd."""
    data, task = parts((9,))[0], classification()

    def by_hand(model, d=data, t=task):
        return stacked._product(model, t, [t.batches(d, 4)]) is not None

    assert by_hand(nn.Linear(6, 3)) and by_hand(nets.mlp(6, 3, 8))
    hooked, shared = nn.Linear(6, 3), nn.Linear(6, 6)
    hooked.register_forward_hook(lambda *_: None)
    assert not any(by_hand(m) for m in (hooked, nn.Sequential(shared, nn.ReLU(), shared), nn.Sequential(nn.Linear(6, 3), nn.Tanh()), nn.Tanh()))
    assert not by_hand(nn.Linear(6, 3).to(torch.bfloat16))
    assert not by_hand(nn.Linear(6, 3), replace(data, y=torch.full((9,), -100)))
    assert not by_hand(nn.Linear(6, 1), replace(data, y=torch.zeros(9)), regression())
    assert not by_hand(nn.Linear(6, 3), t=replace(task, forward=lambda m, b: task.forward(m, b)))


def test_rows_gathered_many_at_a_time_are_those_of_one_at_a_time(monkeypatch):
    task = classification()
    batches = [task.batches(d, 16, epochs=30, seed=k) for k, d in enumerate(parts((50, 33, 40)))]
    monkeypatch.setattr(stacked, "WINDOW", 3 * 16 * 6 * 4 * 5)
    rows = stacked._rows(batches)
    assert rows is not None
    monkeypatch.setattr(stacked, "COPY", 0)
    assert stacked._rows(batches) is None
    for (a, m), (b, n) in zip(stacked._draw(batches, rows, 2, 88, 0), stacked._draw(batches, None, 2, 88, 0), strict=True):
        assert m == n and all(torch.equal(a[name], b[name]) for name in "xyi")


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("kind", [lambda: nets.mlp(6, 3, 11), lambda: nets.mlp(6, 11, 33), lambda: nn.Linear(6, 3)], ids=["mlp", "wide", "head"])
def test_alike_no_bit_depends_on_who_else_is_in_the_stack(kind, options):
    """Exact deletion trains some of them again, and must end where all of them together did: also where matrices begin at odd addresses."""
    data, recipe = parts((50, 33, 40, 61)), {**RECIPE, **options, "schedule": "constant", "alike": True}
    whole = built(kind, 4)
    stacked.train(whole, classification(), data, seeds=range(4), **recipe)
    for some in ([0], [1, 3], [0, 1, 2]):
        models = [built(kind, 4)[k] for k in some]
        stacked.train(models, classification(), [data[k] for k in some], seeds=some, **recipe)
        for k, model in zip(some, models, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole[k].parameters(), strict=True))


def test_alike_is_refused_where_bits_would_differ():
    data = parts((20, 9))
    with pytest.raises(SettingError, match="under schedule 'cosine'"):
        stacked.train(built(lambda: nets.mlp(6, 3, 8), 2), classification(), data, seeds=[0, 1], alike=True, schedule="cosine", **RECIPE)
    with pytest.raises(SettingError, match="chains of linear layers"):
        stacked.train(built(lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()), 2), classification(), data, seeds=[0, 1], alike=True, **RECIPE)


def test_frozen_weights_stay_and_cost_is_counted():
    def build():
        model = nets.mlp(6, 3, 8)
        model[0].requires_grad_(False)
        return model

    for kind in (build, lambda: nn.Sequential(*build(), nn.Identity())):
        before, after = built(kind, 3), check(kind, parts((20, 9, 33)), **OPTIMIZERS["nesterov"])
        assert all(torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[2].weight, b[2].weight) for a, b in zip(before, after, strict=True))
    with guard.watching(guard.Guard()) as g:
        stacked.train(built(build, 3), classification(), parts((20, 9, 33)), seeds=range(3), **RECIPE)
    assert g.meter.forward == g.meter.backward == 3 * (20 + 9 + 33), "rows that pad a batch are not counted"


def test_what_cannot_be_stacked():
    norm = lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))  # noqa: E731
    with pytest.raises(SettingError, match=r"must be padded, which batch norm \('1'\) would see; give parts of one length"):
        stacked.train(built(norm, 2), classification(), parts((20, 33)), seeds=[0, 1], **RECIPE)
    check(norm, parts((32, 16)), **OPTIMIZERS["nesterov"])
    train = lambda **options: stacked.train(built(BUILDS["mlp"], 2), classification(), parts((20, 33)), **{"seeds": [0, 1], **RECIPE, **options})  # noqa: E731
    with pytest.raises(SettingError, match="as many parts and seeds as models, not 2 and 1 for 2"):
        train(seeds=[0])
    with pytest.raises(SettingError, match="schedule must be one of"):
        train(schedule="slow")
    with pytest.raises(Diverged, match="loss is"):
        train(lr=1e30)
    with pytest.raises(ScopeError, match="all of them are frozen"):
        stacked.train([nn.Linear(6, 3).requires_grad_(False)], classification(), parts((20,)), seeds=[0], **RECIPE)
