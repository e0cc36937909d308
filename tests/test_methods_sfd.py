"""SalUn for diffusion, SFD, drawing in one step, and the class-conditional world."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import copied, same, small, state

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import Split, concat
from expunge.engine.run import unlearn
from expunge.methods.diffusion.salun_diffusion import guided, salient
from expunge.methods.diffusion.sfd import asked, clipped, distance, time_of
from expunge.modalities.diffusion import ddpm
from expunge.modalities.diffusion.task import PREDICTIONS, Schedule, diffusion, draw, jump, predict, states
from expunge.modalities.diffusion.tiny import Diffusion, Words, diffusion_model
from expunge.modalities.pictures import Pictures
from expunge.modalities.worlds import world
from expunge.parts.scopes.attention import part
from expunge.parts.scopes.saliency import gradient_sum
from expunge.parts.training import fresh

QUICK = {"epochs": 1, "batch_size": 8}
PULL = {"batch_size": 8, "ahead": 3, "lr": 0.02, "ema": 0.9}
"""Settings of SFD that reach the fixed point of the world of points."""


class Points(nn.Module):
    """The exact model of a world where every prompt has one image, `mu` (V, C, H, W): under any schedule it says what x_t is made of."""

    def __init__(self, schedule: Schedule, mu: torch.Tensor) -> None:
        super().__init__()
        self.schedule, self.mu = schedule, nn.Parameter(mu)

    def forward(self, sample, timestep, encoder_hidden_states):
        mu = torch.einsum("bv,vchw->bchw", encoder_hidden_states[:, 0], self.mu)
        a, b = self.schedule.mix(timestep)
        return self.schedule.wanted(mu, (sample - a * mu) / b, timestep)


class OneHot(nn.Module):
    """Tokens of four words as unit vectors."""

    def forward(self, tokens):
        return nn.functional.one_hot(tokens, 4).float()


def points(prediction: str = "epsilon"):
    """Three prompts with an image of four pixels each, and the empty one; `c` must go and `b` stands in for it."""
    mu = torch.tensor([[0.0, 0, 0, 0], [0.8, 0, 0, 0.2], [0, 0.6, -0.4, 0], [-0.5, 0, 0.5, -0.5]]).view(4, 1, 2, 2)
    vocabulary = Words(("a", "b", "c"), length=2)
    task = diffusion(Schedule(prediction), shape=(1, 2, 2), null=vocabulary([""])[0])
    data = {k: list(v) for k, v in {"forget": "cccc", "retain": "abababab", "anchor": "bbbb"}.items()}
    parts = {
        k: Pictures(None, vocabulary(v), 100 * j + torch.arange(len(v)), tuple({"prompt": w} for w in v), vocabulary) for j, (k, v) in enumerate(data.items())
    }
    return Diffusion(Points(task.schedule, mu), OneHot()), task, Split(**parts)


def kind(prediction: str):
    """The small world under a task of that prediction."""
    model, task, split = small("diffusion")
    return model, diffusion(Schedule(prediction), shape=(1, 8, 8), null=task.null, drop=0.15), split


def test_distance_of_the_card():
    """X_phi 0.5, X_psi 0.3, x_g 0.1: 0.08 at a 1.2, 0.10 at a 1; equal scores cost nothing and pull nowhere; the weight has a floor of 1e-5."""
    X_phi, X_psi, x_g = (torch.full((1, 1, 1, 1), v, dtype=torch.double) for v in (0.5, 0.3, 0.1))
    assert distance(X_phi, X_psi, x_g, 1.2).item() == pytest.approx(0.08)
    assert distance(X_phi, X_psi, x_g, 1.0).item() == pytest.approx(0.10)
    assert distance(X_phi, X_psi, X_phi, 1.0).item() == pytest.approx(0.2 * -0.2 / 1e-5)
    x_g.requires_grad_()
    (slope,) = torch.autograd.grad(distance(X_phi, X_psi, x_g, 1.2).sum(), x_g)
    assert slope.item() == pytest.approx(-0.2 / 0.4)  # the weight 1 / 0.4 is constant
    (slope,) = torch.autograd.grad(distance(X_phi, X_phi, x_g, 1.2).sum(), x_g)
    assert slope.item() == 0


def test_distance_adds_up_elements_and_weighs_by_their_mean():
    g = torch.Generator().manual_seed(0)
    p, s, x = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(3))
    d = p - s
    by_hand = [(d[k] * ((p[k] - x[k]) - 1.2 * d[k])).sum() / (p[k] - x[k]).abs().mean() for k in range(3)]
    torch.testing.assert_close(distance(p, s, x, 1.2), torch.stack(by_hand))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_of_a_generator(prediction):
    """x_T = b z; a network that says what x_T = a 0 + b z is made of gives x_g = 0 exactly (card sfd); other answers as the schedule reads them."""
    model, task, split = kind(prediction)
    t = time_of(task.schedule, 2.5)
    model.get_buffer("one_step").fill_(t)
    data = split.retain.take(range(3))
    z = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(int(i))) for i in data.ids])
    at = torch.full((3,), float(t))
    b = task.schedule.mix(at)[1]
    with torch.no_grad():
        wanted = task.schedule.parted(b * z, predict(model, b * z, at, states(model, data.tokens)), at)[0]
    assert jump(model) == t and torch.equal(draw(task, model, data, guidance=4.0, steps=9), draw(task, model, data, guidance=1.0, steps=1))
    torch.testing.assert_close(draw(task, model, data), wanted)
    nothing = task.schedule.wanted(torch.zeros_like(z), z, at)
    torch.testing.assert_close(task.schedule.parted(b * z, nothing, at)[0], torch.zeros_like(z), atol=1e-5, rtol=0)


def test_times_of_noise_levels():
    """Card sfd: t_init 440, t_min 38 and t_max 712 of DDPM's linear betas."""
    assert [time_of(Schedule("epsilon", ddpm.linear()), s) for s in (0.137, 2.5, 13.1)] == [38, 440, 712]
    for prediction in PREDICTIONS:
        a, b = Schedule(prediction).mix(torch.tensor([float(time_of(Schedule(prediction), 2.5))]))
        assert float(b / a) == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sfd_draws_another_image_for_the_concept(prediction):
    """In the world of points the generator starts at each prompt's image, ends at the anchor's for the concept, and stays elsewhere; itself changes nothing."""
    model, task, split = points(prediction)
    mu, before = model.unet.mu.detach().clone(), state(model)
    drawn = {}
    for instead, epochs in (("anchor", 60), ("itself", 5)):
        attempt = unlearn("sfd", model, task, split, instead=instead, guidance=1.0, epochs=epochs, **PULL)
        assert attempt.outcome == "ok" and same(before, state(model)) and jump(model) == 0
        assert {"one_step"} <= {e.name for e in attempt.patch.edits} <= {"one_step", "unet.mu"}
        twin = copied(model)
        inverse = attempt.patch.apply(twin)
        assert jump(twin) == time_of(task.schedule, 2.5)
        drawn[instead] = draw(task, twin, concat(split.forget, split.retain)).view(12, 4)
        inverse.apply(twin)
        assert same(before, state(twin))
    a, b, c = mu[1:].view(3, 4)
    torch.testing.assert_close(drawn["anchor"], torch.stack([b] * 4 + [a, b] * 4), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn["itself"], torch.stack([c] * 4 + [a, b] * 4), atol=0.1, rtol=0)


