"""Generated persons, and MetaUnlearn on them: numbers of card one-shui-metaunlearn, the meta-gradient against a full graph, what it reads and moves."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from worlds import accuracy, copied, same, state

from expunge.core.errors import Diverged, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.session import Bound, edit
from expunge.core.types import Out, Task
from expunge.data.records.identities import Identities, identities
from expunge.engine.run import unlearn
from expunge.methods.classifiers.metaunlearn import alignment, forget, inner, learn, loss_network, meta_gradient, moved, one_each, weighted
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.reading import score
from expunge.parts.scopes.layers import everything
from expunge.parts.training import train

TASK = classification()
HELD = tuple(range(8))
"""Persons whose images meta-training never sees."""


@functools.lru_cache
def faces() -> Identities:
    return identities(persons=40, images=8)


def fitted(data: Examples, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *nets.mlp(256, 4, 128))
        train(model, TASK, data, epochs=25, batch_size=32, seed=seed, lr=0.003, optimizer="adam", schedule="onecycle")
    return model.eval()


@functools.lru_cache
def original() -> nn.Module:
    """Knows 40 persons by heart."""
    return fitted(faces().train, 0)


def nll(model: nn.Module, data: Examples) -> float:
    return float(score(model, TASK, data).nll.mean())


# the data


def test_persons_stand_in_one_part_and_keep_their_label():
    f = identities(persons=12, images=5, validation=6, test=7, seed=3)
    whose = [f.person(part) for part in (f.train, f.validation, f.test)]
    assert [len(w) for w in whose] == [60, 30, 35]
    assert [sorted(set(w.tolist())) for w in whose] == [list(range(12)), list(range(12, 18)), list(range(18, 25))]
    for part, w in zip((f.train, f.validation, f.test), whose, strict=True):
        assert all(len(part.y[w == p].unique()) == 1 for p in w.unique())
    assert torch.bincount(f.train.y).tolist() == [15, 15, 15, 15]
    assert f.person(f.portraits).tolist() == list(range(12)) and not set(f.portraits.ids.tolist()) & set(f.train.ids.tolist())
    assert torch.equal(f.portraits.y, f.train.y[::5])
    assert len(set(f.train.keys) | set(f.portraits.keys)) == 72
    assert float(f.train.x.min()) >= -0.5 and float(f.train.x.max()) <= 0.5


def test_data_follow_from_the_seed_alone():
    rng = torch.get_rng_state()
    a, b, other = identities(persons=4, seed=1), identities(persons=4, seed=1), identities(persons=4, seed=2)
    assert torch.equal(rng, torch.get_rng_state())
    for part in ("train", "validation", "test", "portraits"):
        assert getattr(a, part).digest == getattr(b, part).digest != getattr(other, part).digest
    assert identities(persons=4, channels=3, side=12).train.x.shape == (32, 3, 12, 12)


def test_a_person_looks_like_itself_and_age_shows_by_the_cue():
    """The nearest image is the same person's ten times as often as by chance (2 %); the lines across the face grow with age, and are not there at cue 0."""
    f = faces()
    x, whose = f.train.x.flatten(1), f.person(f.train)
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(1)
    assert float((whose[nearest] == whose).float().mean()) > 10 * 7 / 319

    def lines(cue: float) -> list[float]:
        data = identities(persons=400, images=2, cue=cue, validation=1, test=1).train
        wave = torch.exp(1j * torch.linspace(-1, 1, 16) * 6 * torch.pi)
        strength = (data.x[:, 0, :, 5:11].mean(2) * wave).mean(1).abs()
        return [float(strength[data.y == k].mean()) for k in range(4)]

    seen, hidden = lines(0.8), lines(0.0)
    assert seen == sorted(seen) and seen[3] - seen[0] > 0.02
    assert max(hidden) - min(hidden) < 0.004


def test_a_request_for_persons():
    f = faces()
    split = f.split([3, 7])
    split.check()
    assert set(f.person(split.forget).tolist()) == {3, 7} and len(split.forget) == 16 and len(split.retain) == 304
    assert not torch.isin(f.person(split.retain), torch.tensor([3, 7])).any() and split.asked == "persons:3,7"
    with pytest.raises(SplitError, match=r"person 40 has no training image; persons are 0\.\.39"):
        f.split([1, 40])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"persons": 0}, "persons must be at least 1, not 0"),
        ({"classes": 1}, "classes must be at least 2, side 8 and channels 1; found 1, 16 and 1"),
        ({"cue": 1.5}, r"cue must be in 0\.\.1, not 1\.5"),
    ],
)
def test_data_refuse_numbers_out_of_range(bad, says):
    with pytest.raises(SettingError, match=says):
        identities(**bad)


# the meta-gradient


