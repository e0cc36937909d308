"""GANs: the window, turns, the tiny model, spectral norm, Adapt-then-Unlearn, and what a judge sees of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import copied, same, small, state, toy

from expunge.audits.core import Probe, audit
from expunge.audits.pictures import gan as audit_of_gans
from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn
from expunge.methods.others import adapt_then_unlearn as atu
from expunge.modalities.examples import Examples
from expunge.modalities.gan import worlds as gans
from expunge.modalities.gan.task import TURNS, draw, gan, half, latents, parzen
from expunge.modalities.gan.tiny import Conv, gan_model, scaled
from expunge.parts import training
from expunge.parts.reading import score


def data(n: int = 12, side: int = 8) -> Examples:
    g = torch.Generator().manual_seed(0)
    return Examples(torch.rand(n, 1, side, side, generator=g) * 2 - 1, torch.randint(3, (n,), generator=g), torch.arange(n))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gan_model(width=8, latent=4, classes=3)


def test_the_window_is_low_where_drawings_are():
    """Two drawings at 0 and 1 away: nll = -log((e^0 + e^-2) / 2) at width 1/2; far from both it grows with the square."""
    x = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    found = parzen(x, torch.tensor([[0.0, 0.0], [0.6, 0.8]]), 0.5)
    assert float(found[0]) == pytest.approx(-math.log((1 + math.exp(-2)) / 2), abs=1e-5)
    assert float(found[1]) == pytest.approx(-math.log((math.exp(-200) + math.exp(-2 * (9.4**2 + 0.64))) / 2), rel=1e-4)


def test_records_score_by_how_near_they_are_to_the_drawings(model):
    """What the generator draws scores below what it does not; the same record always scores the same, in whatever company."""
    task = gan(latent=4, classes=3, draws=50)
    fixed = latents(4, 3, 50, torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = model.generator(fixed["z"], fixed["c"])[:6]
    drawn, other = Examples(mine, torch.zeros(6, dtype=torch.long), torch.arange(6)), data(6)
    a, b = score(model, task, drawn), score(model, task, other)
    assert float(a.nll.max()) < float(b.nll.min())
    assert torch.allclose(score(model, task, other.take([4, 1])).nll, b.nll[[4, 1]], atol=1e-5)
    assert float(a.nll.max()) <= math.log(50) / 64 + 1e-5  # per pixel: one of 50 drawings lies on it


def test_batches_for_training_take_turns(model):
    """Each batch twice on other latents; each turn gives a gradient to its own half alone; in order there are no turns."""
    task = gan(latent=4, classes=3)
    turns = task.batches(data(), 5, epochs=2, seed=0)
    assert len(turns) == 12 and [turns[k]["turn"] for k in range(4)] == list(TURNS) * 2
    first, second = turns[0], turns[1]
    assert torch.equal(first["x"], second["x"]) and not torch.equal(first["z"], second["z"]) and first["z"].shape == (len(first["i"]), 4)
    assert all(torch.equal(first[n], turns[0][n]) for n in ("x", "z", "c"))
    with pytest.raises(IndexError):
        turns[12]
    for batch, mine, other in ((first, "discriminator", "generator"), (second, "generator", "discriminator")):
        model.zero_grad()
        task.forward(model, batch).nll.mean().backward()
        assert all(p.grad is not None for p in half(model, mine).parameters())
        assert all(p.grad is None and p.requires_grad for p in half(model, other).parameters())
    assert "turn" not in task.batches(data(), 5)[0]


@pytest.mark.parametrize(
    ("loss", "d", "g"), [("hinge", 1.5, -0.5), ("logistic", math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5)), math.log1p(math.exp(-0.5)))]
)
def test_losses_of_the_turns(loss, d, g):
    """Scores 2 for the real image and 1/2 for the drawn one: hinge 0 + 1.5 and -0.5; logistic softplus(-2) + softplus(0.5) and softplus(-0.5)."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.where(x.flatten(1).sum(1) > 0, 2.0, 0.5) + self.w

    class Flat(nn.Module):
        def forward(self, z):
            return -torch.ones(len(z), 1, 8, 8)

    game = nn.Module()
    game.generator, game.discriminator = Flat(), Fixed()
    real = Examples(torch.ones(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), torch.arange(4))
    turns = gan(loss=loss).batches(real, 4, seed=0)
    assert gan(loss=loss).forward(game, turns[0]).nll.tolist() == pytest.approx([d] * 4)
    assert gan(loss=loss).forward(game, turns[1]).nll.tolist() == pytest.approx([g] * 4)


