"""Gradient surgery on the Gramian, in the loop too; DoCo's discriminator and its resume; all-but-one's two terms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import same, small, state

from expunge.core import journal
from expunge.core.errors import SettingError
from expunge.core.session import Session, scratch
from expunge.engine.run import unlearn
from expunge.methods.diffusion import all_but_one as abo
from expunge.methods.diffusion import doco
from expunge.modalities.diffusion.task import PREDICTIONS, Schedule, diffusion, emptied, predict, states
from expunge.modalities.diffusion.trajectory import Pool, pool
from expunge.modalities.pictures import Pictures
from expunge.parts.updates.combine import RULES, combine, gramian, pulls, rule, weights
from expunge.parts.updates.descend import descend

QUICK = {"steps": 4, "trajectories": 3, "path": 3, "batch_size": 4}
SMALL = {**QUICK, "width": 8}
"""The same with a small critic."""


def three(seed: int = 0) -> list[list[torch.Tensor]]:
    """Three gradients over two tensors, the second and third against the first."""
    g = torch.Generator().manual_seed(seed)
    first = [torch.randn(4, 3, generator=g), torch.randn(5, generator=g)]
    return [first, *([-0.5 * t + torch.randn(t.shape, generator=g) for t in first] for _ in range(2))]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_surgery_of_the_card():
    """g_u = (3, -4), g_r = (0, 2): exact (3, 0), released (3, -3.2), still against g_r; no conflict, no change."""
    u, r = [torch.tensor([3.0, -4.0])], [torch.tensor([0.0, 2.0])]
    torch.testing.assert_close(combine([u, r])[0], torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(combine([u, r], "released")[0], torch.tensor([3.0, -3.2]))
    torch.testing.assert_close(combine([u, r], strength=0.5)[0], torch.tensor([3.0, -2.0]))
    for name in ("project", "released"):
        assert torch.equal(combine([[torch.tensor([3.0, 4.0])], r], name)[0], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("seed", range(5))
def test_a_projected_gradient_does_not_go_against_the_other(seed):
    """Tensor by tensor <g, g_r> is 0 where it was below 0, at any scale of g_r; the released scale is right for gradients of norm 1 alone."""
    u, r, _ = three(seed)
    for scale in (0.01, 1.0, 100.0):
        found = combine([u, [scale * t for t in r]])
        for g, a, b in zip(found, u, r, strict=True):
            before, after = float((a * b).sum()), float((g * b).sum())
            assert after == pytest.approx(max(before, 0.0), abs=1e-5)
    whole = combine([u, r], whole=True)
    assert float(flat(whole) @ flat(r)) == pytest.approx(max(0.0, float(flat(u) @ flat(r))), abs=1e-4)
    unit = [[t / flat(g).norm() for t in g] for g in (u, r)]
    torch.testing.assert_close(flat(combine(unit, "released", whole=True)), flat(combine(unit, whole=True)))


def test_pcgrad_by_hand():
    """The weights on the Gramian give what projecting the vectors themselves gives, for three of them."""
    given = three()
    vectors = [flat(g) for g in given]
    wanted = torch.zeros_like(vectors[0])
    for i, v in enumerate(vectors):
        g = v.clone()
        for j, other in enumerate(vectors):
            if j != i and g @ other < 0:
                g = g - (g @ other) / (other @ other) * other
        wanted += g
    torch.testing.assert_close(flat(combine(given, "pcgrad", whole=True)), wanted)
    assert not torch.allclose(flat(combine(given, "sum")), wanted)
    torch.testing.assert_close(flat(combine(given, "sum")), sum(vectors))
    G = gramian(given)
    torch.testing.assert_close(G, torch.stack(vectors).double() @ torch.stack(vectors).double().T)
    assert weights(G, "pcgrad").shape == (3,)


def test_long_gradients_are_shortened_before_surgery():
    """norm 1: each gradient to length 1 over all its tensors; short ones stay; a gradient of zeros is no conflict."""
    u, r = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([0.3]), torch.tensor([0.4])]
    assert flat(combine([u, r], "sum", norm=1.0)).tolist() == pytest.approx([0.6 + 0.3, 0.8 + 0.4])
    for name in RULES:
        assert torch.equal(flat(combine([u, [torch.zeros(1), torch.zeros(1)]], name)), flat(u))
        assert flat(combine([[torch.zeros(1)], [torch.tensor([2.0])]], name, norm=1.0)).tolist() == [0.0 if name in ("project", "released") else 1.0]
    half = combine([[torch.tensor([3.0, -4.0]).bfloat16()], [torch.tensor([0.0, 2.0]).bfloat16()]])[0]
    assert half.dtype == torch.bfloat16 and half.tolist() == [3.0, 0.0]
    with pytest.raises(SettingError, match="surgery must be one of project, released, pcgrad, sum, not 'bend'"):
        rule("bend")


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0]))


def step(losses, combine_=None, mask=None, batches=range(1)) -> list[float]:
    model = Point()
    session = scratch(model) if mask is None else Session(model, {"w": model.w}, {"w": mask})
    descend(session, lambda k: losses(model.w, k), batches, lr=1.0, **({} if combine_ is None else {"combine": combine_}))
    assert model.w.grad is None
    return (1 - model.w.detach()).tolist()


def test_the_loop_follows_the_combined_gradient():
    """u has gradient (3, -4), r (0, 2): the step is (3, 0); parts of one step are added loss by loss before; masked weights count for nothing."""

    def both(w, _):
        return 3 * w[0] - 4 * w[1], 2 * w[1]

    assert step(both, rule("project")) == [3.0, 0.0] and step(both, rule("sum")) == [3.0, -2.0]
    assert step(lambda w, k: (both(w, k)[k], both(w, k)[1 - k]), rule("project"), batches=[[0, 1]]) == [3.0, -2.0]  # no conflict: equal sums
    assert step(both, rule("project"), batches=[[0, 0]]) == [6.0, 0.0]
    assert step(both, rule("project"), torch.tensor([True, False])) == [3.0, 0.0]
    skew = [[torch.tensor([-1.0, 5.0])], [torch.tensor([1.0, 1.0])]]
    assert step(lambda w, _: (5 * w[1] - w[0], w.sum()), rule("project")) == combine(skew)[0].tolist() == [-1.0, 5.0]
    assert step(lambda w, _: (5 * w[1] - w[0], w.sum()), rule("project"), torch.tensor([True, False])) == [0.0, 0.0]


def test_the_sum_rule_is_the_plain_loop():
    """Adam on two losses by rule `sum` takes the path of their sum; losses without a gradient move nothing, and leave Adam's count where it is."""

    def loss(w, k):
        return (w - k).square().sum(), w.prod()

    plain, ruled = Point(), Point()
    a = descend(scratch(plain), lambda k: sum(loss(plain.w, k)), range(4), lr=0.1, optimizer="adam")
    b = descend(scratch(ruled), lambda k: loss(ruled.w, k), range(4), lr=0.1, optimizer="adam", combine=rule("sum"))
    assert torch.allclose(plain.w, ruled.w) and a == pytest.approx(b)
    idle = Point()
    seen = descend(scratch(idle), lambda k: (idle.w.sum().detach() + k,), range(3), lr=0.1, optimizer="adamw", combine=rule("project"))
    assert idle.w.tolist() == [1.0, 1.0] and seen == [2.0, 3.0, 4.0]