def untrained(seed: int) -> tuple[nn.Module, Task, nn.Module]:
    """A convolutional network on the faces, its task, and an h that fits it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nets.small_cnn(16, 4, 4), TASK, loss_network(2 * 4 + 16, 12)


def test_one_step_by_hand():
    """Card one-shui-metaunlearn: h = softplus(phi theta x), phi = x = 1, theta = 0: ln 2, gradient .5, theta' -.05, meta-gradient -.05."""
    phi, theta = torch.ones(1, dtype=torch.double, requires_grad=True), torch.zeros(1, dtype=torch.double, requires_grad=True)
    h = F.softplus(phi * theta * 1.0)
    (g,) = torch.autograd.grad(h, theta, create_graph=True)
    assert (float(h.detach()), float(g.detach())) == (pytest.approx(math.log(2), abs=1e-12), 0.5)
    there = moved({"theta": theta}, [g], 0.1)["theta"]
    assert float(there) == pytest.approx(-0.05)
    (d,) = meta_gradient([phi], [g], [torch.ones(1, dtype=torch.double)], 0.1)
    assert float(d) == pytest.approx(-0.05)


def test_meta_gradient_equals_the_full_graph():
    """<g, v> with v held constant against autograd through the whole step, on a network with convolution, pooling and two linear layers."""
    model, task, h = untrained(0)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    support, batch = task.batches(faces().train, 4)[0], task.batches(faces().validation, 8)[0]
    g = inner(model, task, h, theta, support, graph=True)
    whole = {n: t - 0.5 * d for (n, t), d in zip(theta.items(), g, strict=True)}
    slow = torch.autograd.grad(task.forward(Bound(model, whole), batch).mean.mean(), list(h.parameters()), retain_graph=True)
    there = {n: t.requires_grad_(True) for n, t in moved(theta, g, 0.5).items()}
    v = torch.autograd.grad(task.forward(Bound(model, there), batch).mean.mean(), list(there.values()))
    fast = meta_gradient(list(h.parameters()), g, v, 0.5)
    assert max(float(d.abs().max()) for d in slow) > 1e-6
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_learned_loss_is_positive_and_of_the_card_s_layers():
    h = loss_network(7, 512, 0.5)
    assert [type(m).__name__ for m in h] == ["Linear", "LayerNorm", "Linear", "GELU", "Dropout", "LayerNorm", "Linear", "Softplus"]
    assert h[0].weight.shape == (512, 7) and h[6].weight.shape == (1, 512) and h[4].p == 0.5
    assert bool((h(torch.randn(9, 7)) > 0).all())


def test_alignment_and_weights():
    """SmoothL1 is d^2 / 2 below 1 and d - 1/2 above; its gradient reaches the forget loss alone."""
    loss, before, after = (torch.tensor(v, requires_grad=True) for v in (0.5, 1.0, 3.0))
    value = alignment(loss, [before, after])
    assert float(value.detach()) == pytest.approx(0.125 + 2.0)
    value.backward()
    assert float(loss.grad) == pytest.approx(-1.5) and before.grad is None and after.grad is None
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]], requires_grad=True)

    def out(labels: Tensor) -> Out:
        return Out(F.cross_entropy(logits, labels, reduction="none"), torch.ones(2), logits=logits, labels=labels)

    half, right = out(torch.tensor([0, 1])), out(torch.tensor([0, 0]))
    mean = float(half.mean.mean().detach())
    assert float(weighted(half, "none").detach()) == pytest.approx(mean)
    assert float(weighted(half, "accuracy").detach()) == pytest.approx(mean / 2)
    assert float(weighted(half, "probability").detach()) == pytest.approx(mean / 2)
    (dead,) = torch.autograd.grad(weighted(right, "accuracy"), logits)
    assert not bool(dead.any()), "what is known by heart gets no gradient from weigh=accuracy"


# the method