def test_sfd_guides_the_model_it_learns_from():
    """At guidance 2 the score of b is 2 b - null, and the generator goes there: for b itself, and for c in its place."""
    model, task, split = points("flow")
    METHODS["sfd"](model, task, split, guidance=2.0, epochs=90, **PULL).apply(model)
    images = draw(task, model, concat(split.forget.take([0]), split.retain.take([0, 1]))).view(3, 4)
    a, b = torch.tensor([1.6, 0, 0, 0.4]), torch.tensor([0, 1.2, -0.8, 0])
    torch.testing.assert_close(images, torch.stack([b, a, b]), atol=0.15, rtol=0)


def test_sfd_reads_no_image():
    """Other images of the same prompts give the same patch, as no images at all do."""
    model, task, split = points()
    patch = METHODS["sfd"](model, task, split, **QUICK)
    painted = {k: replace(getattr(split, k), x=torch.rand(len(getattr(split, k)), 1, 2, 2)) for k in ("forget", "retain")}
    assert METHODS["sfd"](model, task, replace(split, **painted), **QUICK).digest == patch.digest
    with pytest.raises(SettingError, match="say what shape is drawn"):
        METHODS["sfd"](model, replace(task, shape=()), split, **QUICK)


def test_sfd_redirects_as_asked():
    """anchor, random and itself differ; with the concept's own records as anchors, anchor is itself; a weight of 0 leaves no trace of the anchor."""
    model, task, split = points()
    own = replace(split, anchor=split.forget)
    run = lambda s, **more: METHODS["sfd"](model, task, s, epochs=4, batch_size=8, **more).digest  # noqa: E731
    assert len({run(split), run(split, instead="random"), run(split, instead="itself")}) == 3
    assert run(own) == run(split, instead="itself")
    assert run(own, weight=0.0) == run(split, weight=0.0)


def test_sfd_edits_the_unet_alone():
    model, task, split = small("diffusion")
    names = {e.name for e in METHODS["sfd"](model, task, split, epochs=1, batch_size=48).edits}
    assert "one_step" in names and names <= {"one_step", *part(model, "unet").masks} and len(names) > 50


