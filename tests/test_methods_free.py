"""Methods that do without labels (laf) or without a retain set (scar, scar_self): the cards' numbers, slow oracles, and what is never read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import accuracy, copied, digits, noise, small, toy

from expunge.core.errors import DataError, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import concat
from expunge.engine.run import unlearn
from expunge.methods.classifiers import laf, scar
from expunge.modalities.examples import Examples
from expunge.parts.reading import outputs

QUICK = {"epochs": 2, "batch_size": 8}
BRIEF = {**QUICK, "fits": 1.0}


def after(name: str, model: nn.Module, task, split, **settings) -> nn.Module:
    twin = copied(model)
    METHODS[name](model, task, split, **settings).apply(twin)
    return twin


# laf


def test_laf_card_numbers():
    """d = 1 gives e^.5; S of (0, 1) is 1 + e^.5; A of one retain at cos 1 and one forget at cos 0 is -1/20; all at cos 1: 0."""
    assert float(laf.surprise(torch.tensor([1.0]))) == pytest.approx(1.6487, abs=5e-5)
    assert float(laf.surprise(torch.tensor([0.0, 1.0]))) == pytest.approx(2.6487, abs=5e-5)
    assert float(laf.alignment(torch.tensor([0.0]), torch.tensor([1.0]), 20.0)) == pytest.approx(-0.05)
    assert float(laf.alignment(torch.tensor([0.0]), torch.tensor([0.0]), 20.0)) == 0


def test_alignment_is_the_double_loop():
    g = torch.Generator().manual_seed(0)
    kept, gone = 2 * torch.rand(5, generator=g, dtype=torch.float64), 2 * torch.rand(3, generator=g, dtype=torch.float64)
    slow = sum(math.log(math.exp(k) / sum(math.exp(f / 5) for f in gone.tolist())) for k in kept.tolist())
    assert float(laf.alignment(kept, gone, 5.0)) == pytest.approx(slow)


def test_surprise_is_bounded_and_its_gradient_finite():
    d = torch.tensor([0.0, 1e4], requires_grad=True)
    value = laf.surprise(d)
    assert 2 <= float(value.detach()) < 2 * math.e
    (slope,) = torch.autograd.grad(value, d)
    assert slope[0] == 1 and 0 < slope[1] < 1e-7


def test_vae_distance_and_kl():
    """mu = 1, sigma = 2 in two codes: KL = 2 * -1/2 (ln 4 + 1 - 1 - 4) = 2.6137; a decoder of zeros leaves d = |e|^2."""
    vae = laf.autoencoder(3, 2, sigmoid=False)
    with torch.no_grad():
        for p in vae.parameters():
            p.zero_()
        vae["encode"][-1].bias.copy_(torch.tensor([1.0, 1.0, 2.0, 2.0]))
    d, kl = laf.reconstruct(vae, torch.tensor([[1.0, 2.0, 3.0]]))
    assert d.tolist() == [14.0]
    assert float(kl.detach()) == pytest.approx(4 - math.log(4), abs=1e-4)


def test_vae_learns_its_features():
    """Features on a line in 6 dimensions: a fitted VAE reconstructs them better than their mean does, and others worse."""
    torch.manual_seed(0)
    e = torch.randn(256, 1) * torch.ones(1, 6)
    vae = laf.fitted(e, latent=2, fits=20, beta=0.025, batch_size=32, sigmoid=False, seed=0)
    assert not any(p.requires_grad for p in vae.parameters())
    mine, other = (float(laf.reconstruct(vae, x)[0].mean()) for x in (e, torch.randn(256, 6)))
    assert mine < 0.3 * float(e.square().sum(1).mean())
    assert other > 3 * mine


@pytest.mark.parametrize("order", laf.ORDERS)
def test_laf_reads_no_label(order):
    """Other labels, same patch; no pass through the task's loss. With repair the labels matter, those of forget still not."""
    model, task, split = small("classification")
    other = {p: replace(getattr(split, p), y=(getattr(split, p).y + 1) % 10) for p in ("forget", "retain")}

    def unread(*_):
        raise AssertionError("the loss was computed")

    blind = replace(task, forward=unread)
    first = METHODS["laf"](model, blind, split, order=order, **BRIEF)
    assert METHODS["laf"](model, blind, replace(split, **other), order=order, **BRIEF).digest == first.digest
    repaired = [
        METHODS["laf"](model, task, replace(split, **part), order=order, repair=1.0, **BRIEF).digest for part in ({}, {"forget": other["forget"]}, other)
    ]
    assert repaired[0] == repaired[1] != repaired[2]


