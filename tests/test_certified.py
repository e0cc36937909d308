"""Certified deletion: the bounds against exact divergences, another accountant and attacks; the conditions; the head, its requests and its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.datasets import load_digits
from torch import Tensor, nn

from expunge.audits.membership.epsilon import lower_bound
from expunge.core import guard
from expunge.core.errors import DataError, ExpungeError, ModelError, SettingError, SplitError
from expunge.guarantees.certified import files, renyi
from expunge.guarantees.certified.certificate import Phase, Settings, certify
from expunge.guarantees.certified.head import Head, fit, load, load_release, predict
from expunge.parts.updates import noisy

ETA, LAM, SIGMA = 0.1, 0.5, 0.2
"""The 1-D quadratic of the card: sigma^2 = 0.04."""


def test_quadratic_numbers_of_the_card():
    c, variance = 1 - ETA * LAM, SIGMA**2 / (LAM * (1 - ETA * LAM / 2))
    assert 2 * ETA * SIGMA**2 / (1 - c**2) == pytest.approx(variance) == pytest.approx(0.0820513, abs=1e-7)
    exact = [4 * (0.3 * c**K) ** 2 / (2 * variance) for K in (0, 10, 50)]
    assert exact == pytest.approx([2.19375, 0.786428, 0.012988], rel=1e-4)


@pytest.mark.parametrize("eta", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("lam", [0.05, 0.5, 1.5])
def test_the_bounds_are_never_below_the_exact_divergence_of_a_quadratic(eta, lam):
    """theta <- (1 - eta lam) theta - eta g + noise with g = M in one world and -M in the other (all n records changed): Gaussians, known at every step.

    The public start gives the paper's bounds, the fixed start those of the shifted one, which is then exact.
    """
    c, s2, M = 1 - eta * lam, 2 * eta * 0.2**2, 0.3
    for learn in (1, 7, 60, 1000):
        drift = 2 * eta * M * (1 - c**learn) / (1 - c)
        for K in (0, 1, 10, 50, 200):
            apart, fixed = drift * c**K, s2 * (1 - c ** (2 * (learn + K))) / (1 - c**2)
            stationary = s2 / (1 - c**2)
            mu = renyi.shifted([(learn, 2 * eta * M), (K, 0.0)] if K else [(learn, 2 * eta * M)], eta, lam, 0.2)
            assert mu**2 == pytest.approx(apart**2 / fixed, rel=1e-9)
            for q in (1.1, 2, 4, 30, 1000):
                exact = q * apart**2 / (2 * stationary)
                assert exact <= q * mu**2 / 2 * (1 + 1e-9)
                assert q * mu**2 / 2 <= renyi.decay(renyi.eps0(q, M, lam, 0.2, 1), q, K, eta, lam) * (1 + 1e-9)


def test_shifted_implies_the_weak_triangle_inequality_on_a_grid():
    """Requests one after another: the sum over the whole history is below the paper's route, and below composition, wherever both are asked."""
    M, lam, sigma, n = 1.0, 0.05, 0.1, 200
    for eta in (0.1, 1.0):
        for K in (1, 5, 40):
            for requests in (1, 2, 4):
                sizes = [n - k for k in range(requests + 1)]
                phases = [(500 if k == 0 else K, 2 * eta * M * (m - sizes[-1]) / m) for k, m in enumerate(sizes)]
                mu = renyi.shifted(phases, eta, lam, sigma)
                assert mu <= renyi.composition(phases, eta, sigma)
                for q in (1.5, 4, 20):
                    paper = renyi.sequential(q, lambda q, n=sizes[-2]: renyi.eps0(q, M, lam, sigma, n), [K] * requests, eta, lam)
                    assert q * mu**2 / 2 <= paper