def test_gradients_reach_the_weights_that_are_asked_for_alone():
    """A network that the loss passes through gets no .grad, and shared graphs are read twice."""
    through, w = nn.Linear(2, 1), torch.tensor([1.0, 2.0], requires_grad=True)
    shared = through(w * w)
    (a,), (b,), (c,) = pulls([shared.sum(), (2 * shared).sum(), torch.tensor(3.0)], [w])
    assert torch.allclose(2 * a, b) and not c.any() and all(p.grad is None for p in through.parameters()) and w.grad is None


@pytest.mark.parametrize(("side", "levels"), [(4, 1), (8, 2), (16, 3), (64, 4)])
def test_the_critic_fits_the_image(side, levels):
    critic = doco.Critic(3, side, 8)
    x = torch.randn(2, 3, side, side)
    out = critic(x, torch.tensor([10.0, 900.0]))
    assert out.shape == (2, 1, side // 2**levels, side // 2**levels)
    assert not torch.allclose(out, critic(x, torch.tensor([900.0, 10.0])))
    assert torch.allclose(out[:1], critic(x[:1], torch.tensor([10.0])), atol=1e-5)  # no statistics of the batch


def critics() -> tuple[doco.Critic, doco.Critic]:
    torch.manual_seed(0)
    a, b = doco.Critic(1, 8, 8), doco.Critic(1, 8, 8)
    b.load_state_dict(a.state_dict())
    return a, b


def test_the_critic_learns_from_its_own_loss_alone():
    """Card: the released D also steps on the gradient that L_G left in it. Here a step after L_G is the step without it; with it D would move elsewhere."""
    g = torch.Generator().manual_seed(1)
    real, fake, t = torch.randn(4, 1, 8, 8, generator=g), torch.randn(4, 1, 8, 8, generator=g), torch.full((4,), 500.0)
    clean, after = critics()
    steps = [doco.stepper_of(c, 1e-2) for c in (clean, after)]
    first = float(doco.taught(clean, steps[0], real, fake, t))
    doco.called(after(fake, t), 0.0).backward()
    left = [p.grad.clone() for p in after.parameters() if p.grad is not None]
    assert left and any(bool(v.any()) for v in left)
    assert float(doco.taught(after, steps[1], real, fake, t)) == first
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(after.parameters(), clean.parameters(), strict=True))
    later = [float(doco.taught(clean, steps[0], real, fake, t)) for _ in range(60)]
    assert later[-1] < 0.2 < first and clean(fake, t).mean().item() > 0 > clean(real, t).mean().item()


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_concept_is_drawn_towards_the_anchor_by_the_gradient(kind):
    """Steps on p along L_G's gradient bring the critic's call towards the anchor, for every prediction."""
    g = torch.Generator().manual_seed(2)
    s, (critic, _) = Schedule(kind), critics()
    t, xt = torch.full((4,), 400.0), torch.randn(4, 1, 8, 8, generator=g)
    p, a = (0.5 * torch.randn(4, 1, 8, 8, generator=g) for _ in range(2))
    stepper = doco.stepper_of(critic, 1e-2)
    for _ in range(30):
        doco.taught(critic, stepper, s.parted(xt, a, t)[0], s.parted(xt, p, t)[0], t)
    p.requires_grad_()
    before = doco.called(critic(s.parted(xt, p, t)[0], t), 0.0)
    (slope,) = torch.autograd.grad(before, p)
    assert doco.called(critic(s.parted(xt, p - 0.05 * slope / slope.norm(), t)[0], t), 0.0).item() < before.item()