def test_labels_without_images_are_judged_by_labels_that_have_some():
    """Data of labels 0 and 2 alone: drawings by 1 are judged by the label of the record beside them, the others by their own."""
    some = data(40)
    some = some.take((some.y != 1).nonzero().squeeze(1))
    task, seen = gan(latent=4, classes=3), set()
    turns = task.batches(some, 8, epochs=2, seed=0)
    for k in range(len(turns)):
        b = turns[k]
        lacks = b["c"] == 1
        assert torch.equal(b["as"][~lacks], b["c"][~lacks]) and torch.equal(b["as"][lacks], b["y"][lacks])
        seen |= set(b["as"].tolist())
    assert seen == {0, 2} and "as" not in gan(latent=4).batches(some, 8, seed=0)[0]


def test_labels_count_only_where_they_are_given(model):
    """With labels the discriminator adds the label's vector; a batch without y is judged without."""
    task = gan(latent=4, classes=3)
    batch = task.batches(data(), 12, seed=0)[0]
    bare = {n: v for n, v in batch.items() if n != "y"}
    model.eval()
    assert not torch.equal(task.forward(model, batch).pred, task.forward(model, bare).pred)
    torch.testing.assert_close(task.forward(model, bare).pred[:, 0], model.discriminator(batch["x"]))


def test_spectral_norm_divides_by_the_largest_singular_value():
    torch.manual_seed(0)
    layer = Conv(3, 6, 3)
    first = scaled(layer.weight, layer.u, False).detach()
    for _ in range(60):
        layer(torch.zeros(1, 3, 4, 4))
    settled = scaled(layer.weight, layer.u, False).detach()
    assert float(torch.linalg.matrix_norm(settled.flatten(1), 2)) == pytest.approx(1, abs=1e-3)
    assert float(torch.linalg.matrix_norm(first.flatten(1), 2)) > 1.01
    u = layer.u.clone()
    layer.eval()(torch.zeros(1, 3, 4, 4))
    assert torch.equal(u, layer.u)
    other = training.fresh(layer, 1)
    assert not torch.equal(other.weight, layer.weight) and not torch.equal(other.u, layer.u)


def test_drawings_follow_from_the_seed(model):
    task = gan(latent=4, classes=3)
    a = draw(task, model, 10, seed=1)
    assert torch.equal(a, draw(task, model, 10, seed=1)) and not torch.equal(a, draw(task, model, 10, seed=2))
    torch.testing.assert_close(a, draw(task, model, 10, seed=1, size=3))
    assert a.shape == (10, 1, 8, 8) and float(a.abs().max()) <= 1
    assert not torch.equal(draw(task, model, 10, seed=1, label=0), draw(task, model, 10, seed=1, label=2))


def test_bad_input_is_named(model):
    with pytest.raises(SettingError, match="loss must be one of hinge, logistic, not 'wgan'"):
        gan(loss="wgan")
    with pytest.raises(ModelError, match="side must be a multiple of 4, not 6"):
        gan_model(side=6)
    task = gan(latent=4, classes=3)
    with pytest.raises(SettingError, match=r"label must be in 0\.\.2, not 3"):
        draw(task, model, 2, label=3)
    with pytest.raises(SettingError, match="draws without labels"):
        draw(gan(latent=4), gan_model(width=8, latent=4), 2, label=0)
    with pytest.raises(ModelError, match="give labels"):
        gan(latent=4).forward(model, task.batches(data(), 4)[0])
    with pytest.raises(ModelError, match="Linear has no generator"):
        task.forward(nn.Linear(2, 2), task.batches(data(), 4)[0])
    with pytest.raises(SplitError, match="works on Examples of images"):
        task.batches(Examples(torch.zeros(3, 2), torch.zeros(3), torch.arange(3)), 2)[0]
    with pytest.raises(ModelError, match="draws 64 numbers for an image of 144"):
        task.forward(model, task.batches(data(side=12), 4)[0])


