"""SPM and its guard: the cases of the card, a gate that is closed to the bit, stacking, copies, files, and what the guard does not hide."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import copied, same, small, state

from expunge.core.edits import Hook
from expunge.core.errors import ModelError, PatchError, ScopeError, SettingError, SplitError
from expunge.core.hooks import WRAPS, Guarded, attach, bare, guards
from expunge.core.patch import Patch
from expunge.core.registry import METHODS
from expunge.core.types import concat
from expunge.engine.run import unlearn
from expunge.methods.diffusion import spm
from expunge.methods.diffusion.esd import negated
from expunge.modalities.diffusion.guards.permeable import cosine, overlap
from expunge.modalities.diffusion.task import PREDICTIONS, Schedule, diffusion, draw, predict, states
from expunge.modalities.diffusion.trajectory import pool, squared
from expunge.parts.adapters import adapt, product

QUICK: dict[str, Any] = {"steps": 6, "trajectories": 3, "path": 3, "batch_size": 8, "lr": 0.1}


def request(word: str):
    """The small world with another digit to go: its model, task and split."""
    model, task, split = small("diffusion")
    everything = concat(split.forget, split.retain)
    mine = torch.tensor([row["object"] == word for row in everything.rows])
    forget = everything.take(mine.nonzero().squeeze(1))
    return model, task, replace(split, forget=forget, retain=everything.take((~mine).nonzero().squeeze(1)), anchor=None)


@functools.cache
def patch(word: str = "seven") -> Patch:
    model, task, split = request(word)
    return METHODS["spm"](model, task, split, **QUICK)


def guarded(word: str = "seven"):
    model, task, split = request(word)
    patch(word).apply(model)
    return model, task, split


def predicting(kind: str, task: Any):
    """The same task for a model that predicts something else."""
    return diffusion(Schedule(kind), shape=(1, 8, 8), null=task.null)


def gammas(model: nn.Module, tokens: torch.Tensor) -> list[list[float]]:
    """gamma of each prompt, guard by guard."""
    return [[round(v, 4) for v in WRAPS["permeable"].gate(model, it, tokens, tokens)[0].tolist()] for it in guards(model).values()]


def one_layer(*pairs: tuple[list[float], list[float]]) -> tuple[nn.Module, list[Guarded]]:
    """The identity of two inputs with adapters (down, up)."""
    first = nn.Linear(2, 2, bias=False)
    first.weight.data = torch.eye(2)
    layer = nn.Sequential(first)
    hung = [Guarded(Hook(f"g{k}", "permeable", {"0.down": torch.tensor([d]), "0.up": torch.tensor([u]).T}, {"scale": 1.0})) for k, (d, u) in enumerate(pairs)]
    for it in hung:
        adapt(layer, it)
    return layer, hung


def test_adapters_of_the_card():
    """One adapter at gates 0, 1/2, 1; two at (1/2, 1): the sum of each by its own gate, without cross terms."""
    x = torch.tensor([[1.0, 2.0]])
    layer, (it,) = one_layer(([1.0, 1.0], [0.1, -0.2]))
    for g, wanted in ((0.0, (1.0, 2.0)), (0.5, (1.15, 1.7)), (1.0, (1.3, 1.4))):
        it.now = {"weight": torch.tensor([g])}
        torch.testing.assert_close(layer(x), torch.tensor([wanted]))
    layer, (a, b) = one_layer(([1.0, 1.0], [0.1, -0.2]), ([1.0, -1.0], [0.3, 0.1]))
    a.now, b.now = {"weight": torch.tensor([0.5])}, {"weight": torch.tensor([1.0])}
    torch.testing.assert_close(layer(x), torch.tensor([[0.85, 1.6]]))


def test_rows_are_weighted_one_by_one():
    layer, (it,) = one_layer(([1.0, 1.0], [0.1, -0.2]))
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.1, 0.7]])
    it.now = {"weight": torch.tensor([1.0, 0.5, 0.0])}
    found = layer(x)
    torch.testing.assert_close(found[:2], torch.tensor([[1.3, 1.4], [1.15, 1.7]]))
    assert torch.equal(found[2], x[2])


@pytest.mark.parametrize(("stride", "padding", "side"), [(1, 1, 3), (2, 0, 3), (1, "same", 3), (1, 0, 1)])
def test_a_convolution_is_adapted_as_its_weight_would_be(stride, padding, side):
    layer = nn.Conv2d(3, 5, side, stride=stride, padding=padding)
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*s, generator=g) for s in ((2, 3, 8, 8), (5, 2), (2, 3 * side * side)))
    wanted = F.conv2d(x, (up @ down).view_as(layer.weight), None, stride, padding)
    torch.testing.assert_close(product(layer, x, up, down), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_new_adapter_changes_nothing(kind):
    """Card: with B = 0, L_anchor is 0 and L_erase is the frozen model's own, whatever is predicted; then both move."""
    model, task, split = small("diffusion")
    task = predicting(kind, task)
    gone, found = pool(model, task, split.forget, 3, guidance=3.0, steps=3, seed=0)
    b = found.batches(gone, 9, 1, 0)[0]
    before, c = state(model), states(model, gone.tokens).detach()[b["i"]]
    with torch.random.fork_rng(devices=[]), spm.adapters(model, "attentions", 1) as (e, it):
        torch.manual_seed(0)
        fake = spm.surrogates(c.repeat(2, 1, 1))
        erase, anchor = spm.losses(task, model, it, b, c, fake, 1.0)
        with torch.no_grad():
            frozen = squared(task, model, b, negated(b["null"], b["cond"], 1.0)).mean()
        assert float(anchor.detach()) < 1e-10 and float(erase.detach()) == pytest.approx(float(frozen), rel=1e-5) and float(frozen) > 0
        with torch.no_grad():
            for name, p in e.params.items():
                p.fill_(0.3) if name.endswith(".up") else p.fill_(0.1)
        moved, held = spm.losses(task, model, it, b, c, fake, 1.0)
        assert float(held.detach()) > 1e-6 and abs(float(moved.detach()) / float(frozen) - 1) > 1e-3
    assert same(before, state(model))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_it_learns_to_point_away(kind):
    """On the concept's own prompts the erasing loss of the guarded model falls, for all three predictions; the taken target is ESD's."""
    model, task, split = small("diffusion")
    task = predicting(kind, task)
    gone, found = pool(model, task, split.forget, 3, guidance=3.0, steps=3, seed=0)
    b = found.batches(gone, 9, 1, 0)[0]
    target = negated(b["null"], b["cond"], 1.0)
    twin = copied(model)
    METHODS["spm"](model, task, split, **{**QUICK, "steps": 15}, la=0.0).apply(twin)
    with torch.no_grad():
        assert float(squared(task, twin, b, target).mean()) < 0.8 * float(squared(task, model, b, target).mean())