def test_laf_repair_moves_the_last_layer_alone():
    model, task, split = small("classification")
    without, repaired = (after("laf", model, task, split, repair=r, **BRIEF) for r in (0.0, 2.0))
    for (name, p), q in zip(without.named_parameters(), repaired.parameters(), strict=True):
        assert torch.equal(p, q) == (not name.startswith("8.")), name
    assert torch.equal(model[8].weight, without[8].weight)
    model[8].requires_grad_(False)
    with pytest.raises(ValueError, match="last linear layer, whose weights are frozen"):
        METHODS["laf"](model, task, split, repair=1.0, **BRIEF)


def test_turns_are_two_adams(monkeypatch):
    """Against the obvious loop: an Adam for E and another for A over the same weights."""
    model, task, split = small("classification")
    fast = after("laf", model, task, split, **BRIEF)

    def slow(wide, *phases, lr, decay, **_):
        weights = [p for n, p in wide.params.items() if not n.startswith("shift.")]
        shifts = [p for n, p in wide.params.items() if n.startswith("shift.")]
        steppers = [torch.optim.Adam(weights, lr), torch.optim.Adam(weights, lr * decay(1))]
        for number, (loss, batches) in enumerate(phases):
            for p in weights + shifts:
                p.grad = None
            loss(batches[0]).backward()
            if number % 2:
                assert all(p.grad is None for p in weights)
                for p, h in zip(weights, shifts, strict=True):
                    p.grad = h.grad
            steppers[number % 2].step()

    monkeypatch.setattr(laf, "alternate", slow)
    oracle = after("laf", model, task, split, **BRIEF)
    assert not torch.equal(model[0].weight, fast[0].weight)
    for p, q in zip(fast.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"order": "joint"}, {"repair": 2.0}, {"buffers": "move", "epochs": 3.0}])
def test_laf_cost_is_what_the_meter_counts(settings):
    model, task, split = small("classification")
    attempt = unlearn("laf", model, task, split, **{**BRIEF, **settings})
    assert attempt.outcome == "ok", attempt.reason
    assert METHODS["laf"].expected(split, attempt.settings) == (attempt.meter.forward, attempt.meter.backward)


def test_laf_under_a_validating_guard_keeps_the_best_weights():
    """The first evaluation is the best: what comes later is undone. The autopilot runs every method this way."""
    model, task, split = small("classification")
    scores = iter(range(0, -1000, -1))
    seen = []

    def judge(now: nn.Module) -> float:
        seen.append(now[0].weight.detach().clone())
        return next(scores)

    attempt = unlearn("laf", model, task, split, guard=Guard(validate=judge, every=3), **BRIEF)
    assert attempt.outcome == "ok", attempt.reason
    twin = copied(model)
    attempt.patch.apply(twin)
    assert torch.equal(twin[0].weight, seen[0]) and not torch.equal(seen[0], seen[-1])
    assert {e.name for e in attempt.patch.edits} <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("published", [False, True])
def test_laf_published_vaes(monkeypatch, published):
    """The notebook's VAE of retain sees forget too and ends in a sigmoid."""
    model, task, split = small("classification")
    seen = []
    real = laf.fitted
    monkeypatch.setattr(laf, "fitted", lambda e, **options: (seen.append((len(e), float(e.mean()), options["sigmoid"])), real(e, **options))[1])
    METHODS["laf"](model, task, split, published=published, **BRIEF)
    assert [s[0] for s in seen] == ([80, 16] if published else [64, 16])
    assert {s[2] for s in seen} == {published}
    assert (abs(seen[0][1]) < 1e-4) == (not published)


