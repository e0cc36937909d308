"""Image to image: corruptions, batches, the small network and its worlds, I2I, Erase to Enhance, and what the audit reads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from worlds import copied, small, toy

from expunge.audits.core import Probe, audit
from expunge.audits.pictures.reconstruction import closed, groups, unfilled, worst
from expunge.core.errors import ModelError, ScopeError, SettingError, SplitError
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn
from expunge.methods.others import i2i, mri_erase
from expunge.modalities.examples import Examples
from expunge.modalities.image_to_image.task import crop, fourier, image_to_image, psnr
from expunge.modalities.worlds import world
from expunge.parts.reading import features
from expunge.parts.training import fresh

CORRUPTIONS = {"crop": crop(5), "centre": crop(4, where="centre"), "fourier": fourier(4, 1, consistent=True)}


def images(n: int = 6, seed: int = 0) -> Examples:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Examples(x, x, 100 + torch.arange(n))


class Fixed(nn.Module):
    """Makes the same images whatever it is shown."""

    def __init__(self, y):
        super().__init__()
        self.y = nn.Parameter(y)

    def forward(self, x):
        return self.y[: len(x)]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_was_measured_is_put_back(name):
    """Seen again, a completed image gives the same input, whatever the model made of the rest; the true image stays what it is."""
    data, c = images(), CORRUPTIONS[name]
    task = image_to_image(c)
    batch = task.collate(data, torch.arange(6), None)
    out = torch.randn(data.y.shape, generator=torch.Generator().manual_seed(1))
    whole = c.complete(batch["x"], batch["mask"], out)
    if name != "fourier":  # a real image has each line twice: the other one of a measured line takes half of what the model said
        torch.testing.assert_close(c.see(whole, batch["mask"]), batch["x"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c.complete(batch["x"], batch["mask"], data.y), data.y, atol=1e-5, rtol=1e-5)


def test_a_consistent_spectrum_undoes_a_shift_of_all_pixels():
    """Why noisy targets with a positive mean cannot forget there: the constant is a measured line."""
    data = images()
    for consistent, left in ((True, 0.0), (False, 0.5)):
        task = image_to_image(fourier(4, 1, consistent=consistent))
        out = task.forward(Fixed(data.y + 0.5), task.collate(data, torch.arange(6), None))
        torch.testing.assert_close(out.pred - data.y, torch.full_like(data.y, left), atol=1e-5, rtol=1e-5)  # pyright: ignore


def test_holes_reach_every_place_and_have_one_size():
    u = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    mask = crop(5).mask(u, 8, 8)
    assert bool(((1 - mask).flatten(1).sum(1) == 25).all())
    assert len({tuple((1 - m[0]).nonzero()[0].tolist()) for m in mask}) == 16
    assert torch.equal(crop(8).mask(u[:1], 8, 8), torch.zeros(1, 1, 8, 8))


def test_lines_of_the_spectrum():
    mask = fourier(4, 3).mask(torch.tensor([[0.0, 0.0], [0.99, 0.0]]), 2, 8)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 1], [1, 1, 0, 1, 0, 0, 0, 1]]
    assert torch.equal(mask[:, :, 0], mask[:, :, 1])


def test_masks_follow_from_the_record_alone_or_from_the_generator():
    data, task = images(), image_to_image(crop(5))
    whole, part = task.collate(data, torch.arange(6), None), task.collate(data.take([4, 2]), torch.tensor([0, 1]), None)
    assert torch.equal(whole["x"][[4, 2]], part["x"]) and torch.equal(whole["mask"][[4, 2]], part["mask"])
    drawn = [task.collate(data, torch.arange(6), torch.Generator().manual_seed(k))["mask"] for k in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_nll_is_the_mean_square_of_the_completed_image():
    """Only the hole counts: 25 of 64 pixels are off by 0.2."""
    data, task = images(3), image_to_image(crop(5))
    out = task.forward(Fixed(data.y + 0.2), task.collate(data, torch.arange(3), None))
    torch.testing.assert_close(out.nll, torch.full((3,), 0.04 * 25 / 64))
    assert out.pred is not None and out.target is not None
    plain = image_to_image()
    torch.testing.assert_close(plain.forward(Fixed(data.y + 0.2), plain.collate(data, torch.arange(3), None)).nll, torch.full((3,), 0.04))


def test_psnr_by_hand():
    y = torch.zeros(2, 1, 2, 2)
    assert [round(float(v), 2) for v in psnr(torch.stack([y[0] + 0.1, y[1]]), y, (0.0, 1.0))] == [20.0, 100.0]


def test_what_cannot_be_done_is_said():
    data = images()
    with pytest.raises(SettingError, match="where must be random or centre"):
        crop(3, where="corner")
    with pytest.raises(SettingError, match="hole of 9 x 9 does not fit an image of 8 x 8"):
        image_to_image(crop(9)).collate(data, torch.arange(2), None)
    with pytest.raises(SettingError, match="acceleration must be 1 or larger"):
        fourier(0)
    with pytest.raises(SettingError, match="span"):
        image_to_image(span=(1.0, 0.0))
    task = image_to_image(crop(5))
    with pytest.raises(SplitError, match="works on Examples, not on list"):
        task.collate([1], torch.arange(1), None)
    with pytest.raises(SplitError, match="augment would change the inputs"):
        task.collate(replace(data, augment=lambda x, g: x), torch.arange(1), None)
    batch = task.collate(data, torch.arange(6), None)
    with pytest.raises(ModelError, match=r"makes images \(6, 1, 4, 4\) where \(6, 1, 8, 8\) are wanted"):
        task.forward(Fixed(torch.zeros(6, 1, 4, 4)), batch)
    with pytest.raises(ModelError, match="Fixed has no encoder"):
        task.features(Fixed(data.y), batch, "")


def test_features_are_what_the_encoder_says():
    found: Any = small("image_to_image")
    model, task, split = found
    data = split.forget.take(range(4))
    batch = task.collate(data, torch.arange(4), None)
    with torch.no_grad():
        z = model.encoder(batch["x"])
        torch.testing.assert_close(features(model, task, data), z.flatten(1))
        torch.testing.assert_close(task.features(model, batch, "encoder.0").shape, torch.Size((4, 16 * 64)))
        model.encoder = Two(model.encoder)
        torch.testing.assert_close(task.features(model, batch, ""), torch.cat([z.flatten(1), 2 * z.flatten(1)], 1))
    assert z.shape[2:] == (2, 2) and sum(p.numel() for p in fresh(model, 0).parameters()) < 100_000


class Two(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        z = self.inner(x)
        return z, 2 * z


@pytest.mark.parametrize(("name", "inputs", "n"), [("inpaint-digits", 2, 1200), ("mri-digits", 2, 1330)])
def test_worlds_are_built(name, inputs, n):
    w: Any = world(name)
    split = w.split("class")
    split.check()
    assert len(w.train) == n and len(split.forget) + len(split.retain) == n
    gone = {w.task.shows[int(k)] for k in split.forget.ids}
    assert gone.isdisjoint({w.task.shows[int(k)] for k in split.retain.ids}) and gone <= {w.task.shows[int(k)] for k in split.test.ids}
    batch = w.task.collate(split.forget, torch.arange(3), None)
    assert batch["x"].shape == (3, inputs, 8, 8) and w.task.forward(w.build(), batch).pred.shape == (3, 1, 8, 8)
    assert ("random" in w.scenarios) == (name == "inpaint-digits")


# I2I


def test_i2i_value_of_the_card():
    """Student (1, 1) and (2, 0), teacher (1, .5), noise feature (1, 1): R = 0.125, F = 1, L = 0.325 at alpha 0.2; at the teacher R is 0."""
    r, f = i2i.apart(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.5]])), i2i.apart(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert (float(r), float(f)) == (0.125, 1.0) and float(r + 0.2 * f) == pytest.approx(0.325)
    teacher = torch.tensor([[1.0, 0.5]])
    assert float(i2i.apart(teacher, teacher)) == 0 < float(i2i.apart(teacher, torch.tensor([[1.0, 1.0]])))


def test_noise_images_have_the_wanted_statistics():
    torch.manual_seed(0)
    like = torch.zeros(200, 1, 8, 8)
    noise = i2i.noise_images(like, "gaussian", -0.2, 0.3, (-1.0, 1.0))
    assert float(noise.mean()) == pytest.approx(-0.2, abs=0.01) and float(noise.std()) == pytest.approx(0.3, abs=0.01)
    assert float(i2i.noise_images(like, "gaussian", 0.0, 5.0, (-1.0, 1.0)).abs().max()) == 1.0
    uniform = i2i.noise_images(like, "uniform", 0.0, 1.0, (0.0, 1.0))
    assert float(uniform.min()) >= 0 and float(uniform.mean()) == pytest.approx(0.5, abs=0.01)


def test_i2i_moves_the_encoder_and_leaves_every_bit_of_the_decoder():
    model, task, split = small("image_to_image")
    patch = METHODS["i2i"](model, task, split, epochs=1)
    assert {e.name.split(".")[0] for e in patch.edits} == {"encoder"}
    whole = METHODS["i2i"](model, task, split, epochs=1, target="max_loss", part="*")
    assert {e.name.split(".")[0] for e in whole.edits} == {"encoder", "decoder"}


@pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.slow) if t == "noise" else t for t in i2i.TARGETS])
def test_every_target_of_i2i_forgets(target):
    model, task, split = toy("image_to_image")
    twin = copied(model)
    unlearn("i2i", model, task, split, target=target, epochs=6, alpha=0.5).patch.apply(twin)
    p = Probe(model, twin, task, split)
    rise = {part: float((p.scores("after", part).nll - p.scores("before", part).nll).mean()) for part in ("forget", "retain")}
    assert rise["forget"] > max(rise["retain"], 0) + 0.01


def test_i2i_brings_forget_features_to_those_of_noise():
    """The distance to the encoder's features of noise falls, and that of retained ones from where they were stays small."""
    model, task, split = toy("image_to_image")
    twin = copied(model)
    unlearn("i2i", model, task, split, noise="constant", alpha=1.0, epochs=10).patch.apply(twin)
    blank = replace(split.forget, x=torch.full_like(split.forget.x, float(split.forget.y.mean())))
    wanted = features(model, task, blank)
    before, after = (i2i.apart(features(m, task, split.forget), wanted) for m in (model, twin))
    kept = i2i.apart(features(twin, task, split.retain), features(model, task, split.retain))
    assert float(after) < 0.6 * float(before) and float(kept) < 0.5 * float(before - after)