def test_anchoring_holds_other_prompts():
    """With the gate out of the way, a strongly anchored adapter moves a random prompt less than one without anchors."""
    model, task, split = small("diffusion")
    b = pool(model, task, split.forget, 3, guidance=3.0, steps=3, seed=0)[1].batches(split.forget, 9, 1, 0)[0]
    others = spm.surrogates(states(model, split.forget.tokens[:9]).detach())
    moved = {}
    for la in (0.0, 1000.0):
        hook: Any = METHODS["spm"](model, task, split, **{**QUICK, "steps": 12}, la=la).edits[0]
        it, twin = Guarded(hook), copied(model)
        adapt(twin, it)
        it.now = spm.ON
        with torch.no_grad():
            moved[la] = float((predict(twin, b["xt"], b["t"], others) - predict(model, b["xt"], b["t"], others)).square().mean())
    assert moved[1000.0] < 0.5 * moved[0.0]


def test_surrogates_are_likelier_the_less_they_resemble():
    """In two dimensions acceptance by min(1, 1 - cosine) gives a mean cosine of -1/4 / (1 - 1/pi); the norm is 0.8 to 1.2 times that of the concept."""
    torch.manual_seed(0)
    c = torch.tensor([[[3.0, 4.0]]]).expand(8000, 1, 2)
    fake = spm.surrogates(c)
    assert float(F.cosine_similarity(fake[:, 0], c[:, 0], dim=1).mean()) == pytest.approx(-0.25 / (1 - 1 / math.pi), abs=0.03)
    norms = fake.flatten(1).norm(dim=1)
    assert 4.0 <= float(norms.min()) < 4.1 and 5.9 < float(norms.max()) <= 6.0 + 1e-4
    others = torch.tensor([[[3.0, 4.0]], [[-3.0, -4.0]], [[4.0, -3.0]]])
    share = torch.stack([(spm.surrogates(c, others) == o).all(-1).float().mean() for o in others])
    torch.testing.assert_close(share, torch.tensor([0.0, 0.5, 0.5]), atol=0.03, rtol=0)