def test_laf_augmented_data_is_taught_live():
    model, task, split = small("classification")
    live = replace(split, forget=replace(split.forget, augment=lambda x, g: x + torch.rand(x.shape, generator=g)))
    plain, augmented = (unlearn("laf", model, task, s, **BRIEF) for s in (split, live))
    assert augmented.outcome == "ok" and augmented.meter.forward > plain.meter.forward
    assert augmented.patch.digest != plain.patch.digest


def test_laf_forgets_the_class_and_keeps_the_rest():
    model, task, split = toy("classification")
    twin = after("laf", model, task, split, **METHODS["laf"].toy)
    assert accuracy(twin, split.forget) < 0.4
    assert accuracy(twin, split.retain) > 0.9


# scar: statistics


S = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)


def test_scar_card_numbers():
    once = scar.shrunk(S, 3, 3)
    assert once.tolist() == [[6.5, 2.0], [2.0, 5.5]]
    twice = scar.shrunk(once, 3, 3)
    assert twice.tolist() == [[24.5, 8.0], [8.0, 23.5]]
    assert float(twice[0, 1] / (twice[0, 0] * twice[1, 1]).sqrt()) == pytest.approx(0.333406, abs=5e-7)
    p = scar.precision(twice)
    assert p[0, 0] == pytest.approx(1.125061, abs=5e-7) and p[1, 1] == pytest.approx(1.125061, abs=5e-7)
    assert p[0, 1] == pytest.approx(-0.375102, abs=5e-7)
    t = scar.tukey(torch.tensor([[4.0, 9.0]], dtype=torch.float64), 0.5)
    assert t.tolist() == [[2.0, 3.0]]
    assert float(scar.distance(t, torch.tensor([1.0, 2.0], dtype=torch.float64), p)) == pytest.approx(0.0224056, abs=5e-8)


def test_shrinkage_of_a_batch_skips_places_that_are_zero():
    """V2 is the mean of the off-diagonal places that are not 0; a diagonal matrix has none, and stays diagonal."""
    s = torch.stack([torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])])
    out = scar.shrunk(s, 1.0, 2.0)
    torch.testing.assert_close(out[0], torch.diag(torch.tensor([3.0, 4.0, 5.0])))
    torch.testing.assert_close(out[1], torch.tensor([[2.0, 1.5, 1.0], [1.5, 2.0, 1.0], [1.0, 1.0, 2.0]]))


def test_tukey_keeps_signs_and_gradients_finite():
    e = torch.tensor([-4.0, 0.0, 9.0], requires_grad=True)
    t = scar.tukey(e, 0.5)
    assert t.tolist() == [-2.0, 0.0, 3.0]
    (slope,) = torch.autograd.grad(t.sum(), e)
    assert slope.tolist() == pytest.approx([0.25, 0.0, 1 / 6])


def features(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64) + 3, torch.arange(n) % 3


def test_fitted_is_numpys_mean_and_correlation():
    """Without shrinkage: class by class the pseudo-inverse of the correlation matrix; `shared` pools the covariances."""
    import numpy as np

    t, y = features(60, 0)
    found = scar.sums(t, y, 5, 0.5)
    classes, mean, p = scar.fitted(found, gamma1=0, gamma2=0, shrinks=1, shared=False)
    assert classes.tolist() == [0, 1, 2]
    pooled = np.zeros((4, 4))
    for k in range(3):
        rows = t[y == k].numpy()
        np.testing.assert_allclose(mean[k], rows.mean(0))
        np.testing.assert_allclose(p[k], np.linalg.inv(np.corrcoef(rows.T)), rtol=1e-8)
        pooled += np.cov(rows.T) * (len(rows) - 1) / (60 - 3)
    deviation = np.sqrt(np.diag(pooled))
    _, _, common = scar.fitted(found, gamma1=0, gamma2=0, shrinks=1, shared=True)
    for k in range(3):
        np.testing.assert_allclose(common[k], np.linalg.inv(pooled / np.outer(deviation, deviation)), rtol=1e-8)