def test_forgets_persons_it_never_saw_from_one_image():
    """h learned on 32 persons, then four requests for two of the other 8 each: their loss goes towards that of a model retrained without them,
    by more than the loss of those that stay rises, and farther from a training image than from a portrait. Means over requests and two seeds."""
    f, model = faces(), original()
    split, fresh = f.split(HELD), fitted(f.split(HELD).retain, 1)
    found: dict[str, list[list[float]]] = {"trained": [], "portrait": []}
    before = state(model)
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            h = learn(model, TASK, split.retain, f.validation, persons=2, stride=f.stride, epochs=8, seed=seed)
        assert same(before, state(model)) and not any(p.requires_grad for p in h.parameters())
        for pair in zip(HELD[::2], HELD[1::2], strict=True):
            gone = f.split(pair).forget
            for kind, support in (("trained", one_each(gone, f.stride, torch.Generator().manual_seed(0))), ("portrait", f.portraits.take(pair))):
                twin = copied(model)
                with edit(twin, everything(twin, "freeze")) as e:
                    e.eval()
                    forget(e, TASK, h, support, meta_lr=1.0)
                e.patch.apply(twin)
                found[kind].append([nll(twin, gone), accuracy(twin, gone), nll(twin, split.retain), accuracy(twin, split.retain)])
    trained, portrait = (torch.tensor(found[kind]).mean(0).tolist() for kind in ("trained", "portrait"))
    start, goal, stay = nll(model, split.forget), nll(fresh, split.forget), nll(model, split.retain)
    assert start < 0.3 and goal > 1.5 and accuracy(fresh, split.forget) < 0.7 < 0.9 < accuracy(model, split.forget)
    assert abs(trained[0] - goal) < 0.6 * (goal - start)
    assert trained[2] - stay < 0.5 * (trained[0] - start)
    assert accuracy(model, split.forget) - trained[1] > 2 * (accuracy(model, split.retain) - trained[3])
    assert start + 0.4 < portrait[0] < trained[0] and portrait[2] - stay < 0.5 * (portrait[0] - start)


def test_reads_one_image_per_person_and_neither_the_others_nor_test():
    """All other images of the person, and the test part, may hold anything: the patch is the same bit for bit."""
    f, model = faces(), original()
    split, settings = f.split([0, 1]), {"stride": f.stride, "epochs": 1, "seed": 4}
    watch = Guard()
    attempt = unlearn("metaunlearn", model, TASK, split, guard=watch, **settings)
    assert attempt.outcome == "ok" and watch.meter.seen["forget"] == 2 and "test" not in watch.meter.seen
    support = one_each(split.forget, f.stride, torch.Generator().manual_seed(4))
    rest = ~torch.isin(split.forget.ids, support.ids)
    x = split.forget.x.clone()
    x[rest] = torch.rand(x[rest].shape, generator=torch.Generator().manual_seed(0))
    blind = replace(split, forget=replace(split.forget, x=x), test=split.test.take(range(3)))
    assert unlearn("metaunlearn", model, TASK, blind, **settings).patch.digest == attempt.patch.digest
    x[~rest] += 0.1
    assert unlearn("metaunlearn", model, TASK, replace(split, forget=replace(split.forget, x=x)), **settings).patch.digest != attempt.patch.digest
    portraits = unlearn("metaunlearn", model, TASK, replace(split, forget=f.portraits.take([0, 1])), **settings)
    assert portraits.outcome == "ok" and portraits.patch.digest != attempt.patch.digest


def test_each_step_is_a_gradient_of_h():
    """Two steps equal theta - meta_lr * grad h(theta) taken twice by hand."""
    model, task, h = untrained(1)
    support = faces().train.take(range(6))
    theta = {n: p.detach() for n, p in model.named_parameters()}
    batch = task.batches(support, 6)[0]
    for _ in range(2):
        theta = moved(theta, inner(model, task, h, theta, batch, graph=False), 0.3)
    twin = copied(model)
    with edit(twin, everything(twin)) as e:
        e.eval()
        forget(e, task, h, support, meta_lr=0.3, steps=2)
    e.patch.apply(twin)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p.detach(), theta[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(p, q) for p, q in zip(twin.parameters(), model.parameters(), strict=True))


def test_one_of_each_person():
    f = faces()
    picks = [one_each(f.train, f.stride, torch.Generator().manual_seed(k)) for k in range(20)]
    assert all(f.person(p).tolist() == list(range(40)) for p in picks)
    assert len({int(p.ids[0]) for p in picks}) > 3, "any of a person's images may be drawn"


def test_refusals():
    f, model = faces(), original()
    split = f.split([0])
    with pytest.raises(SplitError, match="person 5 stands in forget and in retain"):
        METHODS["metaunlearn"](model, TASK, replace(split, forget=f.split([5]).forget), stride=f.stride)
    with pytest.raises(SplitError, match="at least two persons in retain, found 1; a record's person is id // stride, stride is 9"):
        METHODS["metaunlearn"](model, TASK, replace(split, retain=f.split([5]).forget), stride=f.stride)
    with pytest.raises(SplitError, match="split lacks validation"):
        METHODS["metaunlearn"](model, TASK, replace(split, validation=None))
    for bad, says in (
        ({"weigh": "mean"}, "weigh must be one of none, probability, accuracy, not 'mean'"),
        ({"stride": 0}, "stride must be at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\) and keep 0 or larger; found 1.0 and 1.0"),
    ):
        with pytest.raises(SettingError, match=says):
            METHODS["metaunlearn"](model, TASK, split, **bad)
    with pytest.raises(Diverged, match="not finite at request 0; lower meta_lr"):
        METHODS["metaunlearn"](model, TASK, split, stride=f.stride, epochs=1, meta_lr=1e38)