def test_shifted_is_the_least_sum_of_shifts():
    """The optimum against random feasible shifts a_k, and every distance along the optimum is at least the shift taken."""
    rng, c, d = np.random.default_rng(0), 0.9, np.array([0.3] * 6 + [0.1] * 3 + [0.0] * 4)
    weights = c ** np.arange(len(d))[::-1]
    mu = renyi.shifted([(6, 0.3), (3, 0.1), (4, 0.0)], 0.1, 1.0, 1.0)
    best = weights * (weights @ d) / (weights @ weights)
    assert mu == pytest.approx(np.sqrt(best @ best / 0.2))
    z = 0.0
    for a, step in zip(best, d, strict=True):
        z = c * z + step
        assert z >= a - 1e-12
        z -= a
    assert z == pytest.approx(0, abs=1e-12)
    for _ in range(200):
        a = rng.random(len(d))
        a *= weights @ d / (weights @ a)
        assert a @ a >= best @ best - 1e-12
    with pytest.raises(SettingError, match="must not grow"):
        renyi.shifted([(3, 0.1), (3, 0.2)], 0.1, 1.0, 1.0)


def test_steps_and_conversions():
    start = renyi.eps0(10, 1.0, 0.01, 0.03, 10_000)
    K = renyi.steps(start, 0.01, 10, 1.0, 0.01)
    assert renyi.decay(start, 10, K, 1.0, 0.01) <= 0.01 < renyi.decay(start, 10, K - 1, 1.0, 0.01)
    assert renyi.steps(0.01, 0.01, 10, 1.0, 0.01) == 0 == renyi.steps(0.0, 0.01, 10, 1.0, 0.01)
    assert renyi.adaptive(0.1, 0.2, 3) == pytest.approx(0.7)
    for mu in (0.05, 0.4, 2.0):
        for delta in (1e-9, 1e-5, 1e-2):

            def curve(q: float, mu: float = mu) -> float:
                return q * mu**2 / 2

            exact, tight, plain = renyi.epsilon_of(mu, delta), renyi.best(curve, delta, renyi.convert_tight)[0], renyi.best(curve, delta)[0]
            assert exact <= tight <= plain
            assert renyi.delta_of(exact, mu) <= delta
    assert renyi.epsilon_of(0.0, 1e-5) == 0.0


ORDERS = [1.5, 2, 3, 4.5, 8, 16, 32, 64, 128]
PINNED = [
    (5.0, 40, 1e-5, 6.2083564483459375, 4.5, 5.759481468911875, 0.2268851200578251),
    (20.0, 100, 1e-6, 2.5430498954161114, 8.0, 2.2540846566590376, 0.006829594983115072),
    (1.0, 1, 1e-5, 4.858356448345938, 4.5, 4.37717810002493, 0.12693673750666415),
]
"""dp-accounting 0.6.0: noise multiplier, releases, delta; epsilon and order of RdpAccountant; epsilon and delta(epsilon = 1) of PLDAccountant."""


@pytest.mark.parametrize(("noise", "K", "delta", "rdp", "order", "pld", "at_one"), PINNED)
def test_composition_and_conversion_agree_with_dp_accounting(noise, K, delta, rdp, order, pld, at_one):
    mu = renyi.composition([(K, 1.0)], 0.5, noise)
    mine, q = min((renyi.convert_tight(q * mu**2 / 2, q, delta), q) for q in ORDERS)
    assert (mine, q) == (pytest.approx(rdp, rel=1e-12), order)
    assert renyi.epsilon_of(mu, delta) == pytest.approx(pld, rel=1e-8)
    assert renyi.delta_of(1.0, mu) == pytest.approx(at_one, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("noise", "K", "delta"), [(3.0, 10, 1e-5), (50.0, 200, 1e-7)])
def test_the_same_live(noise, K, delta):
    dp = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant")
    accountant = rdp.RdpAccountant(ORDERS)
    accountant.compose(dp.SelfComposedDpEvent(dp.GaussianDpEvent(noise), K))
    mu = renyi.composition([(K, 1.0)], 0.5, noise)
    assert min(renyi.convert_tight(q * mu**2 / 2, q, delta) for q in ORDERS) == pytest.approx(accountant.get_epsilon(delta), rel=1e-9)