def test_a_class_of_one_record_gets_the_shared_covariance():
    t, y = features(20, 1)
    y = torch.where(torch.arange(20) == 19, 4, y.clamp(max=1))
    settings = {"gamma1": 3.0, "gamma2": 3.0, "shrinks": 2}
    found = scar.sums(t, y, 5, 0.5)
    _, mean, p = scar.fitted(found, shared=False, **settings)
    _, _, common = scar.fitted(found, shared=True, **settings)
    torch.testing.assert_close(mean[2], t[19])
    torch.testing.assert_close(p[2], common[2])
    assert not torch.allclose(p[0], common[0])
    with pytest.raises(SplitError, match="two or more records"):
        scar.fitted(scar.sums(t[:2], torch.tensor([0, 1]), 5, 0.5), shared=False, **settings)


def test_records_are_taken_out_of_stored_statistics(tmp_path):
    """All records less the forgotten ones are the others; what is stored reads back, under the same network and power only."""
    t, y = features(30, 2)
    every, gone = scar.sums(t, y, 3, 0.5), scar.sums(t[:9], y[:9], 3, 0.5)
    rest = scar.less(every, gone)
    for name, value in vars(scar.sums(t[9:], y[9:], 3, 0.5)).items():
        torch.testing.assert_close(getattr(rest, name), value)
    path = scar.save(every, tmp_path / "statistics.safetensors")
    for name, value in vars(scar.load(path, gone)).items():
        assert torch.equal(value, getattr(every, name))
    with pytest.raises(DataError, match="fewer records of class 1 than"):
        scar.less(gone, scar.sums(t[[1, 4, 7, 10]], y[[1, 4, 7, 10]], 3, 0.5))
    for other in (scar.sums(t, y, 3, 0.25), scar.sums(t, y, 4, 0.5), scar.sums(t[:, :3], y, 3, 0.5)):
        with pytest.raises(DataError, match="of another network or of another power"):
            scar.load(path, other)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(DataError, match=r"is no safetensors file, or is damaged; write retain|cannot read none.safetensors"):
            scar.load(tmp_path / name, gone)


# scar: the method


def mixed():
    """The small network on records of several classes: eight of a hundred go, the others stay. Anchors large enough to be told apart."""
    model, task, split = small("classification")
    every = digits("random")[2].retain
    return model, task, replace(split, forget=every.take(range(8)), retain=every.take(range(8, 108)), anchor=noise(64, 30.0))


@pytest.mark.parametrize("scenario", ["class", "records"])
def test_stored_statistics_serve_as_those_of_retain(tmp_path, scenario):
    """Stored over all training records, less forget: the patch is the one that a pass over retain gives, and no retain set is there."""
    model, task, split = small("classification") if scenario == "class" else mixed()
    every = concat(split.forget, split.retain)
    path = scar.save(scar.moments(model, task, every, every.y, 10), tmp_path / "s.safetensors")
    with_retain = after("scar", model, task, split, target=0.5, **QUICK)
    stored = after("scar", model, task, replace(split, retain=None), statistics=str(path), target=0.5, **QUICK)
    for p, q, r in zip(with_retain.parameters(), stored.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-4)
        assert not torch.equal(p, r)


def test_scar_without_retain_reads_anchor():
    """auto is retain where the split has it, else anchor; asking for a part that is missing is refused."""
    model, task, split = small("classification")
    bare = replace(split, retain=None)

    def digest(s, **settings) -> str:
        return METHODS["scar"](model, task, s, **QUICK, **settings).digest

    assert digest(split) == digest(split, statistics="retain") != digest(split, statistics="anchor")
    assert digest(bare) == digest(bare, statistics="anchor") == digest(split, statistics="anchor")
    with pytest.raises(SplitError, match="split lacks retain"):
        digest(bare, statistics="retain")
    with pytest.raises(DataError, match="cannot read reatin: No such file"):
        digest(bare, statistics="reatin")