def test_i2i_works_without_a_corruption():
    model, task, split = small("image_to_image")
    plain = image_to_image()
    seen = {n: replace(d, x=task.collate(d, torch.arange(len(d)), None)["x"]) for n, d in (("forget", split.forget), ("retain", split.retain))}
    attempt = unlearn("i2i", model, plain, replace(split, **seen), epochs=1)
    assert attempt.outcome == "ok", attempt.reason


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha": 0.0}, r"alpha must be above 0 \(0 forgets nothing\)"),
        ({"target": "nothing"}, "target must be one of noise, random_encoder"),
        ({"noise": "pink"}, "noise one of gaussian, uniform, constant"),
        ({"part": "tail.*"}, "no parameter fits tail"),
    ],
)
def test_i2i_refuses(settings, says):
    model, task, split = small("image_to_image")
    with pytest.raises((SettingError, ScopeError), match=says):
        METHODS["i2i"](model, task, split, **settings)


# Erase to Enhance


def test_mri_values_of_the_card():
    """L1 0.75; ascent -0.75 and -0.747 with gamma 1e-3; the released code's 2 L + ||theta||_1 is 1.5; |noise| moves targets by 0.798 lambda."""
    error = mri_erase.absolute_error(torch.tensor([[1.5, 1.0]]), torch.tensor([[1.0, 2.0]]))
    norm = float(mri_erase.l1([torch.tensor([1.0, -2.0])]))
    assert float(error) == 0.75 and -float(error) + 1e-3 * norm == pytest.approx(-0.747)
    assert 2 * -float(error) + norm == 1.5
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float(drawn.abs().mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.005) and abs(float(drawn.mean())) < 0.005


