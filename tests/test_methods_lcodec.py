"""L-CODEC: the numbers of card lcodec, fast paths against slow loops, planted dependence found, and what the method moves."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from expunge.core.errors import ScopeError, SettingError
from expunge.core.patch import Patch
from expunge.core.registry import METHODS
from expunge.core.types import Scope, Split
from expunge.engine.run import unlearn
from expunge.methods.classifiers.lcodec import flat_places, noise_deviation, secant, solve
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.reading import score
from expunge.parts.scopes.codependence import codependence, dependence, layers, nearest, perturbed, ranks, scope_of, select
from expunge.parts.training import train

TASK = classification()


def points(n: int, seed: int, *more: int) -> Tensor:
    return torch.randn(n, *more, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# conditional dependence


def test_four_points():
    """Card lcodec: Y = Z = (1, 2, 3, 4), ties to the lower index: numerator -2, denominator 10."""
    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    r, most = ranks(y)
    near = r[nearest(y)]
    assert int((4 * torch.minimum(r, near) - most.square()).sum()) == -2 and int((most * (4 - most)).sum()) == 10
    assert float(dependence(y, y)) == pytest.approx(-0.2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_function_scores_one_and_noise_zero(seed):
    """Card lcodec: Y = Z^2 on 1,000 sorted points .9956; independent uniforms near 0 (.042 for one seed)."""
    z = points(1000, seed).sort().values
    assert float(dependence(z.square(), z)) == pytest.approx(0.9956, abs=5e-4)
    u = torch.rand(1000, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    assert abs(float(dependence(u[:, 0], u[:, 1]))) < 0.1


@given(values=st.lists(st.integers(-4, 4), min_size=2, max_size=12))
def test_nearest_on_a_line_equals_the_loop_with_ties(values):
    z = torch.tensor(values, dtype=torch.double)
    slow = [min((j for j in range(len(z)) if j != i), key=lambda j, i=i: (abs(float(z[i] - z[j])), j)) for i in range(len(z))]
    assert nearest(z).tolist() == slow
    assert nearest(torch.stack([z, z.flip(0)]))[0].tolist() == slow


@given(n=st.integers(2, 15), p=st.integers(1, 3), q=st.integers(0, 2), seed=st.integers(0, 99), coarse=st.booleans())
def test_dependence_equals_the_loop(n, p, q, seed, coarse):
    y, z, x = points(n, seed), points(n, seed + 100, p), points(n, seed + 200, q)
    if coarse:
        y, z, x = y.round(), z.round(), x.round()

    def near(space: Tensor, i: int) -> int:
        return min((j for j in range(n) if j != i), key=lambda j: (float((space[i] - space[j]).square().sum()), j))

    r = [int((y <= v).sum()) for v in y]
    most = [int((y >= v).sum()) for v in y]
    for k in range(p):
        if q == 0:
            top = sum(n * min(r[i], r[near(z[:, k : k + 1], i)]) - most[i] ** 2 for i in range(n))
            bottom = sum(v * (n - v) for v in most)
        else:
            both = torch.cat([x, z[:, k : k + 1]], 1)
            top = sum(min(r[i], r[near(both, i)]) - min(r[i], r[near(x, i)]) for i in range(n))
            bottom = sum(r[i] - min(r[i], r[near(x, i)]) for i in range(n))
        assert float(dependence(y, z, x if q else None)[k]) == pytest.approx(top / bottom if bottom else 0.0)


def test_dependence_refuses():
    for y, z in ((1, 1), (3, 4)):
        with pytest.raises(SettingError, match=f"at least two points, as many of each; found {y}, {z}"):
            dependence(points(y, 0), points(z, 0))
    assert float(dependence(torch.ones(5), points(5, 0))) == 0.0, "a constant depends on nothing"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_select_finds_what_was_planted(seed):
    """Y of columns 4 and 7 out of 10, one of them seen only given the other (their product of signs); constant columns are never chosen."""
    a = points(400, seed, 10)
    a[:, 2] = 3.0
    additive = 2 * a[:, 4] + a[:, 7]
    assert set(select(additive, a, most=2)) == {4, 7} and select(additive, a, most=2)[0] == 4
    product = a[:, 4].abs() + a[:, 4].sign() * a[:, 7].sign()
    chosen = select(product, a, most=2)
    assert set(chosen) == {4, 7}
    assert len(select(additive, a)) < 9, "stops when nothing more is told"
    assert select(additive, a[:, [2]]) == []
    assert select(additive, a * torch.logspace(-6, 6, 10, dtype=torch.double), most=2) == select(additive, a, most=2), "units do not matter"


def test_jitter_breaks_ties_by_the_generator():
    """Without jitter equal values take their neighbour by position; with it two seeds draw two neighbours."""
    y, a = points(60, 0), points(60, 1, 3).round()
    seen = []
    for seed in range(6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen.append(tuple(select(y, a, jitter=0.01)))
    assert len(set(seen)) > 1 and select(y, a) == select(y, a)


# slices


def twins() -> nn.Sequential:
    """Two linear layers of one printed form, and a convolution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 4)).double()


