"""TRCE and MACE: alignment of prompts, closed forms, hinge, attention maps and their adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from worlds import copied, small

from expunge.core import journal
from expunge.core.errors import ModelError, SettingError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import Split
from expunge.engine.run import unlearn
from expunge.methods.diffusion import mace, trce
from expunge.modalities.diffusion.task import PREDICTIONS, Schedule, diffusion, emptied, predict, states
from expunge.parts.scopes.lora import linears
from expunge.parts.updates.ridge import Ridge, redirect

SHORT = {"steps": 3, "trajectories": 3, "path": 4, "batch_size": 4}


def prompted(split: Split, forget: list[str], anchor: list[str]) -> Split:
    """The request with these prompts instead."""
    take = range(len(forget))
    return replace(split, forget=split.forget.take(take).prompted(forget), anchor=split.anchor.take(range(len(anchor))).prompted(anchor))


def moved(patch, model) -> nn.Module:
    patch.apply(twin := copied(model))
    return twin


def test_redirect_is_the_minimum():
    """The gradient of sum w ||W' c - W g||^2 + lam ||W' - W||^2 vanishes at what is written."""
    draw = torch.Generator().manual_seed(0)
    W, c, g, r = (torch.randn(*s, generator=draw, dtype=torch.double) for s in ((5, 4), (3, 4), (3, 4), (6, 4)))
    new = W.clone()
    redirect([new], [(c, g, 0.7), (r, r, 0.2)], lam=0.3)
    x = new.clone().requires_grad_()
    value = 0.7 * (c @ x.T - g @ W.T).square().sum() + 0.2 * (r @ x.T - r @ W.T).square().sum() + 0.3 * (x - W).square().sum()
    assert float(torch.autograd.grad(value, x)[0].abs().max()) < 1e-10
    assert torch.equal(new, Ridge([(c, 0.7), (r, 0.2)], 0.3).edit(W, [g @ W.T, r @ W.T]))


def test_shared_words_and_ends_are_matched():
    """Same words before and after the difference; end tokens in order, the last one for those that the longer prompt has not."""
    same = torch.tensor([[5, 7, 0, 0]])
    assert trce.matched(same, same).tolist() == [[0, 1, 2, 3]]
    assert trce.matched(torch.tensor([[7, 7, 0, 0]]), torch.tensor([[7, 0, 0, 0]])).tolist() == [[0, -1, 1, 2]]
    assert trce.matched(torch.tensor([[7, 0, 0, 0]]), torch.tensor([[8, 9, 6, 0]])).tolist() == [[-1, 3, 3, 3]]
    clip = torch.tensor([[9, 1, 2, 3, 8, 8, 8]]), torch.tensor([[9, 1, 4, 8, 8, 8, 8]])  # start 9, end 8, as CLIP pads
    assert trce.ends(clip[0]).tolist() == [4] and trce.matched(*clip).tolist() == [[0, 1, -1, -1, 3, 4, 5]]
    assert trce.ends(torch.zeros(1, 4, dtype=torch.long)).tolist() == [0]


def test_what_the_first_stage_maps():
    """Bad (5, 7, end, end) to safe (5, end, end, end): each kind of state with its weight, shared by the pairs."""
    bad, safe = torch.tensor([[5, 7, 0, 0], [5, 7, 0, 0]]), torch.tensor([[5, 0, 0, 0], [5, 0, 0, 0]])
    c, g = torch.arange(8.0).view(2, 4, 1), 10 + torch.arange(8.0).view(2, 4, 1)
    groups = trce.targets(c, g, bad, safe, trce.matched(bad, safe), (1.0, 2.0, 3.0, 4.0))
    assert [(x.flatten().tolist(), y.flatten().tolist(), w) for x, y, w in groups] == [
        ([0, 4], [10, 14], 0.5), ([2, 6], [11, 15], 1.0), ([3, 7], [13, 17], 1.5), ([1, 5], [13, 17], 2.0),
    ]  # fmt: skip
    assert [w for *_, w in trce.targets(c, g, bad, safe, trce.matched(bad, safe), (0.0, 1.0, 0.0, 0.0))] == [0.5]
    longer = torch.tensor([[7, 0, 0, 0]])  # two end tokens after the first: weight 2 as the root on both sides
    ((x, y, _),) = trce.targets(c[:1], g[:1], longer, longer, trce.matched(longer, safe[:1]), (0.0, 0.0, 1.0, 0.0))
    assert float(x) == pytest.approx(3 * 2**0.5) and float(y) == pytest.approx(13 * 2**0.5)


def test_first_stage_moves_the_end_and_keeps_the_rest():
    """The keys at the first end token are the safe prompt's, those of retained prompts almost stay; self-attention and queries are untouched."""
    model, task, split = small("diffusion")
    patch = METHODS["trce"](model, task, split, steps=0)
    assert {e.name for e in patch.edits} == {n for n, _ in model.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
    twin = moved(patch, model)
    asked = trce.beside(model, task, split)
    with torch.no_grad():
        rows = torch.arange(len(asked.bad))
        c, g = asked.c[rows, trce.ends(asked.words)], asked.g[rows, trce.ends(asked.safe)]
        r = states(model, split.retain.tokens).flatten(0, 1)
        for e in patch.edits:
            W, new = dict(model.named_parameters())[e.name], dict(twin.named_parameters())[e.name]
            assert float((c @ new.T - g @ W.T).norm()) < 0.2 * float((c @ W.T - g @ W.T).norm())
            assert float((r @ new.T - r @ W.T).norm() / (r @ W.T).norm()) < 0.1


def test_hinge_of_the_card():
    """safe 0.2, bad 1, empty 0, G 15: pref 3.2, rej 16; nothing at 3.2 and 1.0, the margin at 9.6; slope 2 (rej - pref) = 25.6 where it is active."""
    good, bad, empty = 0.2, 1.0, 0.0
    pref, rej = (torch.tensor([[v + 15 * (v - empty)]]) for v in (good, bad))
    assert float(pref) == pytest.approx(3.2) and float(rej) == 16.0
    for at, value in ((3.2, 0.0), (1.0, 0.0), (9.6, 0.01)):
        assert float(trce.hinge(torch.tensor([[at]]), pref, rej, 1.0, 0.01)) == pytest.approx(value, abs=1e-4)
    for at in (9.7, 30.0):
        n = torch.tensor([[at]], requires_grad=True)
        (slope,) = torch.autograd.grad(trce.hinge(n, pref, rej, 1.0, 0.01).sum(), n)
        assert float(slope) == pytest.approx(25.6, rel=1e-4)
    assert float(trce.hinge(torch.tensor([[16.0]]), pref, rej, 0.5, 0.0)) == pytest.approx(0.5 * 12.8**2, rel=1e-4)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_contrasts_are_the_frozen_models_guided_predictions(kind):
    """At early states alone: safe + G (safe - empty) and bad + G (bad - empty), for every prediction."""
    model, _, split = small("diffusion")
    task: Any = diffusion(Schedule(kind), shape=(1, 8, 8), null=torch.zeros(8, dtype=torch.long))
    gone, at = trce.contrasts(model, task, split, 15.0, 0.5, 3.0, 3, 4, seed=0)
    assert len(at) == 6 and set(at.t.tolist()) == set(task.schedule.path(4)[:2].tolist())
    anchors = {f.numpy().tobytes(): a for f, a in zip(split.forget.tokens, split.anchor.tokens, strict=True)}
    safe = torch.stack([anchors[gone.tokens[k].numpy().tobytes()] for k in at.i.tolist()])
    with torch.no_grad():
        s, b, u = (predict(model, at.xt, at.t, states(model, y)) for y in (safe, gone.tokens[at.i], emptied(gone, task.null).tokens[at.i]))
    torch.testing.assert_close(at.cond, s + 15 * (s - u), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(at.null, b + 15 * (b - u), atol=1e-4, rtol=1e-4)


def test_second_stage_trains_self_attention_and_queries():
    model, task, split = small("diffusion")
    first, both = (METHODS["trce"](model, task, split, **{**SHORT, "steps": n}) for n in (0, 3))
    values = {e.name: e.values for e in both.edits}
    assert all(torch.equal(values[e.name], e.values) for e in first.edits)
    assert {n for n in values if n not in {e.name for e in first.edits}} == {n for n, _ in model.named_parameters() if "attn1." in n or "attn2.to_q" in n}


def test_second_stage_alone_and_with_retained_prompts():
    """Without weights the first stage is left out; alpha adds passes as declared, and another result."""
    model, task, split = small("diffusion")
    alone = METHODS["trce"](model, task, split, end=0.0, **SHORT)
    assert 0 <= alone.meta["active"] <= 1
    assert not any("attn2.to_k" in e.name or "attn2.to_v" in e.name for e in alone.edits)
    watch = Guard()
    kept = unlearn("trce", model, task, split, guard=watch, alpha=5.0, **SHORT)
    assert (watch.meter.forward, watch.meter.backward) == METHODS["trce"].expected(split, kept.settings)
    assert kept.patch.digest != METHODS["trce"](model, task, split, **SHORT).digest
    assert unlearn("trce", model, task, split, end=0.0, steps=0).outcome == "no_op"


def test_the_share_of_active_hinges_survives_a_stop(tmp_path, monkeypatch):
    """Stopped after two of three updates: the share is that of all three, and the patch's meta data are those of the whole run."""
    model, task, split = small("diffusion")
    shares = iter((1.0, 0.0, 0.0))
    monkeypatch.setattr(trce, "hinge", lambda n, *_: n.square().flatten(1).mean(1) * next(shares))
    whole = unlearn("trce", model, task, split, seed=1, **SHORT)
    shares = iter((1.0, 0.0, 0.0))
    go = journal.Journal.step

    def killed(self, session, stepper, losses, watch, done):
        go(self, session, stepper, losses, watch, done)
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        unlearn("trce", model, task, split, seed=1, folder=tmp_path, checkpoint_every=1, **SHORT)
    monkeypatch.setattr(journal.Journal, "step", go)
    again = unlearn("trce", model, task, split, seed=1, folder=tmp_path, checkpoint_every=1, **SHORT)
    assert whole.patch.meta["active"] == pytest.approx(1 / 3, abs=1e-4)
    assert again.patch.meta == whole.patch.meta and again.patch.digest == whole.patch.digest
    assert trce.ACTIVE not in dict(model.named_buffers()) and not any(e.name == trce.ACTIVE for e in whole.patch.edits)


def test_trce_without_preserved_states_is_not_determined():
    model, task, split = small("diffusion")
    with pytest.raises(SettingError, match="set lam above 0"):
        METHODS["trce"](model, task, split, preserve=0.0, lam=0.0, steps=0)
    assert METHODS["trce"](model, task, split, preserve=0.0, steps=0).edits


@pytest.mark.parametrize("name", ["trce", "mace"])
def test_anchors_that_do_not_fit_are_refused(name):
    model, task, split = small("diffusion")
    with pytest.raises(SettingError, match="row by row"):
        METHODS[name](model, task, replace(split, anchor=split.anchor.take([0])))
    with pytest.raises(SettingError, match="name another concept"):
        METHODS[name](model, task, replace(split, anchor=split.forget))


def test_settings_out_of_range_are_refused():
    model, task, split = small("diffusion")
    for name, settings, said in (
        ("trce", {"guidance": 1.0}, "guidance 1 draws without"),
        ("trce", {"early": 0.0}, "early must be above 0"),
        ("mace", {"mask": 1.0}, "mask must be at least 0 and below 1"),
    ):
        with pytest.raises(SettingError, match=said):
            METHODS[name](model, task, split, **settings)


def test_frobenius_of_the_card():
    """[[0.3, 0.4], [0, 0]] has norm 0.5; tokens and places that are left out do not count; heads are taken together."""
    probs, both = torch.tensor([[0.3, 0.4], [0.0, 0.0]])[None, None], torch.tensor([[True, True]])
    assert float(mace.frobenius(probs, both, both)) == pytest.approx(0.5)
    assert float(mace.frobenius(probs, torch.tensor([[True, False]]), both)) == pytest.approx(0.3)
    assert float(mace.frobenius(probs, both, torch.tensor([[False, True]]))) == 0.0
    assert float(mace.frobenius(torch.cat([probs, probs], 1), both, both)) == pytest.approx(0.5 * 2**0.5)


def test_importance_of_the_card():
    """0.9866 at its peak 300, 0.5 at 200 and 400, almost nothing at 0 and 999."""
    f = mace.importance(torch.arange(1000.0))
    assert int(f.argmax()) == 300 and float(f[300]) == pytest.approx(0.9866, abs=5e-5)
    assert float(f[200]) == pytest.approx(0.5, abs=1e-4) and float(f[400]) == pytest.approx(0.5, abs=1e-4) and max(float(f[0]), float(f[999])) < 1e-4


def test_attention_maps_are_those_of_the_layers():
    """Probabilities rebuilt from hooks give the layer's own output; hooks are gone after."""
    model, task, split = small("diffusion")
    layer: Any = model.get_submodule("unet.down_attentions.1.attn2")
    kept = {}
    hook = layer.register_forward_hook(lambda m, inputs, output: kept.update(context=inputs[1], output=output))
    batch = {"xt": split.forget.x[:3], "t": torch.full((3,), 300.0), "y": split.forget.tokens[:3], "i": torch.arange(3)}
    with torch.no_grad(), mace.watched(model) as seen:
        task.forward(model, batch)
        probs = dict(zip(seen, mace.probabilities(model, seen), strict=True))["unet.down_attentions.1.attn2"]
        v = layer.to_v(kept["context"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        torch.testing.assert_close(layer.to_out[0]((probs @ v).transpose(1, 2).flatten(2)), kept["output"], atol=1e-5, rtol=1e-5)
    hook.remove()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert len(seen) == 4 and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ModelError, match="no cross-attention named attn2"), mace.watched(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("mask", [0.0, 0.5])
def test_adapters_turn_attention_away(mask):
    """After more steps the norm of the attention to the concept's words is smaller, and the model is what it was."""
    model, task, split = small("diffusion")
    bad, *_, to = trce.beside(model, task, split)
    g = torch.Generator().manual_seed(0)
    y, n = bad.tokens[[0, 1, 2, 3]], 4
    batch = {"xt": torch.randn(n, 1, 8, 8, generator=g), "t": torch.full((n,), 300.0), "y": y, "i": torch.arange(n), "own": (to < 0)[:4]}
    names = [f"{n}.weight" for n in linears(model, r"unet\..*attn2\.(to_k|to_v)$")]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def attention(net: nn.Module) -> float:
        with torch.no_grad(), mace.watched(net) as seen:
            task.forward(net, batch)
            return sum(float(mace.frobenius(p, batch["own"], torch.ones(p.shape[0], p.shape[2])).mean()) for p in mace.probabilities(net, seen))

    moved_by = mace.suppressed(model, task, [batch] * 15, names, 1, mask, 0.03)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(int(torch.linalg.matrix_rank(d, rtol=1e-4)) == 1 for d in moved_by.values())
    twin = copied(model)
    with torch.no_grad():
        for name, d in moved_by.items():
            dict(twin.named_parameters())[name].add_(d)
    assert attention(twin) < 0.95 * attention(model)


def test_refinement_moves_the_words_around_and_not_the_concepts_own():
    """Without adapters: keys at the end tokens are the anchor's where the concept's prompt differs; one problem for all layers."""
    model, task, split = small("diffusion")
    patch = METHODS["mace"](model, task, split, steps=0, preserve=0.0, lam=1e-6)
    twin = moved(patch, model)
    *_, c, g, to = trce.beside(model, task, split)
    with torch.no_grad():
        rest = to >= 0
        for e in patch.edits:
            W, new = dict(model.named_parameters())[e.name], dict(twin.named_parameters())[e.name]
            assert float((c @ new.T - g @ W.T)[rest].norm()) < 0.3 * float((c @ W.T - g @ W.T)[rest].norm())
            assert float((c @ new.T - g @ W.T)[~rest].norm()) > 0.6 * float((c @ W.T - g @ W.T)[~rest].norm())


def test_two_concepts_two_adapters():
    """Prompts with other own words are other concepts: each gets its trajectories, and they are fused into one edit per matrix."""
    model, task, split = small("diffusion")
    two = prompted(split, ["a seven", "the seven", "a three"], ["a eight", "the eight", "a eight"])
    bad, *_, to = trce.beside(model, task, two)
    assert [k.tolist() for k in mace.concepts(bad.tokens, to < 0)] == [[0, 1], [2]]
    alone, both = Guard(), Guard()
    unlearn("mace", model, task, replace(two, forget=two.forget.take([0]), anchor=two.anchor.take([0])), guard=alone, **SHORT)
    attempt = unlearn("mace", model, task, two, guard=both, **SHORT)
    assert (alone.meter.forward, alone.meter.backward) == METHODS["mace"].expected(two, attempt.settings)  # what is declared is the cost of one
    assert both.meter.forward == 2 * alone.meter.forward and both.meter.backward == 2 * alone.meter.backward > 0
    assert len({e.name for e in attempt.patch.edits}) == len(attempt.patch.edits)


def test_fusion_gives_each_concept_its_own_adapter(monkeypatch):
    """With a small lam and nothing preserved the edit is W' + D_i on the states of concept i's prompts, for two adapters D_i that are made up here."""
    model, task, split = small("diffusion")
    two = prompted(split, ["a seven", "a three"], ["a eight", "a eight"])
    settings = {**SHORT, "preserve": 0.0, "lam": 1e-8}
    refined = {e.name: e.values.double() for e in METHODS["mace"](model, task, two, **{**settings, "steps": 0}).edits}
    made: list[dict[str, torch.Tensor]] = []

    def adapter(_model, _task, _batches, names, *_):
        g = torch.Generator().manual_seed(len(made))
        made.append({n: 0.1 * torch.randn(refined[n].shape, generator=g, dtype=torch.double) for n in names})
        return made[-1]

    monkeypatch.setattr(mace, "suppressed", adapter)
    fused = {e.name: e.values.double() for e in METHODS["mace"](model, task, two, **settings).edits}
    c = trce.beside(model, task, two).c.double()
    assert len(made) == 2
    for name, W in refined.items():
        for k, x in enumerate(c[:, 1:]):  # place 0 is one state that both concepts ask for
            wanted = x @ (W + made[k][name]).T
            assert float((x @ fused[name].T - wanted).norm()) < 0.1 * float((x @ W.T - wanted).norm())


def test_mask_and_times_change_what_is_learned():
    model, task, split = small("diffusion")
    found = [METHODS["mace"](model, task, split, **SHORT, **s).digest for s in ({}, {"focus": True}, {"mask": 0.99})]
    assert len(set(found)) == 3