@pytest.mark.parametrize("at", [1, 3])
def test_doco_resumes_with_its_critic(at, tmp_path, monkeypatch):
    """Killed in the warm-up and after it: the same bits. Without the critic in the checkpoint the result is another (the control)."""
    model, task, split = small("diffusion")
    options = {**SMALL, "warmup": 0.5, "critic_lr": 0.05}
    whole = unlearn("doco", model, task, split, seed=2, **options)
    go = journal.Journal.step

    def resumed(folder) -> str:
        def killed(self, session, stepper, losses, watch, done):
            go(self, session, stepper, losses, watch, done)
            if done == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(journal.Journal, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            unlearn("doco", model, task, split, seed=2, folder=folder, checkpoint_every=1, **options)
        monkeypatch.setattr(journal.Journal, "step", go)
        return unlearn("doco", model, task, split, seed=2, folder=folder, checkpoint_every=1, **options).patch.digest

    before = state(model)
    assert resumed(tmp_path / "a") == whole.patch.digest and same(before, state(model))
    monkeypatch.setattr(doco, "hidden", lambda *_: {})
    assert resumed(tmp_path / "b") != whole.patch.digest
    assert {e.name for e in whole.patch.edits} <= {n for n, _ in model.named_parameters()}


def test_surgery_warm_up_and_prior_change_doco():
    """Every rule gives another patch; images as prior need images; the warm-up takes no backward passes."""
    model, task, split = small("diffusion")
    runs = {s: unlearn("doco", model, task, split, surgery=s, alpha=3.0, **SMALL) for s in RULES}
    assert all(r.outcome == "partial" for r in runs.values()) and len({r.patch.digest for r in runs.values()}) == len(RULES)
    assert unlearn("doco", model, task, split, prior="images", **SMALL).outcome == "partial"
    late = unlearn("doco", model, task, split, warmup=0.75, **SMALL)
    early = unlearn("doco", model, task, split, warmup=0.0, **SMALL)
    assert early.meter.backward > 3 * late.meter.backward > 0
    for wrong, match in (({"prior": "none"}, "prior must be one of outputs, images"), ({"warmup": 1.0}, "warmup in"), ({"surgery": "cut"}, "surgery must be")):
        assert match in unlearn("doco", model, task, split, **wrong).reason
    names = replace(split, retain=replace(split.retain, x=None), test=None, validation=None)
    assert "prompts alone" in unlearn("doco", model, task, names, prior="images", **SMALL).reason
    short = unlearn("doco", model, task, replace(split, anchor=split.anchor.take([0])), **SMALL)
    assert short.outcome == "refused" and "row by row" in short.reason


def test_replaced_guidance_of_the_card():
    """u* = (0.1, 0.2), e*(c) = (0.5, -0.2), e*(a) = (0.2, 0.6); an empty alternative asks for u*; rescaled guidance has the concept's length."""
    u, c, a = (torch.tensor([v]) for v in ([0.1, 0.2], [0.5, -0.2], [0.2, 0.6]))
    torch.testing.assert_close(abo.replaced(u, c, a), a)
    torch.testing.assert_close(abo.replaced(u, c, u), u)
    torch.testing.assert_close(abo.replaced(u, c, u, rescale=True), u)
    g = abo.replaced(u, c, a, rescale=True) - u
    torch.testing.assert_close(g, torch.tensor([[0.137199, 0.548796]]), atol=1e-6, rtol=0)
    assert float(g.norm()) == pytest.approx(0.565685, abs=1e-6) and float((a - u).norm()) == pytest.approx(0.412311, abs=1e-6)


class Linear(nn.Module):
    """e(x, t, y) is a free vector per prompt."""

    def __init__(self, cond: list[float], null: list[float]) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.tensor([null, cond]))
        self.text_encoder = lambda y: y
        self.unet = lambda x, t, encoder_hidden_states: self.e[encoder_hidden_states[:, 0]].view(-1, 1, 1, 2)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_guidance_loss_cannot_be_met_by_moving_the_unconditional_prediction(lam):
    """Card: where u has moved to e(c), L_guid gives u no gradient, and L_unc = 0.16."""
    model, task = Linear([0.5, -0.2], [0.5, -0.2]), diffusion(null=torch.tensor([0]), shape=(1, 1, 2))
    u = torch.tensor([0.1, 0.2]).view(1, 1, 1, 2)
    batch = {"xt": torch.zeros(1, 1, 1, 2), "t": torch.zeros(1), "y": torch.tensor([[1]]), "i": torch.tensor([0]), "cond": u, "null": u}
    value = abo.guided(task, model, batch, lam)
    assert value.item() == pytest.approx(0.16 * lam, abs=1e-6)  # a = "": g(c) = 0 holds, for the wrong reason, which L_unc alone sees
    away = {**batch, "cond": torch.tensor([0.2, 0.6]).view(1, 1, 1, 2)}
    (slope,) = torch.autograd.grad(abo.guided(task, model, away, lam).sum(), model.e)
    assert torch.allclose(slope[0], lam * torch.tensor([0.4, -0.4])) and bool(slope[1].any())


