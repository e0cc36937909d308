"""Unlearnable examples: the card's numbers, bounds, determinism, protection of digits and its limits, counter-measures, and bad input."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from worlds import same, state

from expunge.audits.core import gate
from expunge.audits.records import shield as audits
from expunge.audits.records.shield import COUNTERS, protection
from expunge.core.errors import DataError, SettingError, SplitError
from expunge.data.records import shield
from expunge.data.records.shield import clusters, convolve, cuda, kernel, pull
from expunge.modalities import nets
from expunge.modalities.examples import Examples
from expunge.modalities.worlds import World, world
from expunge.parts.reading import features
from expunge.parts.training import train

RECIPE = {"epochs": 15, "batch_size": 50, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}


def flat_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nets.mlp(64, 10, 32))


@functools.lru_cache
def digits() -> World:
    return world("digits")


@functools.lru_cache
def surrogate() -> nn.Module:
    """Trained on other digits than those that are protected."""
    w = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = flat_mlp()
    train(model, w.task, w.validation, seed=5, **{**RECIPE, "epochs": 30})
    return model


@functools.lru_cache
def clustered(eps: float, on: str = "cluster", seed: int = 0) -> Examples:
    return clusters(digits().train, surrogate(), digits().task, eps=eps, steps=20, on=on, width=8, lr=0.015, seed=seed)


@functools.lru_cache
def measured(which: str, counters: tuple[str, ...] = ()) -> dict:
    """Rows by name for protected digits."""
    w = digits()
    protected = {
        "cuda": lambda: cuda(w.train, 1),
        "cuda5": lambda: cuda(w.train, 1, size=5),
        "wide": lambda: clustered(0.5),
        "narrow": lambda: clustered(16 / 255),
        "classwise": lambda: replace(w.train, x=(w.train.x + 16 / 255 * signs()[w.train.y]).clamp(0, 1)),
    }[which]()
    rows = protection(flat_mlp, w.task, w.train, protected, w.test, RECIPE, counters=counters, steps=3)
    return {r.name: r for r in rows}


def signs() -> Tensor:
    return torch.randint(0, 2, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def images(n: int = 12, channels: int = 3, side: int = 6, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, channels, side, side, generator=g), torch.arange(n) % 3, torch.arange(n))


# CUDA


def test_convolution_of_the_card():
    x, k = torch.zeros(1, 1, 3, 3), torch.tensor([[0.1, 0.2, 0.0], [0.0, 1.0, 0.1], [0.2, 0.0, 0.1]])
    x[0, 0, 0, 0], x[0, 0, 1, 1] = 1.0, 0.5
    raw = F.conv2d(x, k[None, None], padding=1)
    torch.testing.assert_close(raw[0, 0], torch.tensor([[1.05, 0, 0.1], [0.25, 0.6, 0], [0, 0.1, 0.05]]))
    assert (255 * convolve(x, k)).round().int()[0, 0].tolist() == [[255, 0, 24], [60, 145, 0], [0, 24, 12]]


def test_cuda_against_a_loop_over_images_and_pixels():
    data = images()
    got = cuda(data, 9, size=3)
    for image, label, out in zip(data.x, data.y.tolist(), got.x, strict=True):
        k, padded = kernel(9, label).double(), F.pad(image.double(), (1, 1, 1, 1))
        want = torch.stack([torch.stack([(padded[:, r : r + 3, c : c + 3] * k).sum((1, 2)) for c in range(6)], -1) for r in range(6)], -2)
        want = 255 * want / want.max()
        assert bool(((255 * out - want) < 1e-3).all()) and bool((want - 255 * out < 1 + 1e-3).all()), "truncated, not rounded"
    torch.testing.assert_close(255 * got.x, (255 * got.x).round(), atol=1e-4, rtol=0)
    assert float(got.x.min()) >= 0 and got.x.amax((1, 2, 3)).tolist() == [1.0] * len(data)
    assert torch.equal(got.y, data.y) and torch.equal(got.ids, data.ids)


def test_filters_come_from_key_and_class_alone():
    kernels = torch.stack([kernel(k, c, blur=0.2) for k in range(20) for c in range(10)])
    assert (kernels == 1).sum((1, 2)).tolist() == [1] * 200 and float(kernels.min()) >= 0 and float(kernels.flatten(1).sort().values[:, -2].max()) <= 0.2
    places = torch.bincount(kernels.flatten(1).argmax(1), minlength=9)
    assert int(places.min()) > 8, "the place of the 1 is uniform over nine: 22 expected of 200"
    assert len(kernels.flatten(1).unique(dim=0)) == 200
    data = images(30)
    assert torch.equal(cuda(data, 4).x, cuda(data, 4).x) and not torch.equal(cuda(data, 4).x, cuda(data, 5).x)
    few = data.take([1, 4, 7])
    assert torch.equal(cuda(few, 4).x, cuda(data, 4).x[[1, 4, 7]]), "a class keeps its filter whatever other images there are"


def test_cuda_on_a_share_and_on_black_images():
    data = images(200)
    changed = (cuda(data, 3, share=0.3).x != data.x).flatten(1).any(1)
    assert 40 <= int(changed.sum()) <= 80
    black = replace(data, x=torch.zeros_like(data.x))
    assert torch.equal(cuda(black, 3).x, black.x)
    assert cuda(replace(data, x=data.x.double()), 3).x.dtype == torch.double


# unlearnable clusters


def test_loss_of_the_card():
    """0 where features are the centre; features (0, 0) and centre (2, 0): KL(softmax(2, 0) || uniform) = 0.3278."""
    value = pull(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([2.0, 0.0]))
    assert value.tolist() == pytest.approx([0.3278, 0.0], abs=5e-5)


@pytest.mark.parametrize("on", ["cluster", "all"])
def test_perturbations_push_clusters_to_the_next_centre(on):
    w, model = digits(), surrogate()
    protected = clustered(0.5, on)
    before, after = (features(model, w.task, d) for d in (w.train, protected))
    centres, where = shield._means(before, 10, 0)
    gains = []
    for i in range(10):
        mine, target = where == i, centres[(i + 1) % 10]
        gains.append(float(pull(before[mine], target).mean()) > 2 * float(pull(after[mine], target).mean()))
        delta = (protected.x - w.train.x)[mine]
        free = (protected.x[mine] > 0) & (protected.x[mine] < 1)
        shared = torch.where(free, delta, torch.nan)
        assert float((shared.nan_to_num(-9).amax(0) - shared.nan_to_num(9).amin(0)).clamp(min=0).max()) < 1e-5, "one perturbation per cluster"
    assert sum(gains) >= 8


@pytest.mark.parametrize("eps", [16 / 255, 0.5])
def test_bounds_hold_and_nothing_else_changes(eps):
    clean, protected = digits().train, clustered(eps)
    change = (protected.x - clean.x).abs()
    assert 0.9 * eps < float(change.max()) <= eps + 1e-6
    assert float(protected.x.min()) >= 0 and float(protected.x.max()) <= 1
    assert torch.equal(protected.y, clean.y) and torch.equal(protected.ids, clean.ids)


def test_clusters_are_those_of_their_seed_and_read_no_label():
    w = digits()
    some, model = w.train.take(range(60)), flat_mlp().train()
    some = replace(some, augment=audits.crop)
    model[1][0].weight.requires_grad_(False)
    before, rng, options = copy.deepcopy(state(model)), torch.get_rng_state(), {"p": 3, "steps": 3, "width": 4}
    one = clusters(some, model, w.task, **options)
    assert torch.equal(one.x, clusters(replace(some, y=some.y.flip(0)), model, w.task, **options).x)
    assert not torch.equal(one.x, clusters(some, model, w.task, seed=1, **options).x)
    assert one.augment is audits.crop
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), rng)
    colour = images(9)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    assert clusters(colour, net, w.task, p=2, steps=2, layer="0").x.shape == colour.x.shape


# protection


@pytest.mark.parametrize(("which", "clean", "most"), [("cuda", 0.93, 0.6), ("cuda5", 0.93, 0.45), ("wide", 0.93, 0.7)])
def test_digits_are_protected(which, clean, most):
    """Clean test accuracy after training on clean and on protected digits, at the worse end of the interval."""
    rows = measured(which)
    assert rows["shield.clean"].low > clean and rows["shield.protected"].high < most
    assert rows["shield.drop"].low > 0.3 and rows["shield.best"].value == rows["shield.protected"].value


@pytest.mark.slow
def test_a_small_bound_on_small_images_protects_nothing():
    """At 16/255 a perturbation of 8x8 pixels is 0.5 long and the means of two classes are 2.0 apart: even noise that is drawn per class, and so
    gives every label away, leaves clean accuracy where it was."""
    x, y = digits().train.x.flatten(1), digits().train.y
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    apart = torch.cdist(means, means)
    assert float(apart[apart > 0].median()) > 4 * float((16 / 255 * signs()).flatten(1).norm(dim=1).max()) * 0.99
    for which in ("narrow", "classwise"):
        rows = measured(which)
        assert rows["shield.protected"].low > 0.9 and rows["shield.drop"].high < 0.05


@pytest.mark.slow
def test_counter_measures_are_read_on_both():
    names = ("crop", "cutout", "blur", "jpeg", "adversarial")
    rows = measured("cuda5", names)
    for name in names:
        assert rows[f"shield.protected.{name}"].high < 0.5 < 0.65 < rows[f"shield.clean.{name}"].low
    tried = [r for r in rows.values() if r.name.startswith("shield.protected")]
    assert len(tried) == 6 and rows["shield.best"].high == max(r.high for r in tried)
    assert gate(list(rows.values()), {"shield.best": "<= 0.5", "shield.clean": ">= 0.9"}) == []
    assert gate(list(rows.values()), {"shield.best": "<= 0.1"})[0].startswith("shield.best is")


def test_no_shield_reads_no_protection():
    w = digits()
    some, test, rng = w.train.take(range(200)), w.test.take(range(100)), torch.get_rng_state()
    calls = []
    recipe = {**RECIPE, "epochs": 3}
    rows = {r.name: r for r in protection(flat_mlp, w.task, some, some, test, recipe, counters=["blur"], runs=2, progress=lambda *a: calls.append(a))}
    again = {r.name: r for r in protection(flat_mlp, w.task, some, some, test, recipe, counters=["blur"], runs=2)}
    assert rows == again and torch.equal(torch.get_rng_state(), rng)
    for name in ("", ".blur"):
        a, b = rows[f"shield.protected{name}"], rows[f"shield.clean{name}"]
        assert (a.value, a.low, a.high) == (b.value, b.low, b.high) and a.low < a.value < a.high
    assert rows["shield.drop"].value == 0 and rows["shield.linf"].value == 0 and rows["shield.l2"].value == 0
    assert [(k, n) for _, k, n in calls] == [(k, 8) for k in range(8)]


@pytest.mark.slow
def test_counter_measures_do_what_they_say():
    x, g = images(40, side=8).x, torch.Generator().manual_seed(0)
    assert torch.equal(audits.grayscale(x)[:, 0], audits.grayscale(x)[:, 2]) and torch.allclose(audits.grayscale(x)[:, 0], x.mean(1))
    flat = torch.full((1, 1, 4, 4), 0.3)
    torch.testing.assert_close(audits.blur(flat), flat)
    holes = (audits.cutout(x, g) == 0).all(1)
    assert int(holes.flatten(1).sum(1).max()) == 16 and int(holes.flatten(1).sum(1).min()) >= 4 and len(holes.unique(dim=0)) > 10
    smooth = audits.blur(audits.blur(x))
    assert float((audits.jpeg(smooth) - smooth).abs().mean()) < 0.03 < 0.1 < float((audits.jpeg(x, 5) - x).abs().mean())
    assert audits.jpeg(x).shape == x.shape and float(audits.jpeg(x).max()) <= 1
    assert COUNTERS["grayscale"].colour and "shield.protected.grayscale" not in measured("cuda5", ("crop", "cutout", "blur", "jpeg", "adversarial"))


def test_adversarial_examples_stay_in_their_bound_and_raise_the_loss():
    w, model, seen = digits(), copy.deepcopy(surrogate()), []
    watched = replace(w.task, forward=lambda m, b: (seen.append(b["x"].detach()), w.task.forward(m, b))[1])
    batch = w.task.batches(w.test, 100)[0]
    plain = w.task.forward(model, batch).mean.mean()
    hard = audits.attacked(watched, 0.1, 5).forward(model.train(), batch).mean.mean()
    assert float(hard.detach()) > 2 * float(plain.detach()) and model.training and all(m.training for m in model.modules())
    assert float((seen[-1] - batch["x"]).abs().max()) <= 0.1 + 1e-6 and float(seen[-1].min()) >= 0 and float(seen[-1].max()) <= 1
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(audits.attacked(watched, 0.1, 5).forward(model.eval(), batch).mean.mean(), plain)


# bad input


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"x": torch.rand(4, 8, 8)}, {}, DataError, r"images must be floats of shape \(N, C, H, W\); found float32 \(4, 8, 8\)"),
        ({"x": torch.ones(4, 1, 8, 8, dtype=torch.uint8)}, {}, DataError, "found uint8"),
        ({"x": 255 * torch.ones(4, 1, 8, 8)}, {}, DataError, "images must lie in 0..1; found 255 to 255: divide bytes by 255"),
        ({"x": torch.full((4, 1, 8, 8), -0.5)}, {}, DataError, "found -0.5 to -0.5"),
        ({"x": torch.full((4, 1, 8, 8), torch.nan)}, {}, DataError, "found nan to nan"),
        ({"x": torch.rand(0, 1, 8, 8), "y": torch.zeros(0).long(), "ids": torch.arange(0)}, {}, DataError, "images must be floats"),
        ({"y": torch.rand(4)}, {}, DataError, "cuda needs one integer label per image; found float32"),
        ({}, {"size": 4}, SettingError, "size must be odd, blur in 0..1 and share above 0 up to 1; found 4, 0.3 and 1"),
        ({}, {"blur": -0.1}, SettingError, "found 3, -0.1 and 1"),
        ({}, {"share": 0.0}, SettingError, "found 3, 0.3 and 0"),
    ],
)
def test_bad_input_of_cuda(change, options, error, message):
    given = {"x": torch.rand(4, 1, 8, 8), "y": torch.arange(4), "ids": torch.arange(4), **change}
    with pytest.raises(error, match=message):
        cuda(Examples(**given), 0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1}, "p must be 2 to 9, eps above 0 up to 1, steps and width at least 1; found 1, 0.0627451, 100 and 16"),
        ({"p": 10}, "p must be 2 to 9"),
        ({"eps": 0.0}, "found 9, 0, 100 and 16"),
        ({"eps": 16.0}, "found 9, 16, 100 and 16"),
        ({"steps": 0}, "found 9, 0.0627451, 0 and 16"),
        ({"on": "paper"}, "on must be one of cluster, all, not 'paper'"),
    ],
)
def test_bad_settings_of_clusters(options, message):
    with pytest.raises(SettingError, match=message):
        clusters(images(9), flat_mlp(), digits().task, **{"p": 9, **options})


def test_bad_input_of_the_audit():
    w = digits()
    a, test = w.train.take(range(20)), w.test.take(range(20))
    ask = functools.partial(protection, flat_mlp, w.task, recipe=RECIPE)
    with pytest.raises(DataError, match="protected must hold the records of clean in the same order"):
        ask(a, a.take(range(19)), test)
    with pytest.raises(DataError, match="other labels or ids"):
        ask(a, replace(a, y=a.y.flip(0)), test)
    with pytest.raises(SplitError, match=r"20 record\(s\) of clean also stand in test \(a leak\)"):
        ask(a, a, a)
    with pytest.raises(SettingError, match="no counter-measure 'crops'; did you mean 'crop'"):
        ask(a, a, test, counters=["crops"])
    with pytest.raises(SettingError, match=r"runs and steps must be at least 1 and eps above 0; found 0, 10 and 0.0156863"):
        ask(a, a, test, runs=0)
    with pytest.raises(DataError, match=r"images must lie in 0..1"):
        ask(a, replace(a, x=a.x - 1), test)