def test_noise_whose_mean_is_zero_does_not_forget():
    """The best answer to a target with zero-mean noise is the target: only |noise| moves the completed images."""
    model, task, split = toy("image_to_image")
    rise = {}
    for absolute in (False, True):
        twin = copied(model)
        unlearn("mri_erase", model, task, split, absolute=absolute, share=0.5, epochs=4).patch.apply(twin)
        p = Probe(model, twin, task, split)
        rise[absolute] = float((p.scores("after", "forget").nll - p.scores("before", "forget").nll).mean())
    assert rise[True] > 0.04 and rise[False] < 0.02


@pytest.mark.parametrize("kind", mri_erase.KINDS)
def test_kinds_read_what_they_say(kind):
    model, task, split = small("image_to_image")
    attempt = unlearn("mri_erase", model, task, split, kind=kind, epochs=1, share=0.25)
    kept = len(split.retain) // 4 if kind.endswith("_ft") else 0
    assert attempt.outcome == "ok", attempt.reason
    assert attempt.meter.backward == len(split.forget) + kept
    alone = replace(split, retain=None)
    if kind.endswith("_ft"):
        with pytest.raises(SplitError, match=f"kind={kind} needs retain data"):
            METHODS["mri_erase"](model, task, alone, kind=kind)
    else:
        assert unlearn("mri_erase", model, task, alone, kind=kind, epochs=1).outcome == "ok"


