"""One-shot and sparse methods: the numbers of cards l1-sparse, corrective (SSD) and slug, fast paths against slow loops, cost against the meter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from worlds import accuracy, copied, digits, same, small, state

from expunge.core import guard
from expunge.core.errors import ScopeError, SettingError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import Split, absent
from expunge.methods.classifiers.influence import pull
from expunge.methods.classifiers.prune_unlearn import ROUNDS, lowest, prunable, synflow
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.losses.sparse import decaying, l1, shrink
from expunge.parts.scopes.pareto import front, layer_points, matrices
from expunge.parts.updates.gradients import fisher, rows, squares
from expunge.parts.updates.newton import published, woodbury
from expunge.parts.updates.oneshot import dampening, first_step, noise_variance, search, step_along

# gradients


def one_by_one(model: nn.Module, data: Examples) -> list[dict[str, torch.Tensor]]:
    """The gradient of every example's cross-entropy, by one backward pass each."""
    found = []
    for i in range(len(data)):
        loss = F.cross_entropy(model(data.x[i : i + 1].to(next(model.parameters()).dtype)), data.y[i : i + 1])
        found.append(dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)))
    return found


def doubled() -> tuple[nn.Module, Split]:
    model, _, split = small("classification")
    return model.double(), split


def test_squares_equal_the_loop_and_are_counted():
    """70 examples, more than a chunk of 64: two chunks of 35."""
    model, split = doubled()
    data = split.retain.take(torch.arange(70) % 64)
    slow = one_by_one(model, data)
    before = state(model)
    with guard.watching(Guard()) as g:
        sums, count = squares(model, classification(), data)
    assert count == 70 and (g.meter.forward, g.meter.backward) == (70, 70)
    assert same(before, state(model))
    for name, total in sums.items():
        torch.testing.assert_close(total, sum(s[name].square() for s in slow))
    means = fisher(model, classification(), data)
    torch.testing.assert_close(means["8.weight"], sums["8.weight"] / 70)


def test_published_squares_depend_on_the_batch_size():
    model, split = doubled()
    data = split.retain.take(range(12))
    slow = one_by_one(model, data)
    task = classification()
    by_four, count = squares(model, task, data, per_sample=False, batch_size=4)
    whole, one = squares(model, task, data, per_sample=False, batch_size=12)
    assert (count, one) == (3, 1)
    for name in by_four:
        parts = [torch.stack([s[name] for s in slow[k : k + 4]]).mean(0).square() for k in (0, 4, 8)]
        torch.testing.assert_close(by_four[name], sum(parts))
        torch.testing.assert_close(whole[name], torch.stack([s[name] for s in slow]).mean(0).square())
    single, _ = squares(model, task, data, per_sample=False, batch_size=1)
    torch.testing.assert_close(single["8.weight"], squares(model, task, data)[0]["8.weight"])
    assert not torch.allclose(by_four["8.weight"] / 3, whole["8.weight"])


def test_rows_equal_the_loop_and_half_precision_is_summed_in_float32():
    model, split = doubled()
    data = split.retain.take(range(5))
    slow = torch.stack([torch.cat([g.flatten() for g in s.values()]) for s in one_by_one(model, data)])
    torch.testing.assert_close(rows(model, classification(), data), slow)
    half = model.to(torch.bfloat16)
    sums, _ = squares(half, classification(), data)
    assert {t.dtype for t in sums.values()} == {torch.float32}


# l1-sparse


def test_l1_schedule_of_ten_epochs():
    """Card l1-sparse, case 1."""
    assert [decaying(2.0, e, 10) for e in range(10)] == pytest.approx([2 * (1 - e / 10) for e in range(10)])
    assert [decaying(1.0, e, 4, 2) for e in range(4)] == [1.0, 0.5, 0.0, 0.0]
    assert decaying(1.0, 0, 2, 2) == 0.0


def test_l1_penalty_and_gradient():
    """Card l1-sparse, case 2: theta = (.5, -2), gamma = .1: penalty .25, gradient (.1, -.1)."""
    theta = torch.tensor([0.5, -2.0], requires_grad=True)
    penalty = 0.1 * l1([theta])
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(0.25)
    torch.testing.assert_close(theta.grad, torch.tensor([0.1, -0.1]))