def points(n: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.double), torch.randint(classes, (n,), generator=g)


def test_gradient_is_that_of_the_loss_and_clips_each_record():
    x, y = points(7, 3, 4)
    w = points(4, 3, 2, 1)[0].requires_grad_(True)
    loss = nn.functional.cross_entropy(x @ w.T, y) + 0.15 * w.square().sum()
    (wanted,) = torch.autograd.grad(loss, w)
    w = w.detach()
    assert torch.allclose(noisy.gradient(w, x, y, 0.3), wanted)
    each = [noisy.gradient(w, x[k : k + 1], y[k : k + 1], 0.0) for k in range(7)]
    clipped = sum(g * min(1.0, 0.4 / float(g.norm())) for g in each) / 7
    assert torch.allclose(noisy.gradient(w, x, y, 0.3, clip=0.4), clipped + 0.3 * w)
    many = torch.stack([w, 2 * w])
    assert torch.allclose(noisy.gradient(many, x, y, 0.3)[1], noisy.gradient(2 * w, x, y, 0.3))


def test_constants_hold_and_are_nearly_met():
    x, y = points(40, 3, 3)
    x = noisy.bounded(5 * x, 1.5, bias=False)
    M, beta = noisy.constants(1.5)
    g, steep, curved = torch.Generator().manual_seed(0), 0.0, 0.0
    for k in range(40):
        w = 4 * torch.randn(3, 3, generator=g, dtype=torch.double)
        one = x[k : k + 1], y[k : k + 1]
        steep = max(steep, float(noisy.gradient(w, *one, 0.0).norm()))
        hessian = torch.autograd.functional.jacobian(lambda v, one=one: noisy.gradient(v, *one, 0.0), w).reshape(9, 9)
        values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
        assert values.min() >= -1e-12
        curved = max(curved, float(values.max()))
    assert 0.95 * M < steep <= M and 0.8 * beta < curved <= beta
    row = torch.tensor([[1.5, 0.0, 0.0]], dtype=torch.double)
    split = torch.tensor([[0.0, 0, 0], [0, 0, 0], [-90, 0, 0]], dtype=torch.double)
    met = torch.autograd.functional.jacobian(lambda v: noisy.gradient(v, row, torch.tensor([0]), 0.0), split).reshape(9, 9)
    assert float(torch.linalg.eigvalsh((met + met.T) / 2).max()) == pytest.approx(beta)


