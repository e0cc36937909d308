"""Boundary shrink and expanding: the card's numbers, the attack, the curvature penalty against finite differences, and costs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import accuracy, digits, small

from expunge.core.errors import SettingError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import concat
from expunge.data.records.nearest import curvature, nearest_wrong, pgd
from expunge.engine.run import unlearn
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.training import train

TASK = classification()


def one(x: list[float], y: int = 0) -> dict:
    return {"x": torch.tensor([x]), "y": torch.tensor([y]), "i": torch.tensor([0])}


def test_card_step_and_label():
    """Two-class identity model at (.55, .50), class 0, b = .1: (.45, .60), which is class 1."""
    attacked = pgd(nn.Identity(), TASK, one([0.55, 0.50]), 0.1, 0.0, 1.0)
    assert attacked[0].tolist() == pytest.approx([0.45, 0.60])
    data = Examples(torch.tensor([[0.55, 0.50], [0.0, 1.0]]), torch.tensor([0, 1]), torch.arange(2))
    assert nearest_wrong(nn.Linear(2, 2).requires_grad_(False), TASK, data, bound=0.1).tolist() == [1, 0]


def test_card_shadow_class():
    assert float(F.cross_entropy(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([2]))) == pytest.approx(2.2395, abs=5e-5)


@pytest.mark.parametrize(("step", "steps", "reach"), [(0.0, 3, 0.1), (0.03, 2, 0.06), (0.03, 9, 0.1)])
def test_pgd_goes_no_further_than_its_bound(step, steps, reach):
    x = pgd(nn.Identity(), TASK, one([0.5, 0.5]), 0.1, 0.0, 1.0, step=step, steps=steps)
    assert x[0].tolist() == pytest.approx([0.5 - reach, 0.5 + reach])
    assert pgd(nn.Identity(), TASK, one([0.02, 0.99]), 0.1, 0.0, 1.0, step=step, steps=steps)[0].tolist() == pytest.approx([0.0, 1.0])


def test_curvature_against_finite_differences():
    """||grad l(x + z) - grad l(x)|| with both gradients from central differences of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    batch = {"x": torch.randn(4, 3).double(), "y": torch.tensor([0, 1, 0, 1]), "i": torch.arange(4)}

    def slope(x):
        columns = []
        for j in range(3):
            by = torch.zeros(3).double()
            by[j] = 1e-5
            columns.append((TASK.forward(model, {**batch, "x": x + by}).nll - TASK.forward(model, {**batch, "x": x - by}).nll) / 2e-5)
        return torch.stack(columns, 1).detach()

    g = slope(batch["x"])
    z = 0.9 * g.sign() / 3**0.5
    oracle = (slope(batch["x"] + z) - g).norm(dim=1)
    assert torch.allclose(curvature(model, TASK, batch), oracle, rtol=1e-5)


def test_curvature_of_a_linear_loss_is_nothing():
    flat = classification()
    linear = nn.Linear(2, 2).double()
    straight = type(flat)("flat", flat.collate, lambda m, b: type(out := flat.forward(m, b))(m(b["x"])[:, 0], out.count), flat.features)
    assert float(curvature(linear, straight, {"x": torch.randn(1, 2).double(), "y": torch.tensor([0]), "i": torch.tensor([0])}).detach()) < 1e-5


@pytest.mark.parametrize("settings", [{"curve": 0.7}, {"steps": 5, "step": 0.03}, {"curve": 0.7, "steps": 2, "weighted": True}])
def test_options_cost_what_they_declare_and_repeat(settings):
    model, task, split = small("classification")
    watch = Guard()
    attempt = unlearn("boundary_shrink", model, task, split, guard=watch, epochs=2, **settings)
    assert attempt.outcome == "ok"
    assert (watch.meter.forward, watch.meter.backward) == METHODS["boundary_shrink"].expected(split, attempt.settings)
    again = unlearn("boundary_shrink", model, task, split, epochs=2, **settings)
    assert again.patch.digest == attempt.patch.digest


def test_the_curvature_penalty_matters():
    model, task, split = small("classification")
    with_, without = (unlearn("boundary_shrink", model, task, split, epochs=2, curve=c).patch for c in (0.7, 0.0))
    assert with_.digest != without.digest


@functools.lru_cache
def normed() -> tuple:
    """A network of batch norm that knows the digits: some seconds."""
    model, task, split = digits("random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
        settings = {"epochs": 10, "batch_size": 50, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "schedule": "onecycle"}
        train(model, task, concat(split.forget, split.retain), seed=0, **settings)
    return model.eval(), task, split


@pytest.mark.parametrize(("name", "lost"), [("boundary_shrink", 20), ("boundary_expand", 1)])
def test_batch_norm_is_trained_on_as_published(name, lost):
    """The default lets the statistics move and keeps the rest; kept as they are, the same steps cost many points."""
    model, task, split = normed()
    kept, patches = {}, {}
    for buffers in ("move", "freeze"):
        patches[buffers] = METHODS[name](model, task, split, buffers=buffers)
        with patches[buffers].tried(model):
            kept[buffers] = 100 * accuracy(model, split.retain)
    assert kept["move"] > 97 and kept["move"] - kept["freeze"] > lost
    statistics = {b: {e.name for e in p.edits if "running" in e.name} for b, p in patches.items()}
    assert len(statistics["move"]) == 4 and not statistics["freeze"]
    assert METHODS[name](model, task, split).digest == patches["move"].digest


@pytest.mark.parametrize("settings", [{"steps": 0}, {"bound": 0.0}, {"step": -1.0}, {"curve": -0.1}])
def test_settings_are_checked(settings):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match="steps must be at least 1"):
        METHODS["boundary_shrink"](model, task, split, **settings)