@given(values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), by=st.floats(0, 2, width=32))
def test_shrink_is_the_proximal_step(values, by):
    """min_x (x - theta)^2 / 2 + by |x|: no point of a fine grid is lower, and small weights are zero, not -0."""
    theta = torch.tensor(values)
    x = theta.clone()
    shrink([x], by)
    grid = torch.linspace(-4, 4, 801)
    reached = (x - theta) ** 2 / 2 + by * x.abs()
    lowest_ = ((grid[:, None] - theta) ** 2 / 2 + by * grid[:, None].abs()).min(0).values
    assert bool((reached <= lowest_ + 1e-5).all())
    zero = theta.abs() <= by
    assert bool((x[zero] == 0).all()) and not bool(torch.signbit(x[zero]).any())


def test_proximal_leaves_true_zeros_and_the_subgradient_none():
    model, task, split = small("classification")
    zeros = {}
    for proximal in (True, False):
        twin = copied(model)
        METHODS["l1_sparse"](model, task, split, proximal=proximal, alpha=0.05, epochs=3.0, lr=0.1, batch_size=16).apply(twin)
        zeros[proximal] = int((twin[0].weight == 0).sum() + (twin[6].weight == 0).sum())
    assert zeros[True] > 100 and zeros[False] == 0


# pruning


def test_pruned_places_stay_zero_bitwise():
    model, task, split = small("classification")
    for settings in ({"pruner": "omp"}, {"pruner": "synflow"}, {"linear": False}, {"unlearner": "ascent", "momentum": 0.9, "weight_decay": 0.1}):
        twin = copied(model)
        METHODS["prune_unlearn"](model, task, split, rate=0.7, epochs=2.0, batch_size=16, **settings).apply(twin)
        weights = prunable(twin, settings.get("linear", True))
        flat = torch.cat([w.detach().flatten() for w in weights.values()])
        dead = flat == 0
        assert int(dead.sum()) == int(0.7 * len(flat)) and not bool(torch.signbit(flat[dead]).any())
        assert not bool((twin[8].weight == 0).any()), "the last layer is never pruned"
        if settings == {"pruner": "omp"}:
            before = torch.cat([w.detach().abs().flatten() for w in prunable(model).values()])
            assert float(before[dead].max()) <= float(before[~dead].min())


def test_ascent_after_pruning_forgets_more_than_fine_tuning():
    model, task, split = digits("class")
    left = {}
    for unlearner in ("fine_tune", "ascent"):
        twin = copied(model)
        METHODS["prune_unlearn"](model, task, split, rate=0.5, epochs=1.0, lr=0.01, ascent_epochs=4.0, ascent_lr=0.02, unlearner=unlearner).apply(twin)
        left[unlearner] = accuracy(twin, split.forget)
    assert left["ascent"] < left["fine_tune"] - 0.2


def test_synflow_scores_and_order_by_hand():
    """f(x) = w3 (w1 x1 + w2 x2), all ones: |w dR/dw| of the first layer is |w1 w3|, |w2 w3|; the smaller |w| goes, whatever its sign."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 2.0]]))
        model[1].weight.fill_(-5.0)
    before = state(model)
    with guard.watching(Guard()) as g:
        gone = synflow(model, torch.Size([2]), 0.5)
    assert gone["0.weight"].tolist() == [[False, True]] and list(gone) == ["0.weight"]
    assert same(before, state(model)) and (g.meter.forward, g.meter.backward) == (ROUNDS, ROUNDS)


def test_synflow_keeps_a_layer_that_magnitude_kills():
    """A layer of small weights: global magnitude prunes all of it; the synaptic flow through it grows as it thins out, so some stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    magnitude = lowest({n: w.detach().abs() for n, w in prunable(model).items()}, 0.9)
    flow = synflow(model, torch.Size([8]), 0.9)
    assert bool(magnitude["1.weight"].all()) and not bool(flow["1.weight"].all()) and not bool(flow["0.weight"].all())
    assert sum(int(m.sum()) for m in flow.values()) == int(0.9 * 512)