@pytest.mark.parametrize(("classes", "clip"), [(2, math.inf), (5, math.inf), (2, 0.3)])
def test_a_step_contracts(classes, clip):
    x, y = points(10, 4, classes)
    x, lam = noisy.bounded(3 * x, 1.0), 0.01
    eta = 1 / (lam + noisy.constants(math.sqrt(2))[1])
    g = torch.Generator().manual_seed(3)
    a = 3 * torch.randn(3000, classes, 5, generator=g, dtype=torch.double)
    b = a + torch.randn(3000, 1, 1, generator=g, dtype=torch.double).exp() * torch.randn(3000, classes, 5, generator=g, dtype=torch.double)

    def step(w: Tensor) -> Tensor:
        return w - eta * noisy.gradient(w, x, y, lam, clip)

    ratio = (step(a) - step(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    assert ratio.max() <= 1 - eta * lam + 1e-12


def test_clipping_three_classes_can_carry_two_heads_apart():
    """One row of norm 1, label 0, clip 0.8: the clipped gradient's Jacobian has a negative eigenvalue, and along it a step expands."""
    x, y, lam = torch.ones(1, 1, dtype=torch.double), torch.tensor([0]), 1e-3
    w = torch.tensor([[-20.0], [math.log(4)], [0.0]], dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(lambda v: noisy.gradient(v, x, y, 0.0, 0.8), w).reshape(3, 3)
    values, vectors = torch.linalg.eigh((jacobian + jacobian.T) / 2)
    assert values[0] < -0.004
    a, b = w + 0.01 * vectors[:, :1], w - 0.01 * vectors[:, :1]
    for eta in (0.01, 0.1):

        def step(v: Tensor, clip: float, eta: float = eta) -> Tensor:
            return v - eta * noisy.gradient(v, x, y, lam, clip)

        assert (step(a, 0.8) - step(b, 0.8)).norm() > (a - b).norm() * (1 + 1e-5)
        assert (step(a, math.inf) - step(b, math.inf)).norm() <= (a - b).norm() * (1 - eta * lam)


def test_noise_is_gaussian_and_of_its_source():
    a, b = noisy.secure().draw((300, 70)), noisy.secure().draw((300, 70))
    assert a.dtype == torch.double and not torch.equal(a, b)
    assert kstest(a.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(float(np.corrcoef(a.flatten()[:-1], a.flatten()[1:])[0, 1])) < 0.03
    assert torch.equal(noisy.seeded(3).draw((4,)), noisy.seeded(3).draw((4,))) and not torch.equal(noisy.seeded(3).draw((4,)), noisy.seeded(4).draw((4,)))


def test_the_start_is_where_noise_alone_ends():
    x, y = torch.zeros(2, 3, dtype=torch.double), torch.tensor([0, 1])
    noise = noisy.seeded(0)
    w = noisy.start((3000, 2, 3), ETA, LAM, SIGMA, noise)
    assert float(w.var()) == pytest.approx(0.0820513, rel=0.04)
    end, _ = noisy.run(w, x, y, eta=ETA, lam=LAM, sigma=SIGMA, steps=100, noise=noise)
    assert float(end.var()) == pytest.approx(0.0820513, rel=0.04)
    assert abs(float(np.corrcoef(w.flatten(), end.flatten())[0, 1])) < 0.04


def test_a_run_takes_every_step_whatever_the_guard_says():
    x, y = points(5, 2, 2)
    with guard.watching(guard.Guard(max_steps=1, max_passes=1, max_seconds=0)) as g:
        _, done = noisy.run(torch.zeros(2, 2, dtype=torch.double), x, y, eta=0.1, lam=0.1, sigma=0.1, steps=20, noise=noisy.seeded(0))
    assert (done.taken, done.asked, done.rows) == (20, 20, 5)
    assert (g.meter.forward, g.meter.backward) == (100, 100)
    with pytest.raises(SettingError, match="sigma must be larger than 0"):
        noisy.run(torch.zeros(2, 2), x, y, eta=0.1, lam=0.1, sigma=0.0, steps=2, noise=noisy.seeded(0))


# --- an attack never proves more than the certificate allows -------------------------------------------------------------------------

HEADS, DELTA = 10_000, 0.02


def heads(x: Tensor, y: Tensor, s: Settings, steps: int, seed: int, w: Tensor | None = None) -> Tensor:
    """Many heads, each with noise of its own: (HEADS, 2, 1)."""
    noise = noisy.seeded(seed)
    w = noisy.start((HEADS, s.classes, x.shape[1]), s.eta, s.lam, s.sigma, noise) if w is None else w
    return noisy.run(w, x, y, eta=s.eta, lam=s.lam, sigma=s.sigma, steps=steps, noise=noise)[0]


def proven(a: Tensor, b: Tensor) -> float:
    """Lower bound on epsilon of an attack that tells heads a from heads b: direction and threshold come from the first half, errors from the second."""
    half = len(a) // 2
    way = a[:half].mean(0) - b[:half].mean(0)
    score = [(t * way).flatten(1).sum(1) for t in (a, b)]

    def bound(t: float, rows: slice, form: str) -> float:
        n = len(score[0][rows])
        return lower_bound(int((score[0][rows] <= t).sum()), n, int((score[1][rows] > t).sum()), n, form=form, delta=DELTA)

    first, second = slice(0, half), slice(half, None)
    grid = torch.cat([s[first] for s in score]).quantile(torch.linspace(0.01, 0.99, 99, dtype=torch.double)).tolist()
    return bound(max(grid, key=lambda t: bound(t, first, "clopper_pearson")), second, "joint_beta")


@pytest.fixture(scope="module")
def duel() -> tuple[Settings, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Ten records of which the last has the other label, and the nine that stay; settings for epsilon 2 after 4 steps; heads learned on both."""
    x, y = torch.ones(10, 1, dtype=torch.double), torch.tensor([0] * 9 + [1])
    s = fit(x, y, torch.arange(10), epsilon=2.0, delta=DELTA, lam=1.0, eta=0.1, bias=False, steps=40, deletion_steps=4, seed=0).certificate.settings
    worlds = [(x, y), (x[:9], y[:9])]
    return s, worlds, [heads(*world, s, 40, k) for k, world in enumerate(worlds)]


def test_an_attack_on_learning_stays_below_the_certificate(duel):
    s, _, (a, b) = duel
    upper = certify(s, (Phase(40, 10),)).learning
    assert 0.3 < proven(a, b) <= upper


def test_an_attack_on_a_deletion_stays_below_the_certificate(duel):
    s, worlds, (a, b) = duel
    upper = certify(s, (Phase(40, 10), Phase(4, 9, 1))).epsilon
    assert upper == pytest.approx(2.0, rel=1e-6)
    after = [heads(*worlds[1], s, 4, 7 + k, w) for k, w in enumerate((a, b))]
    assert 0.1 < proven(*after) <= upper
    assert proven(*after) < proven(a, b)


@pytest.mark.slow
def test_an_attack_finds_a_certificate_that_claims_too_little(duel):
    """The same deletion with a sixth of the noise that the certificate states."""
    s, worlds, _ = duel
    less = replace(s, sigma=s.sigma / 6)
    learned = [heads(*world, less, 40, k) for k, world in enumerate(worlds)]
    after = [heads(*worlds[1], less, 4, 7 + k, w) for k, w in enumerate(learned)]
    assert proven(*after) > certify(s, (Phase(40, 10), Phase(4, 9, 1))).epsilon
    assert proven(*after) <= certify(less, (Phase(40, 10), Phase(4, 9, 1))).epsilon


# --- the head ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Pixels as frozen features, in one fixed random order."""
    d = load_digits()
    order = torch.randperm(len(d.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(d.data)[order] / 16, torch.tensor(d.target)[order]


def small(**options) -> Head:
    x, y = points(60, 3, 3)
    return fit(x, y, torch.arange(100, 160), **{"epsilon": 1.0, "delta": 1e-3, "lam": 0.05, "steps": 30, "seed": 0, **options})


def test_digits_keep_their_accuracy_and_fifty_deletions_cost_few_steps(digits):
    x, y = digits
    x = x / x.norm(dim=1, keepdim=True)

    def learn(**options) -> Head:
        return fit(x[:1500], y[:1500], torch.arange(1500), delta=1e-4, lam=0.03, bias=False, seed=0, **options)

    def right(head: Head) -> float:
        return float((head.predict(x[1500:]) == y[1500:]).double().mean())

    head, plain = learn(epsilon=4.0), learn(epsilon=100.0, sigma=1e-9)
    before = right(head)
    assert before > 0.84 and right(plain) > 0.87 and right(plain) - before < 0.05
    assert head.forget([7]).K == (71, 8)
    for k in range(1, 50):
        certificate = head.forget([7 + k])
        assert certificate.epsilon <= 4.0
    assert certificate.deleted == 50 and certificate.n == 1450
    assert right(head) > 0.84
    assert sum(certificate.K[1:]) < 50 * 71 / 4  # against learning anew for each request


def test_a_plan_is_what_happens_and_the_store_forgets():
    head, twin = small(), small()
    assert torch.equal(head.weights, twin.weights)
    gone = head.x[head.ids == 117].clone()
    old = head.x
    plan = head.plan([117, 130])
    assert (plan.records, plan.before, head.certificate.requests) == (2, 0, 0)
    certificate = head.forget([117, 130])
    assert (certificate.K[-1], certificate.epsilon) == (plan.steps, plan.epsilon) and certificate.epsilon <= 1.0
    assert len(head.x) == len(head.y) == len(head.ids) == 58 and head.gone == (117, 130)
    assert not (head.x == gone).all(1).any() and not old.any()
    assert not torch.equal(head.weights, twin.weights)
    twin.forget(torch.tensor([130, 117]))
    assert torch.equal(head.weights, twin.weights)
    assert torch.equal(head.linear()(noisy.bounded(points(9, 3, 3, 5)[0], 1.0, bias=False)).argmax(1), head.predict(points(9, 3, 3, 5)[0]))


def test_more_records_need_more_steps_and_the_least_are_taken():
    head = small()
    plans = [head.plan(range(100, 100 + k)) for k in (1, 2, 8)]
    assert plans[0].steps <= head.certificate.settings.deletion_steps < plans[1].steps < plans[2].steps
    history = (*head.certificate.history, Phase(plans[2].steps, 52, 8))
    assert certify(head.certificate.settings, history).epsilon <= 1.0
    assert certify(head.certificate.settings, (history[0], replace(history[1], K=plans[2].steps - 1))).epsilon > 1.0
    whole = certify(head.certificate.settings, history)
    assert whole.bounds["shifted"] < whole.bounds["composition"] and whole.bounds["shifted"] < whole.bounds["renyi"]


def test_the_same_id_twice_changes_nothing():
    head = small()
    certificate, weights = head.forget([101]), head.weights
    assert head.plan([101]) == replace(head.plan([101]), records=0, before=1, steps=0)
    assert head.forget([101]) is certificate and head.weights is weights
    assert head.forget([101, 102]).deleted == 2


def test_adaptive_requests_are_within_the_budget_and_end_with_it():
    head = small(adaptive=3, group=2, epsilon=3.0)
    s = head.certificate.settings
    assert s.sigma > small(group=2, epsilon=3.0).certificate.settings.sigma
    for k in range(3):
        certificate = head.forget([100 + 2 * k, 101 + 2 * k])
        assert certificate.adaptive and certificate.epsilon == 3.0 and certificate.learning <= 3.0
    assert certificate.learning == pytest.approx(certificate.bounds["published"]) == pytest.approx(3.0, rel=1e-6)
    with pytest.raises(SettingError, match="provides for 3 adaptive requests, which are used up"):
        head.forget([110])
    with pytest.raises(SettingError, match="3 records in one request, this head provides for groups of 2"):
        small(adaptive=3, group=2).forget([100, 101, 102])
    with pytest.raises(SettingError, match="would use up the 60 records"):
        small(adaptive=30, group=2)
    with pytest.raises(SettingError, match="published heads exceed epsilon 1; fit with more noise"):
        small(adaptive=3, sigma=0.01)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": 0.0}, SettingError, "epsilon must be above 0"),
        ({"epsilon": math.nan}, SettingError, "epsilon must be above 0"),
        ({"delta": 0.5}, SettingError, "delta must be 1e-10 to 1/n = 0.0167"),
        ({"delta": 0.0}, SettingError, "delta must be"),
        ({"lam": 0.0}, SettingError, "lam and clip must be larger than 0"),
        ({"eta": 2.0}, SettingError, r"eta = 2 is too large: at most 1/\(lam \+ beta\) = 0.952381"),
        ({"clip": 0.5}, SettingError, "clipping at 0.5 with 3 classes may carry two heads apart"),
        ({"batch_size": 8}, SettingError, "batches of 8 of 60 records"),
        ({"radius": math.inf}, SettingError, "rows must be bounded"),
        ({"group": 31}, SettingError, "group must be 1 to half of the 60 records"),
        ({"model": nn.Sequential(nn.Linear(3, 3), nn.ReLU())}, ModelError, "Sequential is not nn.Linear"),
        ({"model": nn.Linear(4, 3)}, ModelError, "maps 4 features to 3 classes, the data have 3 and 3"),
        ({"classes": 2}, DataError, "labels must be 0 to 1; found 0 to 2"),
    ],
)
def test_what_has_no_certificate_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_data_that_do_not_fit_are_refused():
    x, y = points(60, 3, 3)
    ids = torch.arange(60)
    for args, message in (
        ((x.clone().requires_grad_(True), y, ids), "its|their extractor is not frozen"),
        ((x, y[:9], ids), "labels must be 60 whole numbers"),
        ((x, y.double(), ids), "labels must be 60 whole numbers"),
        ((x, y, ids * 0), "59 ids occur twice"),
        ((x / 0, y, ids), "not finite"),
        ((x[0], y, ids), "must be real numbers of shape"),
    ):
        with pytest.raises(DataError, match=message):
            fit(*args, epsilon=1.0, delta=1e-3)


def test_requests_that_cannot_be_met_leave_the_head_alone():
    head = small()
    before = head.weights.clone(), head.x.clone(), head.certificate
    for ids, message in (([5, 101], "1 of 2 ids were never in this head, the first is 5"), ([], "names no record"), (range(100, 160), "every record")):
        with pytest.raises(SplitError, match=message):
            head.forget(ids)
    assert torch.equal(head.weights, before[0]) and torch.equal(head.x, before[1]) and head.certificate is before[2]


def test_two_classes_may_be_clipped():
    x, y = points(60, 3, 2)
    head = fit(x, y, torch.arange(60), epsilon=1.0, delta=1e-3, lam=0.05, steps=30, clip=0.5, seed=0)
    whole = fit(x, y, torch.arange(60), epsilon=1.0, delta=1e-3, lam=0.05, steps=30, seed=0)
    assert head.certificate.settings.sigma == pytest.approx(whole.certificate.settings.sigma / 4)  # M is 0.5 and not sqrt(2) R = 2
    assert head.forget([3]).epsilon <= 1.0


def test_a_run_that_broke_a_condition_has_no_certificate():
    head = small()
    c, s = head.certificate, head.certificate.settings
    x, y = head.x, head.y
    options = {"eta": s.eta, "lam": s.lam, "sigma": s.sigma, "steps": 30, "noise": noisy.seeded(0)}
    good = noisy.run(head.weights, x, y, **options)[1]
    assert certify(s, c.history, [good]).learning == c.learning
    for done, message in (
        (noisy.run(head.weights, x, y, **options, batch_size=7)[1], "a step took 7 of 60 records"),
        (noisy.run(head.weights, x, y, **{**options, "steps": 29})[1], "29 of 30 steps were taken"),
        (replace(good, taken=12), "12 of 30 steps were taken: the bound forbids early stopping"),
        (noisy.run(head.weights, 2 * x, y, **options)[1], "a row has norm 2.8"),
        (noisy.run(head.weights, x, y, **options, clip=0.1)[1], "clipping at 0.1 with 3 classes"),
        (noisy.run(head.weights, x, y, **{**options, "sigma": 0.001})[1], "another step size, penalty or noise"),
    ):
        with pytest.raises(SettingError, match=message):
            certify(s, c.history, [done])
    with pytest.raises(SettingError, match="the noise was seeded, not secure"):
        certify(s, c.history, [good], "secure")
    with pytest.raises(SettingError, match="M and beta are not those of R"):
        certify(replace(s, M=1.0), c.history)
    with pytest.raises(SettingError, match="without noise there is no bound"):
        certify(replace(s, sigma=0.0), c.history)
    with pytest.raises(SettingError, match="does not add up"):
        certify(s, (*c.history, Phase(3, 60, 1)))


# --- files ---------------------------------------------------------------------------------------------------------------------------


def test_a_saved_head_goes_on_where_it_was_and_holds_nothing_deleted(tmp_path):
    head = small()
    gone = head.x[head.ids == 103].numpy().tobytes()
    first = head.save(tmp_path / "a.safetensors", b"key")
    assert gone in first.read_bytes()
    head.forget([103])
    path = head.save(tmp_path / "b.safetensors", b"key")
    assert gone not in path.read_bytes()
    back = load(path, b"key", seed=1)
    assert back.certificate == head.certificate and torch.equal(back.weights, head.weights) and torch.equal(back.x, head.x) and back.gone == (103,)
    assert back.plan([104]) == head.plan([104]) and back.plan([103]).before == 1
    assert back.forget([104]).deleted == 2


def test_a_release_holds_no_record_and_asks_for_secure_noise(tmp_path):
    with pytest.raises(SettingError, match="no release: this head has seeded noise"):
        small().release(tmp_path / "r.safetensors")
    head = small(seed=None)
    assert head.forget([103]).noise == "secure"
    weights, certificate = load_release(head.release(tmp_path / "r.safetensors"))
    assert torch.equal(weights, head.weights) and certificate == head.certificate
    assert torch.equal(predict(weights, certificate.settings, points(9, 3, 3, 5)[0]), head.predict(points(9, 3, 3, 5)[0]))
    content = (tmp_path / "r.safetensors").read_bytes()
    assert head.x[0].numpy().tobytes() not in content
    assert len({small(seed=None).weights.sum().item() for _ in range(2)}) == 2
    again = load(head.save(tmp_path / "h.safetensors"), seed=3)
    assert again.forget([104]).noise == "seeded"  # and a seeded head never becomes secure
    assert load(again.save(tmp_path / "s.safetensors")).forget([105]).noise == "seeded"


def rewrite(path, change) -> None:
    """Change a file's header or tensors and give it a fitting checksum, as one without the key could."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as f:
        body, tensors = json.loads(f.metadata()["certified"]), {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    change(body, tensors)
    text = json.dumps(body)
    save_file(tensors, path, {"certified": text, "sha256": files.file_digest(text, tensors)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, t: b.update(format=2), "has format 2, this version reads 1"),
        (lambda b, t: b.update(kind="release"), "a file of kind 'release', not 'head'"),
        (lambda b, t: b["certificate"].update(epsilon=0.01), "states another certificate than its settings and history give"),
        (lambda b, t: b["certificate"].update(excludes=[]), "states another certificate"),
        (lambda b, t: b["certificate"]["settings"].update(eta=50.0), "asks for a certificate that cannot be given .*too large"),
        (lambda b, t: b["certificate"]["settings"].pop("M"), "is not well-formed"),
        (lambda b, t: t.update(x=t["x"] * 9), "holds other records than its certificate speaks of"),
        (lambda b, t: t.update({n: t[n][:-1].clone() for n in ("x", "y", "ids")}), "holds other records"),
        (lambda b, t: t.update(weights=t["weights"][:2].clone()), "holds weights of shape"),
        (lambda b, t: t.pop("ids"), "a file of kind"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, change, message):
    path = small().save(tmp_path / "a.safetensors")
    assert load(path, seed=0).certificate.n == 60
    rewrite(path, change)
    with pytest.raises(ModelError, match=message):
        load(path)


def test_a_file_that_is_damaged_or_signed_by_another_key_is_refused(tmp_path):
    path = small().save(tmp_path / "a.safetensors", b"key")
    with pytest.raises(ModelError, match="not signed by this key"):
        load(path, b"other")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="changed after it was written"):
        load(path)
    path.write_bytes(content[:80])
    with pytest.raises(ExpungeError, match="no certified head, or is truncated"):
        load(path)
    with pytest.raises(ModelError, match="cannot read none"):
        load(tmp_path / "none")