def data(n: int, seed: int) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, 1, 4, 4, generator=g), torch.randint(4, (n,), generator=g), torch.arange(n) + 1000 * seed)


def test_slices_are_keyed_by_place_not_by_printed_form():
    """Layers 3 and 5 print alike; each has its own 12 slices, whose values are those of a plain pass (no noise: every copy the same)."""
    model, batch = twins(), TASK.batches(data(5, 1), 5)[0]
    assert str(model[3]) == str(model[5])
    y, a, slices = perturbed(model, TASK, batch, copies=4, sigma=0.0)
    assert a.shape == (4, 3 + 12 + 12 + 4) and slices[3] == ("3", 0) and slices[15] == ("5", 0)
    x = batch["x"].double()
    first = model[0](x)
    second = model[3](first.relu().flatten(1))
    third = model[5](second.tanh())
    want = torch.cat([first.mean((0, 2, 3)), second.mean(0), third.mean(0), model[6](third).mean(0)])
    for row in a:
        torch.testing.assert_close(row, want.detach())
    torch.testing.assert_close(y, TASK.forward(model, batch).mean.mean().detach().expand(4))
    assert not any(m._forward_hooks for m in model.modules())


def test_perturbed_in_chunks_is_the_same(monkeypatch):
    model, batch = twins(), TASK.batches(data(2, 1), 2)[0]
    found = []
    for chunk in (512, 6):
        monkeypatch.setattr("expunge.parts.scopes.codependence.CHUNK", chunk)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found.append(perturbed(model, TASK, batch, copies=20))
    torch.testing.assert_close(found[0][1], found[1][1])
    assert float(found[0][1].std(0).min()) > 0


def test_scope_is_rows_and_biases():
    model = twins()
    scope = scope_of(model, [("3", 2), ("0", 1), ("3", 5)])
    assert {n: sorted(set(m.nonzero()[:, 0].tolist())) for n, m in scope.masks.items()} == {
        "3.weight": [2, 5],
        "3.bias": [2, 5],
        "0.weight": [1],
        "0.bias": [1],
    }
    assert scope.count(model) == 2 * 13 + 10
    with pytest.raises(ScopeError, match="no slice was selected"):
        scope_of(model, [])
    with pytest.raises(ScopeError, match="no trainable linear or convolution layer"):
        layers(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(SettingError, match="copies must be at least 3, not 2"):
        codependence(model, TASK, TASK.batches(data(1, 1), 1)[0], copies=2)


def test_dead_inputs_select_the_slices_that_the_loss_depends_on():
    """Only slice 0 of the hidden layer reaches the output: it or the outputs themselves are chosen, never the seven others."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, 0] = 3.0
    examples = Examples(points(1, 5, 6), torch.tensor([0]), torch.tensor([0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scope = codependence(model, TASK, TASK.batches(examples, 1)[0], copies=300, most=1)
    if "0.weight" in scope.masks:
        assert scope.masks["0.bias"].nonzero().flatten().tolist() == [0]
    else:
        assert scope.masks["1.bias"].nonzero().flatten().tolist() == [0]


# the Newton step


def test_step_of_the_card():
    """n = 101, H = .5, lambda = .01, g = .2, w = 1 -> 1.0039216; sigma for n = 50000, lambda .01, eps .1, delta .01: gamma 2e-4, 6.215e-3."""
    u, g = torch.tensor([[0.5]], dtype=torch.double).sqrt(), torch.tensor([0.2], dtype=torch.double)
    assert 1 + float(solve(u, g, 0.01)) / 100 == pytest.approx(1.0039216, abs=1e-7)
    assert noise_deviation(50_000, 0.01, 0.1, 0.01) == pytest.approx(6.215e-3, rel=1e-3)
    assert noise_deviation(50_000, 0.01, 2e-4, 1.25 / torch.e) == pytest.approx(2**0.5, rel=1e-6), "gamma is 2e-4"
    assert noise_deviation(50_000, 0.01, 0.1, 0.01, m=3) == pytest.approx(9 * noise_deviation(50_000, 0.01, 0.1, 0.01))


@given(r=st.integers(1, 5), k=st.integers(1, 6), lam=st.sampled_from([1e-3, 0.01, 1.0]), seed=st.integers(0, 99))
def test_solve_equals_the_dense_solve(r, k, lam, seed):
    u, g = points(r, seed, k), points(k, seed + 100)
    dense = torch.linalg.solve(u.T @ u + lam * torch.eye(k, dtype=torch.double), g)
    torch.testing.assert_close(solve(u, g, lam), dense, rtol=1e-6, atol=1e-7)
    if r == 1:
        v = u[0]
        torch.testing.assert_close(dense, (g - v * (v @ g) / (lam + v @ v)) / lam, rtol=1e-6, atol=1e-7)


def test_secant_of_a_step():
    first, second, step = points(4, 0), points(4, 1), points(4, 2)
    u = secant(first, second, step)
    h = (first - second)[:, None] * (first - second) / step.abs().sum()
    torch.testing.assert_close(u.T @ u, h)
    assert not bool(secant(first, first, torch.zeros(4)).any())


# the method


def world() -> tuple[nn.Module, Split]:
    retain = data(60, 2)
    return twins(), Split(data(4, 1), retain, data(10, 3), data(20, 4))


def difference(model: nn.Module, patch: Patch) -> Tensor:
    """(P,) what the patch adds, flattened in the model's order."""
    twin = copy.deepcopy(model)
    patch.apply(twin)
    return torch.cat([(b - a).detach().flatten() for a, b in zip(model.parameters(), twin.parameters(), strict=True)])


def gradient(model: nn.Module, examples: Examples) -> Tensor:
    batch = TASK.batches(examples, len(examples))[0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(TASK.forward(model, batch).mean.mean(), list(model.parameters()))])