@pytest.mark.parametrize("name", ["scar", "scar_self"])
def test_labels_of_anchor_and_the_test_set_are_not_read(name):
    model, task, split = small("classification")
    other = replace(split, anchor=replace(split.anchor, y=split.anchor.y + 5), test=split.test.take(range(3)))
    assert METHODS[name](model, task, split, **QUICK).digest == METHODS[name](model, task, other, **QUICK).digest


def test_scar_aims_at_the_nearest_wrong_class(monkeypatch):
    """Against the loop over records and classes; an own class that is still there is never the aim."""
    model, task, split = mixed()
    labels, mu, p = scar.fitted(scar.moments(model, task, split.retain, split.retain.y, 10), gamma1=3.0, gamma2=3.0, shrinks=2, shared=False)
    t = scar.tukey(outputs(model, scar.embedding(task), split.forget).double(), 0.5)
    wanted = []
    for row, own in zip(t, split.forget.y.tolist(), strict=True):
        far = {k: float(scar.distance(row[None], mu[k], p[k])) for k in range(len(labels)) if int(labels[k]) != own}
        wanted.append(min(far, key=far.__getitem__))
    seen, real = [], scar.distance
    monkeypatch.setattr(scar, "distance", lambda t, mu, p: (seen.append((len(t), mu, t.requires_grad)), real(t, mu, p))[1])
    METHODS["scar"](model, task, split, epochs=1, ratio=1, threshold=0.0)
    found: dict[int, int] = {}
    for n, centre, trained in seen:
        if trained:
            found[int((mu.float() - centre).abs().sum(1).argmin())] = n
    assert found == {k: wanted.count(k) for k in set(wanted)}


def distilled(monkeypatch, split, **settings) -> list[torch.Tensor]:
    """The targets (B, C) that the student was taught, batch by batch."""
    model, task, _ = small("classification")
    seen, real = [], scar.kl_to
    monkeypatch.setattr(scar, "kl_to", lambda out, target: (seen.append(target), real(out, target))[1])
    METHODS["scar"](model, task, split, **{**QUICK, **settings})
    return seen


def test_teacher_of_a_removed_class_never_says_it(monkeypatch):
    """No anchor of the class is distilled, its probability is the smallest of all; with form=records both stay."""
    model, task, split = small("classification")
    assigned = outputs(model, task, split.anchor).argmax(-1)
    assert 0 < int((assigned == 3).sum()) < len(assigned)
    removed = torch.cat(distilled(monkeypatch, split, epochs=1, ratio=16))
    assert not (removed.argmax(-1) == 3).any()
    assert bool((removed[:, 3] <= removed.amin(-1)).all())
    kept = torch.cat(distilled(monkeypatch, split, epochs=1, ratio=16, form="records"))
    assert bool((kept.argmax(-1) == 3).any())


def test_temperature_is_that_of_the_teacher(monkeypatch):
    _, _, split = small("classification")
    sharp, soft = (torch.cat(distilled(monkeypatch, split, epochs=1, temperature=t)).amax(-1).mean() for t in (1.0, 50.0))
    assert soft < sharp


def test_weights_follow_the_accuracy_of_the_class():
    """Records that stay classes: below the threshold nothing pulls, and without distilling nothing moves; a removed class is always pulled."""
    model, task, split = mixed()
    alone = {"lambda2": 0.0, "form": "records", "epochs": 1, "batch_size": 8}
    assert unlearn("scar", model, task, split, threshold=2.0, **alone).outcome == "no_op"
    model, task, split = digits("random")
    split = replace(split, anchor=noise(400))
    assert unlearn("scar", model, task, split, threshold=0.5, ratio=1, lambda2=0.0, epochs=1).outcome == "ok"
    model, task, split = small("classification")
    assert unlearn("scar", model, task, split, threshold=2.0, lambda2=0.0, **QUICK).outcome == "ok"