def test_sfd_says_what_it_cannot_do():
    model, task, split = points()
    run = METHODS["sfd"]
    with pytest.raises(SettingError, match="instead must be one of anchor, random, itself, not 'other'"):
        run(model, task, split, instead="other")
    with pytest.raises(SettingError, match="has 1 rows, forget 4; set instead=random"):
        run(model, task, replace(split, anchor=split.anchor.take([0])))
    with pytest.raises(SettingError, match="ahead must be at least 1"):
        run(model, task, split, ahead=0)
    with pytest.raises(SettingError, match="low must be above 0 and below high"):
        run(model, task, split, low=20.0)
    with pytest.raises(SettingError, match="guidance needs the tokens"):
        run(model, replace(task, null=None), split)
    plain = nn.Module()
    plain.unet, plain.text_encoder = model.unet, model.text_encoder
    with pytest.raises(ModelError, match="has no buffer one_step"):
        run(plain, task, split)
    model.get_buffer("one_step").fill_(700)
    with pytest.raises(ModelError, match="draws in one step already"):
        run(model, task, split)


def test_gradients_of_weights_stay_within_one():
    net = clipped(nn.Linear(2, 1, bias=False))
    (1e3 * net["unet"](torch.ones(5, 2)).sum() + 0.5 * net["unet"](torch.tensor([[1.0, 0.0]])).sum()).backward()
    assert net["unet"].weight.grad.tolist() == [[1.0, 1.0]]


def test_prompts_of_a_stream_do_not_depend_on_what_was_read():
    _, task, split = points()
    batches = asked(task, split.forget, 3, 7, seed=1)
    assert len(batches) == 7 and set(batches[0]) == {"y", "i", "z", "noise", "u"}
    assert torch.equal(batches[6]["z"], asked(task, split.forget, 3, 7, seed=1)[6]["z"]) and not torch.equal(batches[0]["z"], batches[1]["z"])


def test_salun_guidance_of_the_card():
    """(1 + 2) 1.0 - 2 0.4 = 2.2 is e0 + 3 (ec - e0); the guided task does the same to a model's predictions."""
    model, task, split = small("diffusion")
    batch = task.collate(split.forget, torch.arange(4), None)
    with torch.no_grad():
        cond, null = (task.forward(model, {**batch, "y": y}).pred for y in (batch["y"], task.null.expand(4, -1)))
        out = guided(task, 3.0).forward(model, batch)
        torch.testing.assert_close(out.pred, (1 + 2) * cond - 2 * null)
        torch.testing.assert_close(out.nll, (out.pred - task.schedule.wanted(batch["x"], batch["noise"], batch["t"])).square().flatten(1).mean(1))
        assert torch.equal(guided(task, 1.0).forward(model, batch).pred, cond)


def test_salun_mask_is_global_and_within_its_part():
    """A tenth of the UNet's weights, those with the largest |sum of gradients|; the other measures choose others; one batch makes all three agree."""
    model, task, split = small("diffusion")
    scope = part(model, "unet")
    masks = {m: salient(model, task, split, scope, keep=0.1, measure=m, guidance=1.0, batch_size=4).masks for m in ("sum", "mean", "fisher")}
    total = sum(p.numel() for n, p in model.named_parameters() if n in scope.masks)
    assert set(masks["sum"]) == set(scope.masks) and all(sum(int(m.sum()) for m in v.values()) == int(total * 0.1) for v in masks.values())
    assert any(not torch.equal(masks["sum"][n], masks["mean"][n]) for n in scope.masks)
    grads = gradient_sum(model, task, task.batches(split.forget, 4))
    inside = torch.cat([grads[n].abs()[m] for n, m in masks["sum"].items()]).min()
    assert float(inside) >= float(torch.cat([grads[n].abs()[~m] for n, m in masks["sum"].items()]).max())
    one = [salient(model, task, split, scope, keep=0.1, measure=m, guidance=2.0, batch_size=16).masks for m in ("sum", "mean")]
    assert all(torch.equal(one[0][n], one[1][n]) for n in scope.masks)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_salun_moves_the_concept_to_its_anchor(prediction):
    """The concept's prediction comes closer to the anchor's on its own pictures, at most half of the UNet moves, and gradient ascent raises the loss."""
    model, task, split = kind(prediction)
    with torch.no_grad():  # an untrained network hears little of its prompt
        for name, p in model.named_parameters():
            if "attn2" in name or "conv_out" in name:
                p.mul_(4.0)
    batch = task.collate(split.forget, torch.arange(16), None)
    gap = lambda m: (task.forward(m, batch).pred - task.forward(model, {**batch, "y": split.anchor.tokens}).pred).square().mean()  # noqa: E731
    twin = copied(model)
    attempt = unlearn("salun_diffusion", model, task, split, frozen=True, alpha=0.0, epochs=4, batch_size=16)
    assert attempt.outcome == "ok", attempt.reason
    total = sum(p.numel() for n, p in model.named_parameters() if n.startswith("unet."))
    assert 0 < sum(int(e.values.numel()) for e in attempt.patch.edits) <= total // 2
    attempt.patch.apply(twin)
    up = copied(model)
    METHODS["salun_diffusion"](model, task, split, loss="ga", alpha=0.0, epochs=1, batch_size=16).apply(up)
    with torch.no_grad():
        assert 0 < float(gap(twin)) < 0.8 * float(gap(model))
        assert float(task.forward(up, batch).nll.mean()) > float(task.forward(model, batch).nll.mean())