def place_of(model: nn.Module, examples: Examples, seed: int, **settings: float) -> Scope:
    """The scope of the run's first removal: same batch, same generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return codependence(model, TASK, TASK.batches(examples, len(examples), seed=seed)[0], **settings)


@pytest.mark.parametrize("m", [1, 4])
def test_patch_is_the_newton_step_on_the_selected_slices(m):
    """sekhari: m / (n - m) (H_c + lam I)^-1 g with H_c the mean outer product on retain; everything else is bit-identical."""
    model, split = world()
    split = Split(split.forget.take(range(m)), split.retain, split.test, split.validation)
    patch = METHODS["lcodec"](model, TASK, split, batch_size=m, lam=0.2, copies=40, slices=3, rank=60, seed=9)
    at = flat_places(place_of(model, split.forget, 9, copies=40, most=3), dict(model.named_parameters()))
    grads = torch.stack([gradient(model, split.retain.take([i])) for i in range(60)])[:, at]
    dense = torch.linalg.solve(grads.T @ grads / 60 + 0.2 * torch.eye(len(at), dtype=torch.double), gradient(model, split.forget)[at])
    moved = difference(model, patch)
    torch.testing.assert_close(moved[at], m / 60 * dense, rtol=1e-6, atol=1e-10)
    rest = torch.ones(len(moved), dtype=torch.bool)
    rest[at] = False
    assert not bool(moved[rest].any()) and patch.meta["skipped"] == 0


def test_cr_and_bp_by_hand():
    model, split = world()
    split = Split(split.forget.take([0]), split.retain, split.test, split.validation)
    settings = {"copies": 40, "slices": 3, "seed": 9, "drop": 1.0}
    at = flat_places(place_of(model, split.forget, 9, copies=40, most=3), dict(model.named_parameters()))
    g = gradient(model, split.forget)[at]
    cr = difference(model, METHODS["lcodec"](model, TASK, split, update="cr", lam=0.3, **settings))[at]
    torch.testing.assert_close(cr, g / (0.3 + g @ g), rtol=1e-6, atol=1e-10)
    bp = difference(model, METHODS["lcodec"](model, TASK, split, update="bp", lr=0.5, **settings))[at]
    torch.testing.assert_close(bp, 0.5 * g, rtol=1e-6, atol=1e-10)


def test_finite_differences_see_curvature():
    """Where the published code has H_sample = 0, so that the step is g / lam, here the second gradient is taken after the step."""
    model, split = world()
    split = Split(split.forget.take([0]), split.retain, split.test, split.validation)
    settings = {"copies": 40, "slices": 3, "seed": 9, "drop": 1.0, "lam": 1e-5, "hessian": "fd"}
    at = flat_places(place_of(model, split.forget, 9, copies=40, most=3), dict(model.named_parameters()))
    g = gradient(model, split.forget)[at]
    step = difference(model, METHODS["lcodec"](model, TASK, split, update="cr", **settings))[at]
    flat = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(model.parameters())
        vector[at] -= 1e-3 * g
        nn.utils.vector_to_parameters(vector, model.parameters())
    second = gradient(model, split.forget)[at]
    with torch.no_grad():
        for p, value in zip(model.parameters(), flat, strict=True):
            p.copy_(value)
    u = secant(g, second, 1e-3 * g)
    dense = torch.linalg.solve(u.T @ u + 1e-5 * torch.eye(len(at), dtype=torch.double), g)
    torch.testing.assert_close(step, dense, rtol=1e-4, atol=1e-6)
    assert float((step - g / 1e-5).norm() / (g / 1e-5).norm()) > 1e-3, "H_sample is not 0"
    old = METHODS["lcodec"](model, TASK, split, **{**settings, "lam": 0.1})
    assert old.edits and old.digest != METHODS["lcodec"](model, TASK, split, **{**settings, "lam": 0.1, "hessian": "fisher"}).digest


def test_noise_has_the_published_deviation():
    """The same run with and without noise differs, on the selected slices, by N(0, sigma^2)."""
    model, split = world()
    split = Split(split.forget.take([0]), split.retain, split.test, split.validation)
    settings = {"copies": 40, "slices": 12, "seed": 2, "lam": 1.0, "drop": 1.0}
    plain, noisy = (difference(model, METHODS["lcodec"](model, TASK, split, epsilon=e, **settings)) for e in (0.0, 0.1))
    noise = (noisy - plain)[plain != 0]
    assert len(noise) > 30
    assert float(noise.std()) == pytest.approx(noise_deviation(61, 1.0, 0.1, 0.01), rel=0.35)


@functools.lru_cache
def memorised() -> tuple[nn.Module, Split]:
    """A small CNN that knows by heart 300 records of 4 noisy classes, 12 of them with a wrong label: these must go."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 1, 8, 8, generator=g)
    y = torch.randint(4, (700,), generator=g)
    x = centres[y] + 1.2 * torch.randn(700, 1, 8, 8, generator=g)
    labels = y.clone()
    labels[:12] = (y[:12] + 1) % 4
    every = Examples(x, labels, torch.arange(700))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nets.small_cnn(8, 4, 6)
        train(model, TASK, every.take(range(300)), epochs=40, batch_size=30, seed=0, lr=0.005, optimizer="adam", schedule="onecycle")
    return model.eval(), Split(every.take(range(12)), every.take(range(12, 300)), every.take(range(500, 700)), every.take(range(300, 500)))