def test_alternatives_are_the_frozen_models_under_the_anchors_prompts():
    """Targets stand state by state: e*(x_t, t, a) of the row that goes with the state's prompt; the empty prompt gives u* back."""
    model, task, split = small("diffusion")
    gone, found = pool(model, task, split.forget, 4, guidance=2.0, steps=2, seed=0)
    tokens = abo.counterparts(gone, split.forget, split.anchor)
    texts = dict(zip(split.forget.prompts, split.anchor.prompts, strict=True))
    assert torch.equal(tokens, split.forget.encode([texts[p] for p in gone.prompts])) and not torch.equal(tokens, gone.tokens)
    empty = split.forget.encode([""])[0]
    with torch.no_grad():
        wanted = predict(model, found.xt, found.t, states(model, tokens[found.i]))
    torch.testing.assert_close(abo.under(model, task, found, tokens), wanted)
    torch.testing.assert_close(abo.under(model, task, found, emptied(gone, empty).tokens), found.null, atol=1e-5, rtol=1e-5)
    late = abo.upto(found, 0.5)
    assert isinstance(late, Pool) and len(late) == 4 and float(late.t.max()) <= 500
    with pytest.raises(SettingError, match=r"no state of the trajectories lies at 0.1 of the noise time"):
        abo.upto(found, 0.1)


def test_all_but_one_with_and_without_an_anchor():
    model, task, split = small("diffusion")
    runs = [unlearn("all_but_one", model, task, part, **QUICK) for part in (split, replace(split, anchor=None))]
    runs += [unlearn("all_but_one", model, task, split, **QUICK, **more) for more in ({"rescale": True}, {"latest": 0.7}, {"lam": 0.0}, {"alpha": 1.0})]
    assert all(r.outcome == "partial" for r in runs) and len({r.patch.digest for r in runs}) == len(runs)
    assert runs[4].meter.backward < runs[0].meter.backward < runs[5].meter.backward
    names = Pictures(None, split.forget.tokens, split.forget.ids, split.forget.rows, split.forget.encode)
    assert unlearn("all_but_one", model, task, replace(split, forget=names), **{**QUICK, "trajectories": 5}).outcome == "ok"
    assert "latest above 0" in unlearn("all_but_one", model, task, split, latest=0.0).reason
    assert "row by row" in unlearn("all_but_one", model, task, replace(split, anchor=split.anchor.take([0])), **QUICK).reason