def test_the_gate_knows_the_concepts_word():
    """The token that all prompts of the concept share and no retained prompt has; any wording with it opens the gate, retained prompts do not."""
    model, _, split = guarded()
    encode = split.forget.encode
    (seven,), (zero,) = encode.ids("seven"), encode.ids("zero")
    hook: Any = patch().edits[0]
    assert hook.config["names"] == [[seven]] and seven != zero and len(hook.tensors["features"]) == len(set(split.forget.prompts))
    asked = encode(["one seven", "drawing of the seven", "seven", "a zero", ""])
    assert gammas(model, asked) == [[1.0, 1.0, 1.0, 0.0, 0.0]]
    assert set(gammas(model, split.retain.tokens)[0]) == {0.0} and set(gammas(model, split.forget.tokens)[0]) == {1.0}


def test_the_published_gate():
    """calibrate=False: the largest cosine, however much of it is padding, or the share of tokens; the card: cosine 0.3 and one of two tokens give 1/2."""
    model, task, split = small("diffusion")
    METHODS["spm"](model, task, split, **QUICK, calibrate=False).apply(model)
    (it,) = guards(model).values()
    x = states(model, split.retain.tokens).detach()
    wanted = cosine(x, it.hook.tensors["features"]).amax(1).clamp(0, 1)
    assert gammas(model, split.retain.tokens)[0] == pytest.approx(wanted.tolist(), abs=1e-4) and float(wanted.min()) > 0
    assert overlap(torch.tensor([[3, 9, 0]]), [[3, 4]]) == [0.5] and overlap(torch.tensor([[3, 9, 0]]), []) == [0.0]


def test_names_without_a_shared_word():
    """Two names of a concept count each by itself; a word that retained prompts use is none of either."""
    model, task, split = small("diffusion")
    two = replace(split, forget=split.forget.take([0, 1]).prompted(["a seven", "a 7"]))
    _, config = spm.gate(model, task, two, True)
    encode = split.forget.encode
    assert config["names"] == sorted([encode.ids("seven"), encode.ids("7")])
    _, alone = spm.gate(model, task, replace(two, retain=None), True)
    assert alone["names"] == [encode.ids("a")]  # nothing says that this word is common
    with pytest.raises(SettingError, match="cannot tell them apart"):
        spm.gate(model, task, replace(two, retain=two.retain.prompted(["a seven"] * len(two.retain))), True)


def test_closed_is_closed_to_the_bit():
    """Retained prompts drawn beside prompts of the concept give the very same images; those of the concept do not."""
    model, task, split = guarded()
    plain, _, _ = request("seven")
    asked = concat(split.retain.take(range(8)), split.forget.take(range(4)))
    before, after = draw(task, plain, asked, steps=4), draw(task, model, asked, steps=4)
    assert torch.equal(before[:8], after[:8])
    assert all(not torch.equal(a, b) for a, b in zip(before[8:], after[8:], strict=True))
    assert torch.equal(draw(task, plain, asked, steps=4, guidance=1.0)[:8], draw(task, model, asked, steps=4, guidance=1.0)[:8])