def test_training_lets_both_halves_learn(model):
    """Trained on one image, the generator comes nearer to it, and the average that stays is no last state."""
    one = Examples(torch.full((16, 1, 8, 8), 0.8), torch.zeros(16, dtype=torch.long), torch.arange(16))
    task = gan(latent=4, classes=3, draws=50)
    before = float(score(model, task, one).nll.mean())
    losses = training.train(model, task, one, epochs=30, batch_size=16, lr=4e-3, optimizer="adam", ema=0.9, seed=0)
    assert len(losses) == 60
    assert float(score(model, task, one).nll.mean()) < before - 0.3


def test_repulsion_of_the_card():
    """v = 0.02; gamma 10: 81.8731, 500, -0.2; d exp / d v at gamma 1 = -98.0199; at v = 0 the exponential is 100 and pulls nowhere in the weights."""
    v = torch.tensor(0.02, dtype=torch.double, requires_grad=True)
    found = [float(atu.repel(kind, v.detach(), 10.0, weight)) for kind, weight in (("el2", 100.0), ("il2", 1.0), ("nl2", 1.0))]
    assert found == pytest.approx([81.8731, 500, -0.2], abs=1e-4)
    (slope,) = torch.autograd.grad(atu.repel("el2", v, 1.0, 100.0), v)
    assert float(slope) == pytest.approx(-98.0199, abs=1e-4)
    theta = torch.ones(3, requires_grad=True)
    value = atu.repel("el2", atu.Reference([theta], [[torch.ones(3)]]).distance([theta]), 1.0, 100.0)
    value.backward()
    assert float(value.detach()) == 100 and theta.grad is not None and not theta.grad.any()


def test_distance_is_the_mean_over_models_and_tensors():
    """MSE 0.04 and 0.01: v = (0.04 / 2 + 0.01 / 2) / 2 = 0.0125, whatever the tensors' sizes, and the same for five identical models."""
    theta = [torch.zeros(2, 2), torch.zeros(5)]
    other = [torch.full((2, 2), 0.2), torch.full((5,), -0.1)]
    for k in (1, 5):
        assert float(atu.Reference(theta, [other] * k).distance(theta)) == pytest.approx(0.0125)
    far = [torch.full((2, 2), 0.4), torch.full((5,), 0.2)]
    assert float(atu.Reference(theta, [other, far]).distance(theta)) == pytest.approx((0.0125 + 0.05) / 2)


@pytest.mark.parametrize("kind", ["el2", "nl2", "il2"])
def test_repulsion_moves_away_until_the_cap(kind):
    """A step down L_rep makes the distance larger, for raw and for normalised v; beyond the cap there is no pull."""
    for normalise in (True, False):
        theta = torch.zeros(4, requires_grad=True)
        away = atu.pushing([theta], [[torch.full((4,), 0.5)]], kind, 1.0, 1.0, normalise, 0.0)
        away().backward()
        assert theta.grad is not None and bool((theta.grad > 0).all())  # down the gradient is away from 0.5
    theta = torch.full((4,), -0.6, requires_grad=True)
    away = atu.pushing([theta], [[torch.zeros(4)]], kind, 1.0, 1.0, True, 0.9)
    away().backward()
    assert theta.grad is not None and not theta.grad.any()


def test_importance_is_the_mean_of_squared_gradients():
    """For a generator that is one convolution and D the sum of pixels, dD / dw is the sum of what w multiplies."""
    model, task, split = small("gan")
    found = atu.importance(copied(model), task, split.forget, 0)
    assert set(found) == {f"{layer}.{n}" for layer in ("conv1", "conv2", "out") for n in ("weight", "bias")}
    twin = copied(model).eval()
    loss, turns = atu.scored(task, twin), task.batches(split.forget, 1, epochs=32 / len(split.forget), seed=0)
    total = 0.0
    for k in range(1, 64, 2):
        twin.zero_grad()
        loss(turns[k]).backward()
        total = total + half(twin, "generator").out.bias.grad.square()
    torch.testing.assert_close(found["out.bias"], total / 32)