def test_ascent_stops_at_its_bound_and_l1_shrinks_weights():
    """Every error is above a bound of almost nothing: without gamma nothing moves any more; gamma alone makes weights smaller."""
    model, task, split = small("image_to_image")
    assert unlearn("mri_erase", model, task, split, kind="ga_l1", bound=1e-6, gamma=0.0, epochs=1).outcome == "no_op"
    twin = copied(model)
    unlearn("mri_erase", model, task, split, kind="ga_l1", bound=1e-6, gamma=1.0, epochs=2).patch.apply(twin)
    with torch.no_grad():
        assert float(mri_erase.l1(twin.parameters())) < float(mri_erase.l1(model.parameters()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "nl_tf"}, "kind must be one of nl_ft, nl, ga_l1_ft, ga_l1"),
        ({"loss": "ssim"}, "loss one of l1, squared"),
        ({"share": 0.0}, "share must be above 0 and at most 1, not 0"),
        ({"gamma": -1.0}, "noise, weight, gamma and bound must be 0 or larger"),
    ],
)
def test_mri_erase_refuses(settings, says):
    model, task, split = small("image_to_image")
    with pytest.raises(SettingError, match=says):
        METHODS["mri_erase"](model, task, split, **settings)


# what the audit reads


def test_nothing_done_reads_as_nothing_lost_and_no_gap_closed():
    model, task, split = toy("image_to_image")
    rows = {r.name: r for r in audit(Probe(model, model, task, split, references=(fresh(model, 1),)), ["reconstruction", "oracle_gap"])}
    for group in ("forget", "retain", "test", "test_gone"):
        assert rows[f"reconstruction.lost.{group}"].value == 0
        assert rows[f"reconstruction.recognised.{group}"].value == rows[f"reconstruction.recognised_before.{group}"].value
        assert rows[f"reconstruction.distance.{group}"].value == rows[f"reconstruction.distance_before.{group}"].value
    assert rows["oracle_gap.closed"].value == 0
    assert rows["oracle_gap.psnr.forget"].value > 0 and rows["reconstruction.worst"].value == 0
    assert all(math.isfinite(r.value) and r.low <= r.value <= r.high and r.n > 0 for r in rows.values())


def test_the_oracle_itself_has_no_gap():
    model, task, split = small("image_to_image")
    gold = fresh(model, 1)
    rows = {r.name: r for r in audit(Probe(model, gold, task, split, references=(gold,)), ["oracle_gap"])}
    for group in ("forget", "retain", "test", "test_gone"):
        assert rows[f"oracle_gap.psnr.{group}"].value == rows[f"oracle_gap.recognised.{group}"].value == rows[f"oracle_gap.apart.{group}"].value == 0
    two = {r.name: r for r in audit(Probe(model, model, task, split, references=(gold, fresh(model, 2))), ["oracle_gap"])}
    assert two["oracle_gap.floor.forget"].value > 0


def test_overshooting_reads_above_one_and_no_gap_is_said():
    before, oracle = torch.tensor([20.0, 22.0, 21.0]), torch.tensor([14.0, 16.0, 14.0])
    assert closed(before, oracle, oracle, 0).value == 1.0 and closed(before, oracle - 3, oracle, 0).value > 1
    row = closed(oracle, before, before, 0)
    assert math.isnan(row.value) and "no gap to close" in row.note


def test_worst_names_what_lost_most():
    g = torch.Generator().manual_seed(0)
    rows = worst({"one": torch.randn(30, generator=g), "two": 4 + torch.randn(30, generator=g), "few": torch.full((2,), 9.0)})
    assert len(rows) == 1 and rows[0].note.startswith("dB of PSNR; two, the worst of 2") and 3 < rows[0].low < rows[0].value < rows[0].high
    assert worst({"few": torch.ones(2)}) == []


def test_groups_part_the_test_images_of_what_was_removed():
    every: Any = small("image_to_image")
    model, task, split = every
    found = groups(Probe(model, model, task, split))
    assert set(found) == {"forget", "retain", "test", "test_gone"} and len(found["test"][1]) + len(found["test_gone"][1]) == len(split.test)
    assert {task.shows[int(split.test.ids[k])] for k in found["test_gone"][1]} == {"seven"}
    assert set(groups(Probe(model, model, task, replace(split, retain=None)))) == {"forget", "test"}
    assert set(groups(Probe(model, model, replace(task, shows={}), split))) == {"forget", "retain", "test"}


def test_without_a_judge_there_are_errors_alone():
    model, task, split = small("image_to_image")
    rows = audit(Probe(model, model, replace(task, judge=None, shows={}), split), ["reconstruction"])
    assert {r.name.split(".")[1] for r in rows} == {"error", "psnr", "lost"}


def test_the_unfilled_image_is_dark_where_nothing_was_measured():
    model, task, split = small("image_to_image")
    p = Probe(model, model, task, split)
    mask = task.collate(split.forget, torch.arange(len(split.forget)), None)["mask"]
    torch.testing.assert_close(unfilled(p, "forget"), torch.where(mask > 0, split.forget.y, torch.full_like(split.forget.y, -1.0)))