def test_pruning_needs_something_to_prune():
    with pytest.raises(ScopeError, match="no trainable convolution; set linear=true"):
        prunable(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), linear=False)
    with pytest.raises(ScopeError, match="no trainable convolution or hidden linear layer"):
        prunable(nn.Linear(2, 2))


# Fisher forgetting


def test_noise_of_a_vector():
    """Card l1-sparse, case 4: F = .01, alpha = 1e-8, 1-D: sqrt(1e-8 * 100 * 10) = 3.162e-3."""
    assert float(noise_variance(torch.tensor([0.01]), 1e-8, head=False).sqrt()) == pytest.approx(math.sqrt(1e-5), rel=1e-4)
    assert float(noise_variance(torch.zeros(1), 1e-8, head=False)) == pytest.approx(1e-8 * 1e3 * 10)
    assert float(noise_variance(torch.zeros(1), 1e-8, head=True)) == pytest.approx(1e-8 * 1e2 * 10)
    kernel = noise_variance(torch.tensor([[0.1, 0.01], [1.0, 1.0]]), 1.0, head=False)
    torch.testing.assert_close(kernel, torch.tensor([[55.0, 55.0], [1.0, 1.0]]), rtol=1e-4, atol=0)


def test_fisher_forgetting_adds_the_runs_own_noise():
    """The patch equals theta + sqrt(variance) * N(0, 1) drawn from the run's seed in the order of the parameters."""
    model, task, split = small("classification")
    split = replace(split, forget=split.retain.take(range(8)), retain=split.retain.take(range(8, 64)))
    split = replace(split, forget=split.forget.take((torch.isin(split.forget.y, split.retain.y)).nonzero().squeeze(1)))
    twin = copied(model)
    METHODS["fisher_forgetting"](model, task, split, alpha=1e-6, seed=4).apply(twin)
    importance = fisher(model, task, split.retain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for name, p in model.named_parameters():
            noise = noise_variance(importance[name], 1e-6, head=name.startswith("8.")).sqrt() * torch.randn(p.shape)
            torch.testing.assert_close(dict(twin.named_parameters())[name].detach(), p.detach() + noise, rtol=1e-4, atol=1e-6)


def test_fisher_forgetting_redraws_the_row_of_a_removed_class():
    """Mean 0, variance 1e-4: the row's 64 values stay within 5 standard deviations, and it predicts the class no more."""
    model, task, split = digits("class")
    twin = copied(model)
    METHODS["fisher_forgetting"](model, task, split, alpha=1e-10).apply(twin)
    head = [m for m in twin if isinstance(m, nn.Linear)][-1]
    row = head.weight[3].detach()
    assert float(row.abs().max()) < 0.05 and float(row.std()) == pytest.approx(0.01, rel=0.4)
    assert accuracy(twin, split.forget) < 0.05 and accuracy(twin, split.retain) > 0.97


# influence


def recursion(grads: torch.Tensor, v: torch.Tensor, damp: float, n: int) -> torch.Tensor:
    """damp F^{-1} v by Sherman-Morrison with every u stored: u_i = F_{i-1}^{-1} g_i, F_0 = damp I."""
    stored: list[tuple[torch.Tensor, float]] = []

    def solve(x: torch.Tensor) -> torch.Tensor:
        out = x / damp
        for u, scale in stored:
            out = out - (u @ x) / scale * u
        return out

    for g in grads:
        u = solve(g)
        stored.append((u, n + float(g @ u)))
    return damp * solve(v)


@given(n=st.integers(1, 6), p=st.integers(1, 7), damp=st.sampled_from([1e-3, 0.1, 1.0, 50.0]), seed=st.integers(0, 99), wide=st.integers(0, 1000))
def test_woodbury_equals_the_recursion_and_the_dense_solve(n, p, damp, seed, wide):
    g = torch.Generator().manual_seed(seed)
    grads, v = torch.randn(n, p, generator=g, dtype=torch.double), torch.randn(p, generator=g, dtype=torch.double)
    number = wide or n
    fast = woodbury(grads, v, damp, wide)
    dense = damp * torch.linalg.solve(damp * torch.eye(p, dtype=torch.double) + grads.T @ grads / number, v)
    torch.testing.assert_close(fast, dense, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fast, recursion(grads, v, damp, number), rtol=1e-6, atol=1e-8)


def test_woodbury_in_slices_of_columns(monkeypatch):
    g = torch.Generator().manual_seed(0)
    grads, v = torch.randn(5, 11, generator=g, dtype=torch.double), torch.randn(11, generator=g, dtype=torch.double)
    whole = woodbury(grads, v, 0.1)
    monkeypatch.setattr("expunge.parts.updates.newton.COLUMNS", 3)
    torch.testing.assert_close(woodbury(grads, v, 0.1), whole)


def test_published_recursion_of_two_ones():
    """Card l1-sparse, case 3: g = 1 twice, v = 1, N = 1000: k = 1 - 1 / 1001."""
    assert float(published(torch.ones(2, 1, dtype=torch.double), torch.ones(1, dtype=torch.double))) == pytest.approx(1 - 1 / 1001, abs=1e-12)


@given(seed=st.integers(0, 999))
def test_right_step_is_not_parallel_to_the_first_gradient(seed):
    """Card l1-sparse, case 5, in R^4: published k - v is parallel to g_1 (cosine 1); the right one is not. Identical gradients: both agree."""
    g = torch.Generator().manual_seed(seed)
    grads, v = torch.randn(6, 4, generator=g, dtype=torch.double), torch.randn(4, generator=g, dtype=torch.double)

    def cosine(k: torch.Tensor) -> float:
        return abs(float(F.cosine_similarity(k - v, grads[0], dim=0)))

    assert cosine(published(grads, v)) == pytest.approx(1, abs=1e-6)
    assert cosine(woodbury(grads[1:], v, 1.0, 1000)) < 1 - 1e-6
    alike = grads[:1].expand(6, 4)
    torch.testing.assert_close(published(alike, v), woodbury(alike[1:], v, 1.0, 1000))


def test_influence_patch_is_the_step():
    model, task, split = small("classification")
    model = model.double()
    twin = copied(model)
    METHODS["influence"](model, task, split, scale=2.0, damp=0.3, rank=64).apply(twin)

    def stacked(data: Examples) -> torch.Tensor:
        return torch.stack([torch.cat([g.flatten() for g in s.values()]) for s in one_by_one(model, data)])

    forget, retain = stacked(split.forget), stacked(split.retain)
    v = pull(forget.sum(0), retain.sum(0), 16, 64)
    torch.testing.assert_close(v, (forget.sum(0) - 16 / 64 * retain.sum(0)) / 80)
    k = 0.3 * torch.linalg.solve(0.3 * torch.eye(len(v), dtype=torch.double) + retain.T @ retain / 64, v)
    moved = torch.cat([(b - a).detach().flatten() for a, b in zip(model.parameters(), twin.parameters(), strict=True)])
    torch.testing.assert_close(moved, 2 * k, rtol=1e-6, atol=1e-9)


def test_step_along_splits_in_order():
    a, b = torch.zeros(2, 2), torch.ones(3)
    step_along([a, b], torch.arange(7.0), 2.0)
    assert a.tolist() == [[0, 2], [4, 6]] and b.tolist() == [9, 11, 13]


# SSD


@pytest.mark.parametrize(("alpha", "lam", "expected"), [(10, 1, [1, 0.05, 0.01]), (10, 50, [1, 1, 0.5]), (30, 1, [1, 1, 0.01])])
def test_dampening_numbers(alpha, lam, expected):
    """Card corrective: I_D = (1, 1, 1), I_f = (5, 20, 100)."""
    factors = dampening(torch.ones(3), torch.tensor([5.0, 20.0, 100.0]), alpha=alpha, lam=lam)
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float32))