def test_states_in_place_of_prompts():
    """States that a prompt gave are known, wherever they stand; others are judged by the cosine alone, and what resembles nothing passes to the bit."""
    model, task, split = guarded()
    plain, _, _ = request("seven")
    wording = split.forget.take([0, 1]).prompted(["drawing of the seven", "one seven"])
    context = states(model, wording.tokens).detach()
    assert torch.equal(draw(task, model, wording, steps=3, context=context), draw(task, model, wording, steps=3))
    assert not torch.equal(draw(task, model, wording, steps=3), draw(task, plain, wording, steps=3))
    other = copied(model)  # the same states, of which this copy has seen no prompt
    (it,) = guards(other).values()
    it.cache.clear()
    assert torch.equal(draw(task, other, wording, steps=3, context=context), draw(task, plain, wording, steps=3))
    assert not torch.equal(
        draw(task, other, split.forget.take([0]), steps=3, context=it.hook.tensors["features"][:1]), draw(task, plain, split.forget.take([0]), steps=3)
    )
    noise = torch.randn(context.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(task, model, wording, steps=3, context=noise), draw(task, plain, wording, steps=3, context=noise))


def test_longer_states_are_compared_by_their_first_places():
    """An attack may put embeddings before the prompt: more places than the gate has."""
    model, _, split = guarded()
    x = states(model, split.forget.tokens[:2]).detach()
    features = patch().edits[0].tensors["features"]  # pyright: ignore
    longer = torch.cat([x, x[:, :2]], 1)
    assert torch.equal(cosine(longer, features), cosine(x, features)) and cosine(x[:, :3], features).shape == (2, len(features))
    predict(model, torch.zeros(2, 1, 8, 8), torch.tensor([500.0, 500.0]), longer)
    with pytest.raises(ModelError, match="states of width 16, this model's have 3"):
        predict(model, torch.zeros(2, 1, 8, 8), torch.tensor([500.0, 500.0]), x[:, :, :3])


def test_a_filter_and_no_deletion(tmp_path):
    """The weights stay; with the guard off, taken off, or by its inverse, the concept is drawn as before; the file holds the adapter."""
    model, task, split = request("seven")
    plain, before, asked = copied(model), state(model), split.forget.take(range(3))
    wanted = draw(task, plain, asked, steps=3)
    loaded = Patch.load(patch().save(tmp_path / "spm.safetensors", b"key"), b"key")
    assert loaded.digest == patch().digest
    inverse = loaded.apply(model)
    hidden = draw(task, model, asked, steps=3)
    assert not torch.equal(hidden, wanted) and all(torch.equal(t, before["tensors"][n]) for n, t in state(model)["tensors"].items())
    with bare(model):
        assert torch.equal(draw(task, model, asked, steps=3), wanted)
    again = inverse.apply(model)
    assert torch.equal(draw(task, model, asked, steps=3), wanted) and same(before, state(model)) and not guards(model)
    again.apply(model)
    assert torch.equal(draw(task, model, asked, steps=3), hidden)
    assert METHODS["spm"].assurance == "suppression" and "filter, not a deletion" in METHODS["spm"].manual


def test_a_copy_is_guarded_by_itself():
    model, task, split = guarded()
    asked = split.forget.take(range(3))
    hidden = draw(task, model, asked, steps=3)
    twin = copied(model)
    assert torch.equal(draw(task, twin, asked, steps=3), hidden)
    attach(twin, Hook(next(iter(guards(twin))), "none"))
    assert not torch.equal(draw(task, twin, asked, steps=3), hidden) and guards(model) and torch.equal(draw(task, model, asked, steps=3), hidden)


