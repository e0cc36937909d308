"""Calibrated attacks, epsilon bounds, the competition score: the card's numbers, slow oracles, and bad input."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from worlds import digits, retrained

from expunge.audits import named, pool, power
from expunge.audits.attacks import restore
from expunge.audits.core import Probe, Row, audit, gate
from expunge.audits.membership import attacks, competition, epsilon
from expunge.core.errors import ModelError, SettingError
from expunge.core.stats import auc, wilson
from expunge.core.types import Split
from expunge.data.records import worst
from expunge.engine import stacked
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts import reading, training
from expunge.parts.reading import score


def points(n: int = 200, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return Examples(x, (x @ torch.randn(6, 3, generator=g)).argmax(1), torch.arange(n))


RECIPE = {"epochs": 3, "batch_size": 16, "lr": 0.1, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}


@pytest.mark.parametrize(("build", "shape"), [(lambda: nets.mlp(6, 3, 8), (6,)), (lambda: nets.ResNet(1, 3, 4, 1), (1, 8, 8))])
@pytest.mark.parametrize("chunk", [5, 2])
def test_stacked_training_ends_where_each_model_ends_alone(build, shape, chunk):
    g = torch.Generator().manual_seed(3)
    data = Examples(torch.randn(96, *shape, generator=g), torch.randint(0, 3, (96,), generator=g), torch.arange(96))
    models = []
    for k in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(k)
            models.append(build())
    parts = [data.take(torch.randperm(96, generator=torch.Generator().manual_seed(k))[:50]) for k in range(5)]
    alone, together = copy.deepcopy(models), copy.deepcopy(models)
    for k, (model, part) in enumerate(zip(alone, parts, strict=True)):
        training.train(model, classification(), part, seed=k, **RECIPE)
    stacked.train(together, classification(), parts, seeds=range(5), chunk=chunk, **RECIPE)
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-4)
    each = torch.stack([reading.outputs(m, classification(), data) for m in together])
    torch.testing.assert_close(stacked.logits(together, classification(), data), each, atol=1e-5, rtol=1e-4)


def test_stacks_that_cannot_be():
    data = points(20)
    with pytest.raises(SettingError, match="as many parts and seeds as models"):
        stacked.train([nets.mlp(6, 3, 8)] * 2, classification(), [data, data.take([0])], seeds=[0], **RECIPE)
    with pytest.raises(SettingError, match="dropout"):
        stacked.train([nn.Sequential(nn.Linear(6, 3), nn.Dropout())], classification(), [data], seeds=[0], **RECIPE)
    with pytest.raises(SettingError, match="no option 'clip'"):
        stacked.train([nets.mlp(6, 3, 8)], classification(), [data], seeds=[0], clip=1.0, **RECIPE)


def test_lira_against_scipy():
    g = torch.Generator().manual_seed(0)
    shadows, inside = torch.randn(12, 7, generator=g, dtype=torch.double), torch.zeros(12, 7, dtype=torch.bool)
    inside[:6] = True
    phi = torch.randn(7, generator=g, dtype=torch.double)
    got = attacks.lira(phi, shadows, inside, pooled=False)
    for j in range(7):
        a, b = shadows[:6, j].numpy(), shadows[6:, j].numpy()
        want = norm.logpdf(phi[j], a.mean(), a.std(ddof=1)) - norm.logpdf(phi[j], b.mean(), b.std(ddof=1))
        assert float(got[j]) == pytest.approx(want, rel=1e-9)
    offline = attacks.lira(phi, shadows, inside, online=False, pooled=False)
    assert float(offline[2]) == pytest.approx(norm.logcdf(phi[2], shadows[6:, 2].mean(), shadows[6:, 2].std()), rel=1e-9)
    with pytest.raises(SettingError, match="at least 2"):
        attacks.lira(phi, shadows, torch.ones_like(inside))


def test_lira_tells_members_of_a_known_model():
    """phi ~ N(2, 1) for members, N(0, 1) for others, each point shifted by its own hardness: a population threshold reads less."""
    g = torch.Generator().manual_seed(1)
    n, k = 2000, 32
    hard = 3 * torch.randn(n, generator=g)
    inside = torch.rand(k, n, generator=g) < 0.5
    shadows = hard + 2 * inside + torch.randn(k, n, generator=g)
    member = torch.rand(n, generator=g) < 0.5
    phi = hard + 2 * member + torch.randn(n, generator=g)
    score = attacks.lira(phi, shadows, inside)
    best = norm.cdf(math.sqrt(2))  # AUC of two unit Gaussians two apart
    assert auc(score[member], score[~member])[0] == pytest.approx(best, abs=0.02)
    assert auc(phi[member], phi[~member])[0] < 0.7


def test_rmia_against_a_loop():
    g = torch.Generator().manual_seed(2)
    p, refs, z, z_refs = (torch.rand(*s, generator=g) for s in ((9,), (4, 9), (11,), (4, 11)))
    got = attacks.rmia(p, refs, z, z_refs, a=0.4, gamma=1.2)
    for i in range(9):
        mine = p[i] / (0.7 * refs[:, i].mean() + 0.3)
        wins = sum(float(mine / (z[j] / (0.7 * z_refs[:, j].mean() + 0.3))) > 1.2 for j in range(11))
        assert float(got[i]) == pytest.approx(wins / 11)


def test_epsilon_bounds_of_the_card():
    bound = epsilon.lower_bound
    assert epsilon.epsilon(0.4, 0.05, 1e-5) == pytest.approx(2.485, abs=5e-4)
    assert epsilon.upper(40, 100, alpha=0.025) == pytest.approx(0.50279, abs=5e-6)
    assert bound(40, 100, 5, 100, form="clopper_pearson") == pytest.approx(1.4831, abs=5e-5)
    assert bound(40, 100, 5, 100, form="jeffreys") == pytest.approx(1.5547, abs=5e-5)
    assert bound(40, 100, 5, 100) == pytest.approx(1.815, abs=0.01)
    assert all(bound(50, 100, 50, 100, form=f) == 0 for f in epsilon.FORMS)
    with pytest.raises(SettingError, match="form must be"):
        bound(1, 2, 1, 2, form="exact")


def test_competition_score():
    g = np.random.default_rng(0)
    same = torch.tensor(g.normal(size=(512, 2)))
    other = torch.tensor(g.normal(size=(512, 2)))
    assert competition.separation(same[:, 0], other[:, 0]) < 2.5  # the published maximum over thresholds reads this much noise at 512
    assert competition.separation(same[:, 0], other[:, 0] + 20) == competition.CAP
    assert competition.separation(same[:, 0], same[:, 0]) < 1
    assert (
        competition.competition(same, same, (1, 1, 1, 1))
        > competition.competition(same, other + 1, (1, 1, 1, 1))
        > competition.competition(same, other + 20, (1, 1, 1, 1))
    )
    assert competition.competition(same, other, (0.5, 1, 1, 1)) == pytest.approx(0.5 * competition.competition(same, other, (1, 1, 1, 1)))


def test_a_claim_needs_its_number():
    for claim in (0.52, 0.6):
        n = power.for_auc(claim)
        ends = [auc(torch.arange(m).double() * 2, torch.arange(m).double() * 2)[2] for m in (n, n - 1)]
        assert ends[0] <= claim + 0.002  # the same interval on a sample without signal
    with pytest.raises(SettingError, match="claim must lie above"):
        power.for_rate(0.0)


def test_attacked_copies_against_loops():
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a weight halfway between two levels goes either way by rounding of s
        model, other = nets.small_cnn(8), nets.small_cnn(8)
    for bits in (8, 4):
        twin = restore.rounded(model, bits)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if p.ndim < 2:
                assert torch.equal(p, q)
                continue
            for row, got in zip(p.detach().flatten(1), q.detach().flatten(1), strict=True):
                s = float(row.abs().max()) / (2 ** (bits - 1) - 1)
                torch.testing.assert_close(got, torch.tensor([s * round(float(v) / s) for v in row]), atol=1e-5, rtol=1e-4)
                assert len(got.unique()) <= 2**bits - 1
    for p, q in zip(model.parameters(), restore.pruned(model, 0.3).parameters(), strict=True):
        assert int((q == 0).sum()) == (int(0.3 * p.numel()) if p.ndim > 1 else 0)
        assert torch.equal(q[q != 0], p[q != 0])
    for a, b, c in zip(model.parameters(), other.parameters(), restore.averaged(model, other).parameters(), strict=True):
        torch.testing.assert_close(c, (a + b) / 2)


def test_one_reference_does_not_say_how_averages_differ():
    """Means of the original and models that were trained apart know from none to most of a removed class: one of them refutes nobody."""
    model, task, split = digits()
    other = [retrained("digits", "class", k) for k in (0, 1)]
    one, two = ({r.name: r for r in restore.restore(Probe(model, other[0], task, split, refs))} for refs in ((other[1],), (other[1], model)))
    assert (one["restore.average"].low, one["restore.average"].high) == (-1, 1) and "give a second" in one["restore.average"].note
    assert one["restore.int8"].high < 1 and "give a second" not in one["restore.int8"].note + two["restore.average"].note
    found = {c.id: c for c in named.named(Probe(model, other[0], task, split, (other[1],)), [one["restore.average"]])}
    assert found["B4"].verdict == "UNKNOWN"


def test_halves():
    inside = pool.halves(21, 8, seed=0)
    assert inside.sum(1).tolist() == [10] * 8
    assert not (inside[0::2] & inside[1::2]).any()
    assert int((~(inside[0::2] | inside[1::2])).sum()) == 4  # one record of each pair is in neither
    with pytest.raises(SettingError, match="even number"):
        pool.halves(20, 5, seed=0)


def test_a_pool_is_trained_once(tmp_path, monkeypatch):
    data = points(60)
    model = nets.mlp(6, 3, 8)
    first = pool.shadows(model, classification(), data, RECIPE, k=6, folder=tmp_path)
    monkeypatch.setattr(stacked, "train", lambda *a, **k: pytest.fail("trained again"))
    again = pool.shadows(model, classification(), data, RECIPE, k=6, folder=tmp_path)
    assert torch.equal(first.margins(data), again.margins(data))
    asked = data.take([5, 3, 30])  # a second request over part of the universe
    assert torch.equal(again.sides(asked), again.inside[:, [5, 3, 30]])
    with pytest.raises(SettingError, match="1 of 3 records are not in the shadow pool"):
        again.rows(Examples(torch.cat([asked.x[:2], torch.zeros(1, 6)]), asked.y, asked.ids))
    with pytest.raises(ModelError, match="another architecture"):
        again.fits(nets.mlp(6, 3, 9))
    with pytest.raises(SettingError, match="same record twice"):
        pool.shadows(model, classification(), data.take([0, 0, 1, 2]), RECIPE, k=4)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match="damaged"):
        pool.shadows(model, classification(), data, RECIPE, k=6, folder=tmp_path)


@pytest.mark.slow
def test_calibrated_attack_sees_what_a_population_attack_does_not():
    """Records with wrong labels, known by heart: LiRA on shadows tells them from unseen records; on a retrained model it does not."""
    data, rest = points(160), points(400, seed=9)
    g = torch.Generator().manual_seed(1)
    wrong = torch.randperm(160, generator=g)[:40]
    y = data.y.clone()
    y[wrong] = (y[wrong] + 1) % 3
    data = replace(data, y=y)
    unseen = replace(rest.take(range(40)), y=(rest.y[:40] + 1) % 3)  # wrong labels, never trained on
    keep = torch.ones(160, dtype=torch.bool)
    keep[wrong] = False
    split = Split(data.take(wrong), data.take(keep.nonzero().squeeze(1)), unseen, asked="wrong labels")
    recipe = {**RECIPE, "epochs": 150, "lr": 0.1}
    universe = Examples(*(torch.cat([getattr(data, f), getattr(unseen, f)]) for f in ("x", "y")), torch.arange(200))
    task, build = classification(), lambda: nets.mlp(6, 3, 32)
    shadow = pool.shadows(build(), task, universe, recipe, k=16)
    models = []
    for part in (data, split.retain):
        models.append(build())
        training.train(models[-1], task, part, seed=3, **recipe)
    found = [{r.name: r for r in audit(Probe(models[0], m, task, split, pool=shadow), ["lira", "rmia"])} for m in models]
    assert found[0]["lira.auc"].low > 0.8 and found[0]["lira.epsilon"].value > 0.5
    assert found[1]["lira.auc"].low < 0.6 and found[1]["lira.epsilon"].value < 0.5
    assert found[0]["rmia.auc"].value > found[1]["rmia.auc"].value + 0.2
    assert "needs at least 1,000 non-members" in found[0]["lira.tpr.001"].note
    worst_known = shadow.vulnerable(data, 40)
    assert float(torch.isin(worst_known, wrong).float().mean()) > 0.45  # a quarter by chance: wrong labels are known by heart
    with pytest.raises(SettingError, match="m must be 1 to 160"):
        shadow.vulnerable(data, 161)
    assert "ulira.auc" not in {r.name for r in audit(Probe(*models, task, split, pool=shadow), ["ulira"])}  # no shadow has forgotten yet
    records, read = pool.universe(Split(split.forget, None, unseen)), {}
    for after, name, settings in ((models[0], "fine_tune", {"epochs": 0.2, "lr": 1e-6}), (models[1], "retrain", {**recipe, "epochs": 40.0})):
        forgot = pool.forgotten(shadow, name, universe, records, settings, k=8)
        assert torch.equal(forgot.inside, shadow.inside[:8])
        read[name] = audit(Probe(models[0], after, task, split, pool=shadow, forgotten=forgot), ["ulira"])[0]
    assert read["fine_tune"].low > 0.8  # forgetting by a step that moves nothing is seen
    assert read["retrain"].low < 0.6
    with pytest.raises(SettingError, match="not the universe"):
        pool.forgotten(shadow, "fine_tune", data, records)


@pytest.mark.slow
def test_named_checks_on_known_truth():
    """Class removal: the untouched model fails by name, weakest first; a retrained one fails nothing; without references nothing is claimed."""
    model, task, split = digits("class")
    refs = tuple(retrained("digits", "class", k) for k in range(3))
    for after, verdicts in (
        (model, {"A1": "FAIL", "A4": "FAIL", "B4": "FAIL", "B3": "FAIL", "C1": "PASS"}),
        (retrained("digits", "class", 3), {"A1": "PASS", "B4": "PASS"}),
    ):
        p = Probe(model, after, task, split, refs)
        found = named.named(p, audit(p))
        by_id = {n.id: n.verdict for n in found}
        assert verdicts.items() <= by_id.items()
        if after is not model:
            assert "FAIL" not in {n.verdict for n in found if n.id[0] in "ABC"}
        order = [n.verdict for n in found if n.id[0] == "A"]
        assert order == sorted(order, key=["FAIL", "UNKNOWN", "PASS"].index)
    p = Probe(model, model, task, split)
    alone = {n.id: n for n in named.named(p, audit(p, slow=False))}
    assert alone["A1"].verdict == "UNKNOWN" and "references" in alone["A1"].why


def test_holm_of_the_card():
    assert named.holm([0.001, 0.02, 0.04]) == [True, True, True]
    assert named.holm([0.04, math.nan, 0.001, 0.03]) == [False, False, True, False]


@pytest.mark.slow
def test_worst_case_sets_are_what_the_rest_explains():
    """Left out, the hardest set is still predicted better than a random one, and the easiest worse; two seeds agree."""
    model, task, split = digits("random")
    train = Examples(*(torch.cat([getattr(split.forget, f), getattr(split.retain, f)]) for f in ("x", "y", "ids")))
    sets = {"hard": worst.select(model, task, train, 100), "easy": worst.select(model, task, train, 100, easiest=True), "random": torch.arange(100)}
    left = {}
    for name, rows in sets.items():
        keep = torch.ones(len(train), dtype=torch.bool)
        keep[rows] = False
        other = training.fresh(model, 1)
        training.train(other, task, train.take(keep.nonzero().squeeze(1)), epochs=15, batch_size=50, lr=0.05, optimizer="nesterov", momentum=0.9, seed=1)
        left[name] = float(score(other, task, train.take(rows)).nll.mean())
    assert left["hard"] < 0.3 * left["random"] < left["easy"]
    assert worst.jaccard(sets["hard"], worst.select(model, task, train, 100, seed=9)) > 0.8
    w = worst.upper(torch.full((50,), 0.2), torch.rand(50), 10, lr=0.3)
    assert abs(float(w.sum()) - 10) < 1e-5 and float(w.min()) >= 0 and float(w.max()) <= 1
    with pytest.raises(SettingError, match="m must be 1 to"):
        worst.select(model, task, train, 0)


def test_attacks_agree_with_an_independent_library():
    """TensorFlow Privacy 0.9.0 (advanced_mia.compute_score_lira by means, epsilon_lower_bound) on the same inputs; it has the opposite sign.

    It divides variances by the number of shadows, here it is one less: deviations are shrunk by sqrt(7 / 8) to meet it.
    """
    i, j = np.meshgrid(np.arange(6), np.arange(16))
    inside = torch.as_tensor((i + j) % 2 == 0)
    shadows = torch.as_tensor(np.sin(1.7 * i + 0.9 * j) + 0.5 * np.cos(2.3 * i * j)) + 2.0 * inside
    for side in (inside, ~inside):
        centre = (shadows * side).sum(0) / 8
        shadows = torch.where(side, centre + (shadows - centre) * (7 / 8) ** 0.5, shadows)
    phi = torch.linspace(-1, 3, 6, dtype=torch.double)
    seen = {
        (False, True): [11.395861, 11.682053, 1.193934, -1.206146, -3.113359, -3.761068],
        (True, True): [8.523048, 3.97364, 1.215037, -1.297217, -2.748973, -4.621837],
    }
    for (pooled, online), theirs in seen.items():
        assert (-attacks.lira(phi, shadows, inside, online=online, pooled=pooled)).tolist() == pytest.approx(theirs, abs=1e-5)
    ratios = {(60, 5, 100): 4.4065187409738025, (30, 1, 200): 3.7597090005526326, (500, 20, 1000): 15.252235497686884}
    for (tp, fp, n), ratio in ratios.items():
        assert epsilon.lower_bound(n - tp, n, fp, n, form="clopper_pearson", delta=0.0) == pytest.approx(math.log(ratio), abs=1e-9)


def test_recipes_for_shadows_are_read_with_care():
    assert pool.recipe("epochs=3,batch_size=8 lr=0.1 optimizer=adam")["optimizer"] == "adam"
    for text, message in (("epochs=3", "lacks batch_size, lr"), ("epoch=3", "cannot read 'epoch=3'"), ("epochs=many", "epochs must be of type float")):
        with pytest.raises(SettingError, match=message):
            pool.recipe(text)


@pytest.mark.slow
def test_quantile_attack_needs_no_shadows():
    """Log-odds that do not follow from the features: forgotten records whose margins were raised by 3 stand out, unseen ones do not."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=g)
    margin = features[:, 0] * 2 + 0.3 * torch.randn(300, generator=g)
    fit, read, gone = slice(0, 150), slice(150, 225), slice(225, 300)
    low = attacks.quantile(margin[read], features[read], margin[fit], features[fit])
    high = attacks.quantile(margin[gone] + 3, features[gone], margin[fit], features[fit])
    assert auc(high, low)[1] > 0.85 and float((low > 0).float().mean()) < 0.2 and float((high > 0).float().mean()) > 0.7
    model, task, split = digits("random")
    rows = {r.name: r for r in audit(Probe(model, model, task, split), ["quantile"])}
    assert rows["quantile.auc"].low < rows["quantile.auc"].value < rows["quantile.auc"].high and rows["quantile.tpr"].at == 0.05


def test_refused_for_too_few_records_says_how_many():
    """The number named is enough, and half of it is not."""
    rule = {"accuracy.forget": "<= 0.05"}
    for hits, n in ((0, 20), (1, 60)):
        row = Row("accuracy.forget", *wilson(hits, n), n)
        (reason,) = gate([row], rule)
        need = int(reason.split("about ")[1].split(" ")[0].replace(",", ""))
        more = round(hits * need / n)
        assert not gate([Row("accuracy.forget", *wilson(more, need), need)], rule)
        assert gate([Row("accuracy.forget", *wilson(round(more / 2), need // 2), need // 2)], rule)
    assert "too few" not in gate([Row("accuracy.forget", *wilson(30, 60), 60)], rule)[0]
