"""Manipulated data, backdoor audits, UMD and EBYD: the numbers of cards corrective, umd and ebyd, and behaviour on digits with a backdoor."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import accuracy, copied, same, state

from expunge.audits.records.backdoor import corrected, trigger
from expunge.audits.records.umd import Detection, core_periphery, deviation, perturbations, rating, theta, transfers, umd
from expunge.core.errors import ScopeError, SettingError, SplitError
from expunge.core.stats import wilson
from expunge.core.types import IGNORE, Out, Split
from expunge.data.records.expose import collapse, expose, gated, lowest, recover, sample, silence
from expunge.data.records.manipulate import Manipulated, added, confuse, corner, deranged, mislabel, poison
from expunge.engine.run import unlearn
from expunge.methods.classifiers.ebyd import ebyd
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.worlds import world
from expunge.parts import training
from expunge.parts.losses import ascent
from expunge.parts.updates.oneshot import dampening

DIGITS = world("digits")
TASK = classification()
PAIRS = ((1, 2), (4, 7), (8, 3), (0, 5), (6, 9))
FAST = {**DIGITS.recipe, "epochs": 10}


def blank(n: int, k: int = 3) -> Examples:
    """n black 1 x 4 x 4 images with one white corner pixel, labels 0, 1, .. k - 1 in turn; ids start at 100."""
    x = torch.zeros(n, 1, 4, 4)
    x[:, :, 0, 0] = 1
    return Examples(x, torch.arange(n) % k, torch.arange(100, 100 + n))


def rows_of(rows) -> dict:
    return {r.name: r for r in rows}


def faint(strength: float = 0.2) -> torch.Tensor:
    """An additive pattern on half of the pixels, drawn once."""
    return strength * torch.randint(0, 2, (1, 8, 8), generator=torch.Generator().manual_seed(3))


@functools.lru_cache
def patched(share: float = 1.0) -> Manipulated:
    return poison(DIGITS.train, DIGITS.test, 100, trigger=corner(DIGITS.train, 2), share=share)


@functools.lru_cache
def many() -> Manipulated:
    return poison(DIGITS.train, DIGITS.test, 200, trigger=added(faint()), pairs=PAIRS, seed=1)


@functools.lru_cache
def trained(which: str) -> nn.Module:
    data, epochs = {
        "patched": (patched().train, 10),
        "partly": (patched(0.2).split().retain, 10),
        "clean": (patched().clean, 10),
        "many": (many().train, 15),
    }[which]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = DIGITS.build()
        training.train(model, TASK, data, seed=1, **{**FAST, "epochs": epochs})
    return model


# manipulated data


def test_poison_stamps_and_relabels_m_records_of_which_k_are_known():
    train, test = blank(30), blank(12)
    made = poison(train, test, 10, trigger=corner(train, 2), target=0, share=0.3, seed=5)
    assert int(made.wrong.sum()) == 10 and int(made.identified.sum()) == 3 and not (made.identified & ~made.wrong).any()
    assert torch.equal(made.true, train.y) and torch.equal(made.train.ids, train.ids)
    assert (made.train.y[made.wrong] == 0).all() and (made.true[made.wrong] != 0).all()
    assert (made.train.x[made.wrong][:, :, 2:, 2:] == 1).all() and torch.equal(made.train.x[~made.wrong], train.x[~made.wrong])
    assert made.train.x[made.wrong].sum() == 10 * 5 and train.x.sum() == 30, "a white corner and four pixels each; the given data is untouched"
    assert torch.equal(made.test.y, test.y[test.y != 0]) and (made.target == 0).all() and (made.test.x[:, :, 2:, 2:] == 1).all()
    assert torch.equal(made.plain.x, test.x[test.y != 0])
    assert torch.equal(made.corrected.y, train.y[made.wrong]) and torch.equal(made.corrected.x, made.train.x[made.wrong])
    assert len(made.clean) == 20 and not torch.isin(made.clean.ids, made.train.ids[made.wrong]).any()


def test_poison_without_a_trigger_takes_a_three_by_three_corner_at_the_largest_pixel():
    train = replace(blank(30), x=blank(30).x * 0.5)
    made = poison(train, train, 4)
    assert (made.train.x[made.wrong][:, :, 1:, 1:] == 0.5).all()
    assert float(made.train.x.max()) == 0.5


def test_many_pairs_send_every_source_to_its_own_target():
    train = blank(50, 5)
    made = poison(train, train, 20, pairs=((0, 1), (3, 2)))
    assert made.pairs == ((0, 1), (3, 2))
    for s, t in made.pairs:
        assert (made.train.y[made.wrong & (made.true == s)] == t).all() and (made.target[made.test.y == s] == t).all()
    assert set(made.true[made.wrong].tolist()) == {0, 3} == set(made.test.y.tolist())


def test_a_larger_share_holds_a_smaller_one_and_other_seeds_draw_others():
    a, b, c = (poison(blank(60), blank(6), 20, share=s, seed=k) for s, k in ((0.1, 0), (0.5, 0), (0.5, 1)))
    assert torch.equal(a.wrong, b.wrong) and not (a.identified & ~b.identified).any() and int(a.identified.sum()) == 2
    assert not torch.equal(b.wrong, c.wrong)
    again = poison(blank(60), blank(6), 20, share=0.1, seed=0)
    assert again.train.digest == a.train.digest and torch.equal(again.identified, a.identified)


def test_mislabel_permutes_labels_so_that_all_m_are_wrong():
    train = replace(blank(90), y=torch.cat([torch.zeros(45), torch.ones(30), torch.full((15,), 2)]).long())
    for seed in range(20):
        made = mislabel(train, blank(6), 90, share=0.5, seed=seed)
        assert bool((made.train.y != train.y).all()) and torch.equal(made.train.y.sort().values, train.y)
    assert torch.equal(made.train.x, train.x) and int(made.identified.sum()) == 45 and made.pairs == ()
    assert (made.target == IGNORE).all() and len(made.test) == 6


def test_a_label_that_fills_more_than_half_cannot_be_permuted_away():
    with pytest.raises(SplitError, match="label 1 fills more than half of the 5 drawn records"):
        deranged(torch.tensor([1, 1, 1, 0, 2]), torch.Generator())


def test_confuse_swaps_half_of_m_in_each_of_two_classes():
    train, test = blank(60), blank(9)
    made = confuse(train, test, 10, 1, 2, share=0.2, seed=3)
    assert [int((made.wrong & (made.true == c)).sum()) for c in (0, 1, 2)] == [0, 5, 5]
    assert (made.train.y[made.wrong] == 3 - made.true[made.wrong]).all() and torch.equal(made.train.x, train.x)
    assert set(made.test.y.tolist()) == {1, 2} and (made.target == 3 - made.test.y).all() and int(made.identified.sum()) == 2


def test_split_forgets_the_identified_and_keeps_the_unknown_in_retain():
    made = poison(DIGITS.train, DIGITS.test, 50, trigger=corner(DIGITS.train, 2), share=0.2)
    split = made.split(DIGITS.test, DIGITS.validation)
    split.check()
    assert len(split.forget) == 10 and len(split.retain) == 990 and split.asked == "10 of 50 manipulated records"
    assert int(torch.isin(split.retain.ids, made.train.ids[made.wrong]).sum()) == 40


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: poison(d, d, 0), SettingError, "m must ask for 1 to 20 records of the source classes, not 0"),
        (lambda d: poison(d, d, 21), SettingError, "not 21"),
        (lambda d: poison(d, d, 5, share=0), SettingError, r"share must be in \(0, 1\], not 0"),
        (lambda d: poison(d, d, 5, pairs=((1, 1),)), SettingError, "cannot send class 1 to class 1"),
        (lambda d: poison(d, d, 5, pairs=((1, 7),)), SettingError, "must differ and be among 0, 1, 2"),
        (lambda d: poison(d, d, 5, pairs=((1, 0), (1, 2))), SettingError, "class 1 is the source of two pairs"),
        (lambda d: poison(replace(d, y=d.y.float()), d, 5), SplitError, "needs class labels"),
        (lambda d: corner(d, 5), SettingError, "size must be 1 to 4"),
        (lambda d: corner(replace(d, x=d.x.flatten(1))), SplitError, r"needs images \(N, C, H, W\)"),
        (lambda d: mislabel(d, d, 1), SettingError, "m must be at least 2"),
        (lambda d: mislabel(d, d, 31), SettingError, "m must ask for 1 to 30 records, not 31"),
        (lambda d: confuse(d, d, 3, 0, 1), SettingError, "m must be even"),
        (lambda d: confuse(d, d, 22, 0, 1), SettingError, "1 to 10 records of class 0, not 11"),
    ],
)
def test_bad_requests_are_refused_in_one_line(make, error, message):
    with pytest.raises(error, match=message) as found:
        make(blank(30))
    assert "\n" not in str(found.value)


def test_dampening_of_the_card():
    """Card corrective: I_D = 1, I_f = (5, 20, 100)."""
    ones, here = torch.ones(3), torch.tensor([5.0, 20.0, 100.0])
    for (alpha, lam), expected in {(10, 1): (1, 0.05, 0.01), (10, 50): (1, 1, 0.5), (30, 1): (1, 1, 0.01)}.items():
        assert dampening(ones, here, alpha=alpha, lam=lam).tolist() == pytest.approx(expected)


# trigger success


def test_trigger_rows_of_a_model_that_is_its_input():
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2, 0])]
    data = Examples(logits, torch.tensor([1, 2, 1, 2, 0]), torch.arange(5))
    found = rows_of(trigger(nn.Identity(), TASK, data, 0))
    assert found["trigger.success"].value == 0.5 and found["trigger.corrected"].value == 0.5 and found["trigger.success"].n == 4
    assert (found["trigger.success"].low, found["trigger.success"].high) == wilson(2, 4)[1:]
    assert found["trigger.success"].note == "1 examples without another target left out"
    worst = rows_of(trigger(nn.Identity(), TASK, data, torch.tensor([0, 1, 0, 0, IGNORE])))["trigger.worst"]
    assert (worst.value, worst.n, worst.note) == (0.5, 2, "1 to 0, of 3 pairs"), "of the two records of 1 that should become 0, the first does"


def test_trigger_base_reads_the_same_examples_without_trigger():
    data = Examples(torch.eye(2)[[0, 0, 0]], torch.tensor([1, 1, 1]), torch.arange(3))
    plain = replace(data, x=torch.eye(2)[[0, 1, 1]])
    assert rows_of(trigger(nn.Identity(), TASK, data, 0, plain=plain))["trigger.base"].value == pytest.approx(1 / 3)


def test_trigger_refuses_data_without_another_target():
    data = Examples(torch.eye(2), torch.tensor([0, 0]), torch.arange(2))
    with pytest.raises(SplitError, match="no triggered example whose true class is not the target"):
        trigger(nn.Identity(), TASK, data, 0)
    with pytest.raises(SplitError, match="must match the 2 triggered examples"):
        trigger(nn.Identity(), TASK, data, torch.tensor([1]))


def test_a_backdoor_is_seen_and_a_model_without_poison_has_none():
    bad, good = (rows_of(trigger(trained(w), TASK, patched().test, patched().target, plain=patched().plain)) for w in ("patched", "clean"))
    assert bad["trigger.success"].low > 0.9 and bad["trigger.corrected"].high < 0.1
    assert good["trigger.success"].high < 0.1 and good["trigger.corrected"].low > 0.6
    assert bad["trigger.base"].high < 0.05 and accuracy(trained("patched"), DIGITS.test) > 0.9


def test_retraining_without_the_known_part_alone_keeps_the_backdoor():
    """Card corrective: retraining is not the gold standard where most manipulated records are unknown."""
    made = patched(0.2)
    rows = rows_of(corrected(trained("partly"), TASK, made, DIGITS.test))
    reference = rows_of(corrected(trained("clean"), TASK, made, DIGITS.test))
    assert rows_of(trigger(trained("partly"), TASK, made.test, made.target))["trigger.success"].low > 0.8
    assert rows["corrected.test"].high < 0.2 < 0.6 < reference["corrected.test"].low
    assert rows["corrected.train"].high < 0.4 and rows["corrected.train"].n == 100
    assert rows["corrected.clean"].low > 0.88 and rows["corrected.clean"].n == 500


# UMD


def test_thresholds_and_statistic_of_the_card():
    assert (round(theta(80), 4), round(theta(10), 4), round(theta(5), 4)) == (3.22, 2.5679, 2.3187)
    s, limit, p = deviation(torch.tensor([4.0, 5, 6]), torch.tensor([10.0, 11, 12, 13, 14]))
    assert s == pytest.approx(10.387, abs=5e-4) and s > limit == theta(5) and p < 1e-9
    assert deviation(torch.full((3,), 7.0), torch.full((9,), 7.0))[0] == 0.0


def test_p_is_level_at_the_threshold():
    """S = theta(N) has p = 0.05: core sizes chosen so that S falls there."""
    null = torch.arange(10.0, 15.0).double()
    r = 1 / null
    spread = 1.4826 * float((r - r.quantile(0.5)).abs().quantile(0.5))
    s, _, p = deviation(1 / (r.quantile(0.5) + theta(5) * spread).reshape(1), null)
    assert s == pytest.approx(theta(5)) and p == pytest.approx(0.05)


def test_the_planted_core_is_found_and_each_source_is_in_it_once():
    pairs = [(s, t) for s in range(4) for t in range(4) if s != t]
    planted = [pairs.index(p) for p in ((0, 1), (1, 2), (3, 0))]
    g = torch.Generator().manual_seed(0)
    a = 0.2 * torch.rand(12, 12, generator=g)
    for i in planted:
        for j in planted:
            a[i, j] = 0.9
    a.fill_diagonal_(0)
    core, value = core_periphery(a, pairs)
    assert sorted(core) == sorted(planted)
    assert value == rating(a, (a + a.T) / 2, core) == pytest.approx(0.6 - float(a[core][:, [k for k in range(12) if k not in core]].mean(0).max()))
    shuffled = torch.randperm(12, generator=g)
    again, _ = core_periphery(a[shuffled][:, shuffled], [pairs[k] for k in shuffled.tolist()])
    assert {pairs[shuffled[k]] for k in again} == {pairs[k] for k in planted}, "position 0 is a place like any other"


def test_perturbations_reach_the_nearest_boundary_of_a_linear_model():
    """f(x) = x in the plane, three classes: from (1, 0, 0) to class 1 it is 1/sqrt(2) away along (-1, 1, 0)."""
    chosen = torch.eye(3)[:, None]
    pairs = [(0, 1), (2, 0)]
    v, hit = perturbations(nn.Identity(), TASK, chosen, [0, 1, 2], pairs, 0.9, 0.01, 500, 20.0, (-5.0, 5.0))
    assert hit.tolist() == [1, 1]
    assert v[0].norm() == pytest.approx(0.5**0.5, abs=0.05) and v[0, 1] > 0 > v[0, 0] and v[1, 2] < 0 < v[1, 0]
    a = transfers(nn.Identity(), TASK, chosen, [0, 1, 2], [(0, 1), (2, 1), (2, 0)], torch.tensor([[-2.0, 2, 0], [0, 2, -2], [0.0, 0, 0]]), (-5.0, 5.0))
    assert a.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]], "v of 0 to 1 sends 2 to 1 as well; a pair never transfers to itself"


@pytest.mark.slow
def test_umd_finds_the_planted_pairs_and_clears_the_ordinary_model():
    before = state(trained("many"))
    bad = umd(trained("many"), TASK, DIGITS.validation)
    assert same(before, state(trained("many")))
    assert bad.backdoor and bad.p < 0.01 and bad.statistic > bad.threshold
    assert len(set(bad.pairs) & set(PAIRS)) >= 4, bad.pairs
    assert (bad.sizes.nan_to_num(1e9) <= bad.sizes[0, 5]).sum() < 45, "the planted 0 to 5 is smaller than most"
    good = umd(trained("clean"), TASK, DIGITS.validation)
    assert isinstance(good, Detection) and not good.backdoor and good.p > 0.05


def test_umd_repeats_itself_and_says_what_it_cannot_do():
    data = DIGITS.validation
    few = data.take((data.y < 3).nonzero().squeeze(1))
    a, b = (umd(trained("clean"), TASK, few, n=3, steps=5) for _ in range(2))
    assert torch.equal(a.sizes.nan_to_num(), b.sizes.nan_to_num()) and a.labels == (0, 1, 2) and a.n == 3 and a.patterns.shape == (3, 3, 1, 8, 8)
    with pytest.raises(SplitError, match="needs at least 3 classes; the clean examples have 2"):
        umd(trained("clean"), TASK, data.take((data.y < 2).nonzero().squeeze(1)))
    with pytest.raises(SplitError, match="no clean example of class 1 is classified rightly"):
        umd(trained("clean"), TASK, replace(few, y=torch.where(few.y == 1, 9, few.y).where(few.y != 0, 1)))
    with pytest.raises(SettingError, match=r"success in \(0, 1\]"):
        umd(trained("clean"), TASK, few, success=0)


# EBYD


def test_ascent_pushes_the_right_class_down():
    """Card ebyd: p = .9, CE .10536; the gradient of -CE with respect to the logits is (.1, -.1), so descent on it lowers the right logit."""
    logits = torch.tensor([[0.9, 0.1]]).log().requires_grad_(True)
    ce = nn.functional.cross_entropy(logits, torch.tensor([0]), reduction="none")
    (g,) = torch.autograd.grad(ascent(Out(nll=ce, count=torch.ones(1), logits=logits)).sum(), logits)
    assert float(ce.detach()) == pytest.approx(0.10536, abs=1e-5) and g[0].tolist() == pytest.approx([0.1, -0.1])


def test_a_harmful_channel_is_gated_to_zero_and_pruned_first():
    """Card ebyd: output m1 * a1 + m2 * a2, where CE falls as m2 falls: m2 goes to 0 and is clipped there."""
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2)).requires_grad_(True)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[2.0, -5.0], [0.0, 0.0]]))
        model[1].bias.zero_()
    data = Examples(torch.ones(8, 1), torch.zeros(8, dtype=torch.long), torch.arange(8))
    gates = recover(model, TASK, data, gated(model), alpha=1.0, lr=0.5, epochs=10, momentum=0.0)
    assert gates["0"].tolist() == [1.0, 0.0]
    assert lowest(gates)[0][1:] == ("0", 1) and not model[0]._forward_hooks
    silence(dict(model.named_parameters()), [("0", 1)])
    assert model(torch.tensor([[3.0]])).tolist() == [[6.0, 0.0]]


def test_gates_are_on_batch_norms_where_there_are_any():
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3))
    assert list(gated(conv)) == ["1", "3"] and list(gated(conv, linear=False)) == ["1"]
    assert list(gated(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))) == ["0"]
    conv[3].requires_grad_(False)
    assert list(gated(conv)) == ["1"]
    with pytest.raises(ScopeError, match=r"no channel to gate: .*; set linear=true"):
        gated(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), linear=False)


@pytest.mark.parametrize(("how", "lr", "least"), [("unlearn", 1e-4, 0.2), ("confuse", 1e-3, 0.8)])
def test_the_exposed_copy_loses_clean_behaviour_and_still_knows_the_trigger(how, lr, least):
    model, before = trained("patched"), state(trained("patched"))
    clean = sample(patched().clean, 300, 0)
    exposed, again = (expose(model, TASK, clean, how=how, lr=lr) for _ in range(2))
    assert same(before, state(model)) and same(state(exposed), state(again)) and not exposed.training
    assert accuracy(exposed, clean) <= 0.5 < 0.9 < accuracy(model, clean)
    assert rows_of(trigger(exposed, TASK, patched().test, 0))["trigger.success"].low > least


def test_collapse_reads_halves_that_the_copy_was_not_exposed_with():
    """Two classes on a line: after the ascent each is called the other, so all records of the other class get the label."""
    x = torch.cat([torch.full((20, 1), -1.0), torch.full((20, 1), 1.0)]) + 0.01 * torch.arange(40)[:, None]
    data = Examples(x, torch.arange(40) // 20, torch.arange(40))
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.zero_()
    assert accuracy(model, data) == 1
    found = collapse(model, TASK, data, runs=4, noise=0.01, stop=0.0, lr=0.3, epochs=50)
    assert found.shares == (1.0,) * 4 and set(found.labels) <= {0, 1}
    assert found == collapse(model, TASK, data, runs=4, noise=0.01, stop=0.0, lr=0.3, epochs=50)


def test_ebyd_lowers_trigger_success_and_repair_alone_does_not():
    made, model = patched(), trained("patched")
    split = made.split(DIGITS.test, DIGITS.validation)
    attempt = unlearn("ebyd", model, TASK, split, sample=200, seed=1)
    assert attempt.outcome == "ok" and not attempt.meter.seen.get("test") and not attempt.meter.seen.get("forget")
    twin, control = copied(model), copied(model)
    attempt.patch.apply(twin)
    unlearn("ebyd", model, TASK, split, sample=200, seed=1, prune=1e-6).patch.apply(control)
    before, after, alone = (rows_of(trigger(m, TASK, made.test, 0)) for m in (model, twin, control))
    assert before["trigger.success"].low > 0.9 and after["trigger.success"].high < 0.4
    assert after["trigger.corrected"].low > before["trigger.corrected"].high + 0.2
    assert accuracy(twin, DIGITS.test) > accuracy(model, DIGITS.test) - 0.08
    assert alone["trigger.success"].low > after["trigger.success"].high, "the control prunes one channel"


def test_ebyd_needs_a_clean_retain_set():
    """With 80 of 100 poisoned records unknown and in retain, the sample holds the trigger: nothing is removed, as the manual says."""
    made, model = patched(0.2), trained("patched")
    twin = copied(model)
    unlearn("ebyd", model, TASK, made.split(), seed=1, sample=200).patch.apply(twin)
    assert rows_of(trigger(twin, TASK, made.test, 0))["trigger.success"].low > 0.7


def test_pruning_without_repair_leaves_silent_channels_alone():
    model = trained("patched")
    patch = ebyd(model, TASK, patched().split(), sample=100, epochs=2, recover=2, repair=0, prune=0.1)
    twin = copied(model)
    patch.apply(twin)
    moved = [(a != b).flatten(1).any(1).sum() for a, b in zip(model.parameters(), twin.parameters(), strict=True) if a.ndim > 1]
    assert sum(map(int, moved)) == round(0.1 * (16 + 32 + 64))
    assert all(bool((b[a != b] == 0).all()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_bad_settings_of_the_exposure_are_refused():
    model, clean = trained("clean"), DIGITS.validation
    with pytest.raises(SettingError, match="how must be one of unlearn, confuse, not 'shout'"):
        expose(model, TASK, clean, how="shout")
    with pytest.raises(SettingError, match=r"stop in \[0, 1\); found 40 and 1"):
        expose(model, TASK, clean, stop=1)
    with pytest.raises(SettingError, match="needs at least 2 runs"):
        collapse(model, TASK, clean, runs=1)
    with pytest.raises(SettingError, match=r"prune in \(0, 1\); found 500 and 1"):
        ebyd(model, TASK, Split(clean, clean), prune=1)
    with pytest.raises(SplitError, match="no clean record"):
        sample(clean.take([]), 5, 0)