def test_forms_decide_what_is_removed():
    """A label of which retain has no record is removed; without retain, a forget set of one label."""
    model, task, split = small("classification")

    def digest(s, **settings) -> str:
        return METHODS["scar"](model, task, s, target=0.0, **QUICK, **settings).digest

    assert digest(split) == digest(split, form="class") != digest(split, form="records")
    assert digest(replace(split, retain=None)) == digest(replace(split, retain=None), form="class")
    model, task, split = mixed()
    assert digest(split) == digest(split, form="records")
    assert digest(replace(split, retain=None)) == digest(replace(split, retain=None), form="records")


def test_scar_stops_at_its_target():
    """Accuracy is never above 1: one epoch of two forget batches with three anchor batches each."""
    model, task, split = small("classification")
    attempt = unlearn("scar", model, task, split, target=1.0, ratio=3, epochs=5, batch_size=8)
    assert attempt.meter.steps == 6


@pytest.mark.parametrize("settings", [{}, {"statistics": "anchor"}, {"ratio": 2, "batch_size": 16}, {"target": -1.0}])
def test_scar_cost_is_what_the_meter_counts(settings):
    model, task, split = mixed()
    attempt = unlearn("scar", model, task, split, **{"epochs": 1, "batch_size": 8, "target": 0.0, "form": "records", **settings})
    assert attempt.outcome == "ok", attempt.reason
    assert METHODS["scar"].expected(split, attempt.settings) == (attempt.meter.forward, attempt.meter.backward)


@pytest.mark.parametrize("settings", [{"form": "klass"}, {"ratio": 0}, {"epochs": 0}, {"shrinks": 0}, {"temperature": 0.0}, {"delta": 1.5}])
def test_scar_settings_are_checked(settings):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match="form must be one of auto, class, records, shrinks, ratio and epochs at least 1"):
        METHODS["scar"](model, task, split, **settings)


@pytest.mark.parametrize("settings", [{"order": "both"}, {"latent": 0}, {"temperature": 0.0}, {"align": 0.0}, {"repair": -1.0}])
def test_laf_settings_are_checked(settings):
    model, task, split = small("classification")
    with pytest.raises(SettingError, match="order must be one of turns, joint, latent at least 1"):
        METHODS["laf"](model, task, split, **settings)


def assigned_to(split, model, task, *, three: bool) -> Examples:
    rows = (outputs(model, task, split.anchor).argmax(-1) == 3) == three
    return split.anchor.take(rows.nonzero().squeeze(1))


def test_scar_needs_a_class_to_move_to_and_anchors_to_hold():
    model, task, split = small("classification")
    one = replace(split, retain=split.retain.take((split.retain.y == 5).nonzero().squeeze(1)), forget=replace(split.forget, y=0 * split.forget.y + 5))
    with pytest.raises(SplitError, match="none besides that of the forgotten records"):
        METHODS["scar"](model, task, one, **QUICK)
    with pytest.raises(SplitError, match="assigns every anchor to a removed class"):
        METHODS["scar"](model, task, replace(split, anchor=assigned_to(split, model, task, three=True)), **QUICK)


@pytest.mark.parametrize("part", ["retain", "stored", "anchor"])
def test_scar_forgets_the_class_and_keeps_the_rest(part, tmp_path):
    """With statistics of any source, and no retain set in the split but for the first."""
    model, task, split = toy("classification")
    every = concat(split.forget, split.retain)
    source = str(scar.save(scar.moments(model, task, every, every.y, 10), tmp_path / "s.safetensors")) if part == "stored" else part
    twin = after("scar", model, task, split if part == "retain" else replace(split, retain=None), statistics=source, lr=2e-3)
    assert accuracy(twin, split.forget) < 0.1
    assert accuracy(twin, split.retain) > 0.97