def test_guards_stack():
    """A second request is learned as if the first were not there, either acts on its own prompts, and the first can be taken off alone."""
    model, task, split = guarded("seven")
    _, _, second = request("eight")
    encode = split.forget.encode
    assert METHODS["spm"](model, task, second, **QUICK).digest == patch("eight").digest
    first = patch("eight").apply(model, force=True)
    assert gammas(model, encode(["a seven", "an eight", "one seven eight", "a zero"])) == [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    plain, _, _ = request("seven")
    only = {word: guarded(word)[0] for word in ("seven", "eight")}
    asked = split.retain.take([0, 1, 2, 3]).prompted(["a seven", "an eight", "one seven eight", "a zero"])
    found, none = draw(task, model, asked, steps=3), draw(task, plain, asked, steps=3)
    alone = {word: draw(task, m, asked, steps=3) for word, m in only.items()}
    assert torch.equal(found[0], alone["seven"][0]) and torch.equal(found[1], alone["eight"][1]) and torch.equal(found[3], none[3])
    assert not any(torch.equal(found[2], other[2]) for other in (none, *alone.values()))
    attach(model, Hook(next(iter(guards(model))), "none"))
    assert torch.equal(draw(task, model, asked, steps=3), alone["eight"])
    assert first.edits[0].name != patch("seven").edits[0].name


def test_decisions_are_remembered_without_text():
    model, task, split = guarded()
    draw(task, model, split.forget.take([0]), steps=2)
    (it,) = guards(model).values()
    flagged = [entry for entry in it.log.values() if entry["flagged"]]
    assert len(it.log) == 2 and len(flagged) == 1 and flagged[0]["score"] == 1.0 and not it.now


def test_real_anchors():
    """anchoring=retain draws from retained prompts: another adapter, and refused without them."""
    model, task, split = small("diffusion")
    other = METHODS["spm"](model, task, split, **QUICK, anchoring="retain")
    assert other.digest != patch().digest
    with pytest.raises(SplitError, match="anchoring=retain needs retain data"):
        METHODS["spm"].check(task, replace(split, retain=None), METHODS["spm"].settings({"anchoring": "retain"}))
    assert unlearn("spm", model, task, replace(split, retain=None), **{**QUICK, "trajectories": 0}).outcome == "ok"
    assert unlearn("spm", model, task, split, **{**QUICK, "lr": 0.0}).outcome == "no_op"


def test_which_layers():
    """Whole transformer blocks by default, convolutions where the part has them, nothing outside the UNet."""
    model, task, split = small("diffusion")
    names = spm.adaptable(model, "attentions")
    assert {n.split(".")[1] for n in names} == {"down_attentions", "up_attentions"} and {"attn1", "attn2", "ff"} <= {n.split(".")[3] for n in names}
    assert any(isinstance(model.get_submodule(n), nn.Conv2d) for n in spm.adaptable(model, "unet"))
    METHODS["spm"](model, task, split, **QUICK, part="unet", rank=2).apply(model)
    hook = next(iter(guards(model).values())).hook
    assert hook.tensors["unet.conv_in.down"].shape == (2, 9) and hook.tensors["unet.conv_in.up"].shape == (8, 2) and hook.config["scale"] == 0.5
    with pytest.raises(ScopeError, match="no linear layer and no convolution of the unet fits 'text'"):
        spm.adaptable(model, "text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchoring": "none"}, "anchoring must be one of random, retain"), ({"rank": 0}, "rank and anchors must be 1 or larger"),
        ({"guidance": 1.0}, "guidance must not be 1"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(settings, message):
    model, task, split = small("diffusion")
    with pytest.raises(SettingError, match=message):
        METHODS["spm"](model, task, split, **settings)


def test_guards_that_do_not_fit():
    model, _, _ = small("diffusion")
    hook: Any = patch().edits[0]
    layer = next(n for n in hook.tensors if n.endswith(".up"))
    with pytest.raises(PatchError, match="Linear has no unet"):
        attach(nn.Linear(2, 2), hook)
    with pytest.raises(PatchError, match="another model"):
        attach(model, replace(hook, tensors={**hook.tensors, layer: torch.zeros(3, 1)}))
    with pytest.raises(PatchError, match="threshold must lie in"):
        attach(model, replace(hook, config={**hook.config, "threshold": 1.0}))
    with pytest.raises(PatchError, match="names must be lists of tokens"):
        attach(model, replace(hook, config={**hook.config, "names": ["seven"]}))
    text = {"text_encoder.ff.0.up": torch.zeros(32, 1), "text_encoder.ff.0.down": torch.zeros(1, 16)}
    with pytest.raises(PatchError, match="no layer of the unet"):
        attach(model, replace(hook, tensors={"features": hook.tensors["features"], **text}))
    attach(model, hook)
    with pytest.raises(ModelError, match="give the unet encoder_hidden_states"):
        model.unet(torch.zeros(1, 1, 8, 8), torch.zeros(1))  # pyright: ignore