def test_dampening_of_nothing():
    """0 / 0 is not selected; I_f > 0 = I_D is weighed to zero; the exponent applies to the factor."""
    assert dampening(torch.zeros(2), torch.tensor([0.0, 1e-30]), alpha=10, lam=1).tolist() == [1.0, 0.0]
    assert float(dampening(torch.ones(1), torch.tensor([4.0]), alpha=1, lam=1, exponent=2)) == pytest.approx(1 / 16)


@given(seed=st.integers(0, 99), small_=st.floats(0.1, 5), more=st.floats(0, 5))
def test_smaller_alpha_selects_more(seed, small_, more):
    g = torch.Generator().manual_seed(seed)
    there, here = torch.rand(50, generator=g), 5 * torch.rand(50, generator=g)
    few, many = (dampening(there, here, alpha=a, lam=0.05) < 1 for a in (small_ + more, small_))
    assert bool((many | ~few).all())


def test_ssd_patch_is_the_dampening_of_the_loops_importances():
    model, task, split = small("classification")
    model = model.double()
    twin = copied(model)
    METHODS["ssd"](model, task, split, alpha=1.5, lam=0.8).apply(twin)
    forget, both = (one_by_one(model, d) for d in (split.forget, split.retain))
    both = both + forget
    for name, p in model.named_parameters():
        here, there = (sum(s[name].square() for s in each) / len(each) for each in (forget, both))
        factor = torch.tensor([min(0.8 * d / f, 1) if f > 1.5 * d else 1.0 for f, d in zip(here.flatten().tolist(), there.flatten().tolist(), strict=True)])
        torch.testing.assert_close(dict(twin.named_parameters())[name].detach(), p.detach() * factor.double().view_as(p), rtol=1e-6, atol=1e-9)