# scar_self


def test_scar_self_reads_no_input_of_forget():
    """Other inputs, or one record of the class: the same patch, however long it runs. The published stop reads them, and nothing else does."""
    model, task, split = small("classification")
    blank = replace(split, forget=replace(split.forget, x=torch.full_like(split.forget.x, 7.0)))
    found = METHODS["scar_self"](model, task, split, stop="anchor", **QUICK)
    for other in (blank, replace(split, forget=split.forget.take([0]))):
        assert METHODS["scar_self"](model, task, other, stop="anchor", **QUICK).digest == found.digest
        assert METHODS["scar_self"](model, task, other, stop="forget", **QUICK).digest == found.digest, "one pass knows no stop"
    five = replace(split, forget=replace(split.forget, y=0 * split.forget.y + 6), retain=None)
    assert METHODS["scar_self"](model, task, five, stop="anchor", **QUICK).digest != found.digest
    with pytest.raises(SettingError, match="stop must be one of forget, anchor, not 'retain'"):
        METHODS["scar_self"](model, task, split, stop="retain")


def test_scar_self_is_scar_on_the_anchors_of_the_class():
    """By hand: those assigned to class 3 are the forget set, shrunk once, stopped at .01."""
    model, task, split = small("classification")
    played = assigned_to(split, model, task, three=True)
    by_hand = replace(split, forget=replace(played, y=torch.full_like(played.y, 3)), anchor=assigned_to(split, model, task, three=False))
    found = METHODS["scar_self"](model, task, split, stop="anchor", **QUICK)
    assert found.digest == METHODS["scar"](model, task, by_hand, shrinks=1, form="class", target=0.01, **QUICK).digest
    assert found.digest != METHODS["scar"](model, task, by_hand, shrinks=2, form="class", target=0.01, **QUICK).digest


def test_scar_self_refuses_what_it_cannot_see():
    model, task, split = small("classification")
    for three, words in ((False, "none of .* anchors to class 3"), (True, "all anchors to the removed class")):
        with pytest.raises(SplitError, match=words):
            METHODS["scar_self"](model, task, replace(split, anchor=assigned_to(split, model, task, three=three)), **QUICK)
    _, _, records = mixed()
    with pytest.raises(SplitError, match="use scar to forget some records of a class"):
        METHODS["scar_self"](model, task, records, **QUICK)


@pytest.mark.parametrize(("reads", "steps"), [("forget", 2), ("anchor", 2)])
def test_scar_self_stops_from_the_second_pass_on(reads, steps):
    """Accuracy is never above 1: two passes of one batch, with two batches to distil each."""
    model, task, split = small("classification")
    attempt = unlearn("scar_self", model, task, split, stop=reads, target=1.0, ratio=2, epochs=5, batch_size=64)
    assert attempt.meter.steps == 2 * steps


@pytest.mark.parametrize("seed", [0, 1])
def test_scar_self_forgets_the_class_and_keeps_the_rest(seed):
    """No retain set, and the stop reads the class itself: at most one record in a hundred is left. Its stand-ins are gone while half of the class is known."""
    model, task, split = toy("classification")
    alone = replace(split, retain=None)
    twin = after("scar_self", model, task, alone, lr=2e-3, seed=seed)
    assert accuracy(twin, split.forget) <= 0.01
    assert accuracy(twin, split.retain) > 0.97
    early = after("scar_self", model, task, replace(alone, forget=split.forget.take([0])), lr=2e-3, stop="anchor", seed=seed)
    assert 0.2 < accuracy(early, split.forget) < 0.85 and accuracy(early, split.retain) > 0.97


def test_scar_self_says_when_the_class_is_still_known():
    model, task, split = toy("classification")
    attempt = unlearn("scar_self", model, task, split, epochs=2)
    assert attempt.outcome == "partial" and "of the forgotten records after 2 epochs: raise epochs or lr" in attempt.reason
