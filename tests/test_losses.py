"""Losses against slow forms written out with logarithms and sums, and their gradients against autograd on those and the cards' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expunge.core.types import Out
from expunge.parts.losses import ascent, kl, kl_to, nll, random_labels, relabel

SHAPES = {"b": st.integers(1, 7), "c": st.integers(2, 6), "seed": st.integers(0, 1000)}


def sample(b: int, c: int, seed: int) -> tuple[Out, Tensor, Tensor]:
    """A forward pass in float64 with unequal counts, other labels (B,), teacher logits (B, C)."""
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(b, c, generator=g, dtype=torch.float64)).requires_grad_()
    out = Out(nll=torch.rand(b, generator=g, dtype=torch.float64), count=torch.randint(1, 9, (b,), generator=g).double(), logits=logits)
    return out, torch.randint(c, (b,), generator=g), 3 * torch.randn(b, c, generator=g, dtype=torch.float64)


def softmax(row: list[float], t: float = 1.0) -> list[float]:
    exps = [math.exp(v / t) for v in row]
    return [e / sum(exps) for e in exps]


@given(**SHAPES)
def test_nll_and_ascent_divide_by_unequal_counts(b, c, seed):
    out, _, _ = sample(b, c, seed)
    for k in range(b):
        assert float(nll(out)[k]) == pytest.approx(float(out.nll[k]) / float(out.count[k]))
    assert torch.equal(ascent(out), -nll(out))


@given(**SHAPES)
def test_relabel_is_the_loop_and_has_the_known_gradient(b, c, seed):
    out, labels, _ = sample(b, c, seed)
    value = relabel(out, labels)
    assert value.shape == (b,)
    for k in range(b):
        assert float(value[k].detach()) == pytest.approx(-math.log(softmax(out.logits[k].tolist())[labels[k]]), abs=1e-9)
    (grad,) = torch.autograd.grad(value.sum(), out.logits)
    torch.testing.assert_close(grad, out.logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, c))


@given(**SHAPES, t=st.sampled_from([0.5, 1.0, 4.0]))
def test_kl_is_the_loop_and_has_the_known_gradient(b, c, seed, t):
    out, _, teacher = sample(b, c, seed)
    value = kl(out, teacher, temperature=t)
    assert value.shape == (b,)
    for k in range(b):
        p, q = softmax(teacher[k].tolist(), t), softmax(out.logits[k].tolist(), t)
        assert float(value[k].detach()) == pytest.approx(t * t * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)), abs=1e-9)
    assert (value >= -1e-12).all()
    (grad,) = torch.autograd.grad(value.sum(), out.logits)
    torch.testing.assert_close(grad, t * ((out.logits.detach() / t).softmax(-1) - (teacher / t).softmax(-1)))


@given(**SHAPES)
def test_kl_to_is_kl_without_its_factor(b, c, seed):
    out, _, teacher = sample(b, c, seed)
    torch.testing.assert_close(kl_to(out, (teacher / 2).softmax(-1), temperature=2.0) * 4, kl(out, teacher, temperature=2.0))
    assert kl_to(out, out.logits.detach().softmax(-1)).abs().max() < 1e-9


def test_kl_to_a_certain_target_is_cross_entropy():
    out, labels, _ = sample(5, 4, 0)
    torch.testing.assert_close(kl_to(out, torch.nn.functional.one_hot(labels, 4)), relabel(out, labels))


@pytest.mark.parametrize("loss", [lambda o, y, t: relabel(o, y), lambda o, y, t: kl(o, t, temperature=2.0), lambda o, y, t: kl_to(o, t.softmax(-1))])
def test_autograd_agrees_with_finite_differences(loss):
    out, labels, teacher = sample(3, 4, 1)

    def of_logits(logits: Tensor) -> Tensor:
        return loss(Out(nll=out.nll, count=out.count, logits=logits), labels, teacher)

    assert torch.autograd.gradcheck(of_logits, out.logits)


def test_examples_do_not_touch_each_other():
    """The value of a row is the same alone as in a batch: no batch reduction anywhere."""
    out, labels, teacher = sample(6, 5, 2)
    alone = [Out(nll=out.nll[k : k + 1], count=out.count[k : k + 1], logits=out.logits[k : k + 1]) for k in range(6)]
    for whole, parts in (
        (nll(out), [nll(o) for o in alone]),
        (relabel(out, labels), [relabel(o, labels[k : k + 1]) for k, o in enumerate(alone)]),
        (kl(out, teacher, temperature=3.0), [kl(o, teacher[k : k + 1], temperature=3.0) for k, o in enumerate(alone)]),
    ):
        torch.testing.assert_close(whole, torch.cat(parts))


@given(classes=st.integers(2, 12), seed=st.integers(0, 50))
def test_random_labels_in_range_and_never_true_if_other(classes, seed):
    labels = torch.arange(200) % classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other, any_label = random_labels(labels, classes, other=True), random_labels(labels, classes, other=False)
    assert (other != labels).all()
    for drawn in (other, any_label):
        assert drawn.shape == labels.shape and int(drawn.min()) >= 0 and int(drawn.max()) < classes


def test_random_labels_are_uniform():
    """10,000 draws over 4 labels (3 if the true one is left out): each within 5 standard deviations of its share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for other, shares in ((False, [0.25] * 4), (True, [1 / 3, 1 / 3, 0, 1 / 3])):
            counts = torch.bincount(random_labels(torch.full((10_000,), 2), 4, other=other), minlength=4)
            for count, share in zip(counts.tolist(), shares, strict=True):
                assert abs(count - 10_000 * share) <= 5 * math.sqrt(10_000 * share * (1 - share))