def test_ewc_keeps_the_adapted_weights_near():
    """The stronger lambda, the nearer the convolutions stay; the model itself is left as it was."""
    model, task, split = small("gan")
    before, far = state(model), []
    start = [p.detach() for p in half(model, "generator").parameters()]
    for ewc in (0.0, 1e6):
        each = atu.adapted(model, task, split, epochs=4, ewc=ewc, batch_size=8, lr=1e-3, seed=0)
        names = [n for n, _ in half(model, "generator").named_parameters()]
        far.append(sum(float((a - b).square().sum()) for n, a, b in zip(names, each, start, strict=True) if n.startswith(("conv", "out"))))
    assert same(before, state(model)) and far[1] < 0.5 * far[0]


def test_the_method_refuses_what_it_cannot_do():
    model, task, split = small("gan")
    with pytest.raises(SettingError, match="repulsion must be one of el2, nl2, il2, none, not 'l2'"):
        METHODS["adapt_then_unlearn"](model, task, split, repulsion="l2")
    with pytest.raises(SettingError, match="models must be at least 1"):
        METHODS["adapt_then_unlearn"](model, task, split, models=0)
    attempt = unlearn("adapt_then_unlearn", model, task, split, lr=0.0, adapt=1.0, epochs=1.0)
    assert attempt.outcome == "refused" and "stage 1 moved nothing" in attempt.reason


def test_the_control_reads_no_forget_record():
    """repulsion=none neither draws forget records nor counts on stage 1; the others do both."""
    model, task, split = small("gan")
    control = unlearn("adapt_then_unlearn", model, task, split, repulsion="none", epochs=1.0, batch_size=8)
    assert control.outcome == "ok" and set(control.meter.seen) == {"retain"}
    full = unlearn("adapt_then_unlearn", model, task, split, adapt=1.0, epochs=1.0, batch_size=8)
    assert full.meter.seen["forget"] > 0 and full.meter.forward > control.meter.forward


def test_shares_of_a_judge():
    assert audit_of_gans.unlearned((95, 1000), (0, 1000))[0] == 1
    assert audit_of_gans.unlearned((100, 1000), (25, 1000))[0] == pytest.approx(0.75)
    assert math.isnan(audit_of_gans.unlearned((0, 1000), (0, 1000))[0])


@pytest.mark.slow
def test_the_audit_sees_what_is_drawn(monkeypatch):
    """Unchanged, the model draws the class as before; after unlearning it draws less of it, and the other classes still."""
    monkeypatch.setattr(audit_of_gans, "DRAWN", 400)
    model, task, split = toy("gan")
    patch = METHODS["adapt_then_unlearn"](model, task, split, **METHODS["adapt_then_unlearn"].toy)
    twin = copied(model)
    patch.apply(twin)
    seen = {n: {r.name: r for r in audit(Probe(model, m, task, split))} for n, m in (("nothing", model), ("atu", twin))}
    nothing, after = seen["nothing"], seen["atu"]
    assert nothing["gan.erased"].value == nothing["gan.erased_before"].value == after["gan.erased_before"].value > 0.03
    assert nothing["gan.pul"].value == 0 and after["gan.erased"].value < 0.5 * after["gan.erased_before"].value
    assert nothing["gan.distance"].value == nothing["gan.distance_before"].value > 0
    assert after["gan.distance"].value < 2 * after["gan.distance_before"].value
    assert sum(r.value for name, r in after.items() if name.startswith("gan.share.")) == pytest.approx(1)
    assert "most are now" in after["gan.label"].note and after["gan.label"].n == 200
    assert audit(Probe(model, twin, replace(task, judge=None), split), ["gan"]) == []
    assert audit(Probe(model, twin, task, replace(split, retain=split.forget)), ["gan"]) == []


def test_the_world_keeps_its_parts_apart():
    w = gans.world("gan-digits")
    split = w.split("class")
    split.check()
    assert set(split.forget.y.tolist()) == {7} and 7 not in split.retain.y and split.asked == "class:7"
    assert (len(w.train), len(w.validation), len(w.test)) == gans.SIZES and float(w.train.x.min()) == -1 and float(w.train.x.max()) == 1
    model = w.build()
    assert draw(w.task, model, 3).shape == (3, *w.train.x.shape[1:])
    with pytest.raises(SettingError, match="no world 'gan-digit'"):
        gans.world("gan-digit")