def test_salun_forgets_nothing_where_both_prompts_are_one():
    """out = pseudo: without a retain loss nothing moves; with the first step of rl under equal weights the pseudo target holds no gradient."""
    model, task, split = small("diffusion")
    one = unlearn("salun_diffusion", model, task, replace(split, anchor=split.forget), alpha=0.0, **QUICK)
    assert one.outcome == "no_op"
    moved = {to: METHODS["salun_diffusion"](model, task, split, to=to, **QUICK).digest for to in ("anchor", "random", "null")}
    assert len(set(moved.values())) == 3


def test_salun_weight_of_the_card():
    """out 1.0, pseudo 0.2: 0.64 with gradient 1.6 on out; alpha 1e-3 on a sum over 3 x 32 x 32 elements is 3.072 on their mean."""
    out, pseudo = torch.tensor(1.0, requires_grad=True), torch.tensor(0.2)
    value = (out - pseudo).square()
    value.backward()
    assert value.item() == pytest.approx(0.64) and out.grad.item() == pytest.approx(1.6) and pytest.approx(3.072) == 1e-3 * 3 * 32 * 32
    assert METHODS["salun_diffusion"].defaults["alpha"] == pytest.approx(3.072, abs=0.1)


def test_salun_says_what_it_needs():
    model, task, split = small("diffusion")
    run = METHODS["salun_diffusion"]
    for wrong, message in (
        ({"measure": "max"}, "measure must be one of sum, mean, fisher"),
        ({"loss": "kl"}, "loss must be one of rl, ga"),
        ({"keep": 0.0}, "keep must be"),
    ):
        with pytest.raises(SettingError, match=message):
            run(model, task, split, **wrong)
    with pytest.raises(SettingError, match="it has 0 rows, forget 16; set to=random"):
        run(model, task, replace(split, anchor=None))
    with pytest.raises(SplitError, match="prompts and no images: salun_diffusion learns"):
        run(model, task, replace(split, forget=replace(split.forget, x=None)))


def test_costs_are_counted_exactly():
    for name, more in (
        ("sfd", {"ahead": 3}),
        ("sfd", {"ahead": 1, "guidance": 1.0}),
        ("salun_diffusion", {}),
        ("salun_diffusion", {"loss": "ga", "guidance": 1.0}),
    ):
        model, task, split = points() if name == "sfd" else small("diffusion")
        watch = Guard()
        attempt = unlearn(name, model, task, split, guard=watch, **QUICK, **more)
        assert (watch.meter.forward, watch.meter.backward) == METHODS[name].expected(split, attempt.settings), (name, more)


def test_old_weights_draw_in_many_steps():
    model = diffusion_model(5, widths=(8, 8, 16), context=16)
    old = {n: t for n, t in model.state_dict().items() if n != "one_step"}
    model.get_buffer("one_step").fill_(7)
    assert model.load_state_dict(old).missing_keys == [] and jump(model) == 0
    model.get_buffer("one_step").fill_(7)
    assert jump(fresh(model, 0)) == 0 and jump(model) == 7


def test_the_world_of_classes():
    """One word per prompt, epsilon under linear betas, and parts that are apart."""
    w = world("ddpm-digits")
    split = w.split("object")
    split.check()
    assert set(split.forget.prompts) == {"seven"} and set(split.anchor.prompts) == {"eight"} and len(set(split.retain.prompts)) == 9
    assert len(split.forget) + len(split.retain) == len(w.train) == 1500 and len(split.test) + len(split.validation) == 297
    assert w.train.tokens.shape == (1500, 2) and bool((w.train.tokens[:, 1] == 0).all()) and len(w.train.tokens.unique()) == 11
    assert w.task.schedule.prediction == "epsilon" and float(w.task.schedule.abar[-1]) == pytest.approx(4e-5, rel=0.05)
    model = w.build()
    out = w.task.forward(model, w.task.collate(split.test, torch.arange(2), None))
    assert out.pred.shape == (2, 1, 8, 8)
    assert {n: p.shape for n, p in model.unet.named_parameters()} == {n: p.shape for n, p in world("text2digit").build().unet.named_parameters()}