def right(model: nn.Module, part: Examples) -> float:
    return float(score(model, TASK, part).correct.float().mean())


def test_takes_wrong_labels_out_and_keeps_the_rest():
    """The default step, 12 removals of one record; means over three seeds. Some removals are undone, and the patch says how many."""
    model, split = memorised()
    parts = ("forget", "retain", "test")
    before = torch.tensor([right(model, getattr(split, part)) for part in parts])
    assert before[0] > 0.9
    found = []
    for seed in range(3):
        attempt = unlearn("lcodec", model, TASK, split, copies=100, seed=seed)
        skipped = attempt.patch.meta["skipped"]
        assert attempt.outcome == ("partial" if skipped else "ok") and skipped < 12, attempt.reason
        assert attempt.meter.seen["forget"] == 12 and "test" not in attempt.meter.seen
        twin = copy.deepcopy(model)
        attempt.patch.apply(twin)
        found.append([right(twin, getattr(split, part)) for part in parts])
    fall = (before - torch.tensor(found).mean(0)).tolist()
    assert fall[0] > 0.35 and fall[1] < 0.08 and fall[2] < 0.08


def test_removals_that_cost_too_much_are_undone():
    """Huge steps: each is undone and the run says so; with drop=1 they stay. One removal of several may be undone alone."""
    model, split = memorised()
    settings = {"update": "bp", "lr": 1e4, "copies": 30, "slices": 4, "batch_size": 4}
    attempt = unlearn("lcodec", model, TASK, split, **settings)
    assert attempt.outcome == "diverged" and "each removal costs more than drop=0.05" in attempt.reason and attempt.patch is None
    allowed = unlearn("lcodec", model, TASK, split, drop=1.0, **settings)
    assert allowed.outcome == "harmed" and "% is left" in allowed.reason and allowed.patch.meta["skipped"] == 0
    some = unlearn("lcodec", model, TASK, split, **{**settings, "update": "cr", "lam": 0.02, "batch_size": 1, "drop": 0.01})
    assert some.outcome == "partial" and 0 < (skipped := some.patch.meta["skipped"]) < 12
    assert some.reason.startswith(f"worked on {12 - skipped} of 12 forget records: the other {skipped} cost more than drop=0.01 of the accuracy")


def test_refusals():
    model, split = world()
    for bad, says in (
        ({"update": "newton"}, "update must be one of sekhari, cr, bp, not 'newton'"),
        ({"hessian": "full"}, "hessian must be one of fisher, fd, not 'full'"),
        ({"lam": 0.0}, "lam must be above 0, not 0"),
        ({"epsilon": -1.0}, "epsilon must be 0 or larger, not -1"),
    ):
        with pytest.raises(SettingError, match=says):
            METHODS["lcodec"](model, TASK, split, **bad)