# SLUG


def test_front_of_the_card():
    """Card slug: A(.10, 5), B(.05, 1), C(.20, 6), D(.15, 4): D loses to A."""
    assert set(front({"A": (0.10, 5), "B": (0.05, 1), "C": (0.20, 6), "D": (0.15, 4)})) == {"A", "B", "C"}


@given(points=st.dictionaries(st.integers(0, 30), st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_front_holds_what_nothing_beats(points):
    kept = front(points)
    assert kept
    for name, (a, r) in points.items():
        beaten = any(a2 < a and r2 > r for a2, r2 in points.values())
        assert (name in kept) != beaten


def test_points_of_layers():
    """theta = (3, 4), g_f = (0, 2): r = 2 / 5 and the first step is 2.5 / 10; cos((0, 2), (1, -1)) = -1 / sqrt 2; a dead layer has no point."""
    weights = {"w": torch.tensor([[3.0, 4.0]]), "dead": torch.ones(1, 2)}
    gradients = {"w": torch.tensor([[0.0, 2.0]]), "dead": torch.zeros(1, 2)}
    points = layer_points(weights, gradients, {"w": torch.tensor([[1.0, -1.0]]), "dead": torch.ones(1, 2)})
    assert list(points) == ["w"] and points["w"] == pytest.approx((math.sqrt(0.5), 0.4))
    assert first_step(weights["w"], gradients["w"]) == pytest.approx(0.25)
    model = nn.ModuleDict({"e": nn.Embedding(3, 2), "l": nn.Linear(2, 2), "c": nn.Conv1d(1, 1, 2)})
    assert list(matrices(model)) == ["l.weight", "c.weight"]


@given(limit=st.floats(0.05, 40), ceiling=st.floats(0.05, 80), evaluations=st.integers(1, 14))
def test_search_finds_the_smallest_step_that_forgets(limit, ceiling, evaluations):
    tried = []

    def judge(s: float) -> tuple[bool, bool]:
        tried.append(s)
        return s >= limit, s > ceiling

    found = search(1.0, judge, evaluations=evaluations)
    assert len(tried) == evaluations and (found == 0 or found in tried)
    assert found <= ceiling, "a step that harms is never returned"
    reached = [s for s in tried if limit <= s <= ceiling]
    if reached:
        assert found == min(reached)
    elif found:
        assert found == max(s for s in tried if s <= ceiling)
    if limit * 1.1 < ceiling and evaluations == 14 and limit > 0.2:
        assert limit <= found <= 1.1 * limit


def test_slug_moves_one_layer_up_its_forget_gradient():
    model, task, split = digits("class")
    patch = METHODS["slug"](model, task, split, drop=0.1)
    (edit,) = patch.edits
    twin = copied(model)
    patch.apply(twin)
    weight = dict(model.named_parameters())[edit.name]
    (up,) = torch.autograd.grad(F.cross_entropy(model(split.forget.x), split.forget.y), [weight])
    moved = dict(twin.named_parameters())[edit.name].detach() - weight.detach()
    assert float(F.cosine_similarity(moved.flatten(), up.flatten(), dim=0)) > 0.99
    assert accuracy(twin, split.forget) == 0.0
    kept = ~torch.isin(split.validation.y, absent(split.forget.y, split.retain.y))
    rows_ = split.validation.take(kept.nonzero().squeeze(1))
    assert accuracy(twin, rows_) >= accuracy(model, rows_) - 0.1


def test_slug_never_reads_test_and_stops_at_the_drop():
    model, task, split = digits("random")
    for part in (split, replace(split, validation=None)):
        with guard.watching(Guard()) as g:
            patch = METHODS["slug"](model, task, part, drop=0.02)
        assert "test" not in g.meter.seen and ("validation" in g.meter.seen) == (part.validation is not None)
        twin = copied(model)
        patch.apply(twin)
        probe = split.retain if part.validation is None else split.validation
        assert accuracy(twin, probe) >= accuracy(model, probe) - 0.02
        assert accuracy(twin, split.forget) < 1.0


def test_removed_classes():
    assert absent(torch.tensor([5, 3, 1]), torch.tensor([1, 2])).tolist() == [3, 5]
    assert absent(torch.tensor([1]), torch.tensor([1])).tolist() == []


# all


COSTS = [
    ("l1_sparse", {"epochs": 2.0}), ("l1_sparse", {"epochs": 1.0, "proximal": True}), ("prune_unlearn", {"epochs": 1.0}),
    ("prune_unlearn", {"epochs": 1.0, "pruner": "synflow"}), ("prune_unlearn", {"epochs": 1.0, "unlearner": "ascent", "ascent_epochs": 2.0}),
    ("fisher_forgetting", {}), ("fisher_forgetting", {"per_sample": False}), ("influence", {}), ("influence", {"form": "published", "rank": 20}),
    ("ssd", {}), ("ssd", {"per_sample": False}), ("slug", {"layers": 1}), ("slug", {"layers": 1, "evaluations": 3, "sample": 100}),
]  # fmt: skip


@pytest.mark.parametrize("without", ["nothing", "validation"])
@pytest.mark.parametrize(("name", "settings"), COSTS)
def test_cost_is_what_the_meter_counts_and_seeds_repeat(name, settings, without):
    model, task, split = digits("class")
    split = replace(split, validation=None) if without == "validation" else split
    before = state(model)
    with guard.watching(Guard()) as g:
        patch = METHODS[name](model, task, split, seed=2, **settings)
    assert METHODS[name].expected(split, METHODS[name].settings(settings)) == (g.meter.forward, g.meter.backward)
    assert METHODS[name](model, task, split, seed=2, **settings).digest == patch.digest and patch.edits
    assert same(before, state(model))


@pytest.mark.parametrize("name", ["l1_sparse", "prune_unlearn", "fisher_forgetting", "influence", "ssd", "slug"])
def test_toy_settings_forget_the_class(name):
    """Forget accuracy falls by half or more, and by more than that of retain."""
    model, task, split = digits("class")
    twin = copied(model)
    METHODS[name](model, task, split, **METHODS[name].toy).apply(twin)
    assert accuracy(twin, split.forget) < 0.5 and accuracy(twin, split.retain) > accuracy(twin, split.forget) + 0.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("prune_unlearn", {"pruner": "imp"}, "pruner must be one of omp, synflow, not 'imp'"),
        ("prune_unlearn", {"unlearner": "x"}, "unlearner must be one of fine_tune, ascent, not 'x'"),
        ("prune_unlearn", {"rate": 1.0}, r"rate must be in \[0, 1\), not 1.0"),
        ("l1_sparse", {"alpha": -1.0}, "alpha and no_l1_epochs must be 0 or larger"),
        ("influence", {"form": "x"}, "form must be one of woodbury, published, not 'x'"),
        ("influence", {"damp": 0.0}, "damp must be above 0 and rank at least 1"),
        ("ssd", {"lam": -1.0}, "alpha and lam must be 0 or larger"),
        ("slug", {"evaluations": 0}, "evaluations, layers and sample must be at least 1"),
    ],
)
def test_bad_settings(name, settings, message):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match=message):
        METHODS[name](model, task, split, **settings)
