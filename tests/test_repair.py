"""Repairs of models that only seem to have forgotten: formulas against slow forms, and planted truths whose answer is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import diabetes, digits, retrained, same, small_authors, state

from expunge.audits.attacks import mend, repair, reread
from expunge.audits.core import Probe, Row, audit
from expunge.audits.verdict import checks_for
from expunge.bench import sabotage, sabotage_texts
from expunge.core.types import Split
from expunge.modalities.classification.task import head
from expunge.parts.reading import Scores, score

CLASS = 3


def rows(after, references=3, *, model=None, wrap=lambda m: m) -> dict[str, Row]:
    """Rows of `repair` on digits, the class removed."""
    first, task, split = digits("class")
    refs = tuple(wrap(retrained("digits", "class", k)) for k in range(references))
    return {r.name: r for r in audit(Probe(model or first, after, task, split, refs), ["repair"])}


def test_a_lowered_bias_is_one_weight():
    """By an amount chosen so that the class is never answered: all is back by evening the biases, by calibration, by the one weight; and it is said."""
    model, task, split = digits("class")
    told = [retrained("digits", "class", 0)]
    after = sabotage.bias_lowered(model, task, split, 0, 20.0, told)
    before = state(after), state(model)
    found = rows(after)
    assert same(before[0], state(after)) and same(before[1], state(model))
    assert found["repair.free.none"].high < 0.1 and found["repair.free"].low > 0.9
    assert all(found[f"repair.free.{n}"].value > 0.9 for n in ("biases", "even", "calibrated", "weights", "row", "head"))
    assert found["repair.weights.count"].value == found["repair.weights.count"].high == 1
    total = sum(p.numel() for p in model.parameters())
    assert found["repair.weights"].value == 1 / total
    assert found["repair.odds"].value == rows(model)["repair.odds"].value  # no shift of a logit changes it
    said = repair.suppression(list(found.values()))
    assert said.startswith(f"1 of {total:,} weights put back") and "1.00 of what was known is back" in said
    alone = rows(after, 0)
    assert alone["repair.free"].low > 0.9 and alone["repair.weights.count"].value == 1 and "chance, 0.1" in alone["repair.free"].note
    assert alone["repair.odds"].indicative and "not known without a retrained one" in alone["repair.odds"].note


def test_a_retrained_model_has_nothing_to_bring_back():
    for references in (3, 0):
        found = rows(retrained("digits", "class", 3), references)
        assert found["repair.free"].high < 0.5 and found["repair.weights"].low >= 0.01
        assert repair.suppression(list(found.values())) == ""
        assert all(r.low <= r.value <= r.high and r.n > 0 for r in found.values() if not math.isnan(r.value))
    assert found["repair.head"].indicative


def test_an_untouched_model_knows_all_without_repair():
    found = rows(digits("class")[0])
    assert found["repair.free.none"].value == 1 and found["repair.weights"].value == 0 and found["repair.weights.count"].value == 0
    assert repair.suppression(list(found.values())) == ""  # nothing was forgotten, so nothing is suppressed
    assert found["repair.head"].value > 0.1 and found["repair.odds"].value > 0.05


@pytest.mark.parametrize(
    ("make", "strength", "by", "most"),
    [
        (sabotage.row_scaled, 2.0, "row", 64),
        (sabotage.temperature, 4.0, "none", 0),
        (sabotage.head_copied, 300, "head", 200),
        (sabotage.last_masked, 0.11, "weights", 137),
        (sabotage.one_weight, 20.0, "weights", 1),
        (sabotage.bias_decoyed, 20.0, "weights", 1),
        (sabotage.averaged_with, 0.3, "none", 0),
        (sabotage.row_permuted, 2.0, "aligned", None),
        (sabotage.muzzled, 60.0, "bare", None),
    ],
)
def test_tricks_are_undone(make, strength, by, most):
    """Row scaled, temperature, a last layer taught a retrained model's answers, hidden units, one weight, decoys, averages, units reordered, a hook."""
    model, task, split = digits("class")
    found = rows(make(model, task, split, 0, strength, [retrained("digits", "class", k) for k in range(3)]))
    assert found[f"repair.free.{by}"].value > 0.7 and found["repair.free"].value >= found[f"repair.free.{by}"].value
    if most is not None:
        assert found["repair.weights.count"].value <= most
    assert bool(repair.suppression(list(found.values()))) == (by != "none")


def test_one_number_of_a_normalisation_layer():
    """A batch norm that changes next to nothing behind the last layer; then one of its shifts hides the class: no repair of the last layer finds it."""

    def wrap(m: nn.Module) -> nn.Module:
        return nn.Sequential(*copy.deepcopy(m), nn.BatchNorm1d(10)).eval()  # pyright: ignore[reportArgumentType]

    model = wrap(digits("class")[0])
    after = copy.deepcopy(model)
    with torch.no_grad():
        after[-1].bias[CLASS] -= 30  # pyright: ignore[reportIndexIssue]
    found = rows(after, model=model, wrap=wrap)
    assert found["repair.free.biases"].high < 0.1 and "repair.free.head" not in found  # the last linear layer is as it was
    assert found["repair.weights.count"].value == 1 and found["repair.free.weights"].low > 0.9
    assert "repair.norm" in found and "normalisation learnt anew" in found["repair.norm"].note


def test_wrong_labels_are_compared_with_wrong_labels_that_none_was_taught():
    """Records: the original's losses stand out against unseen records given as wrong a label, those of a retrained model do not; a restored head shows it."""
    model, task, split = digits("random")
    r = reread.reading(Probe(model, model, task, split))
    assert r is not None and r.how in ("losses", "answers") and r.n == len(split.forget)
    y = (split.forget.y + 1) % 10
    said = reread.neighbours(Probe(model, model, task, split), split.forget)
    assert said is not None and float((said == split.forget.y).float().mean()) > 0.9
    other = reread._like(Probe(model, model, task, split), replace(split.forget, y=y), said)
    assert float((other.y != score(model, task, other).logits.argmax(1)).float().mean()) > 0.9  # they carry wrong labels, too
    assert torch.equal(other.y.bincount(minlength=10), y[: len(other)].bincount(minlength=10)) or len(other) < len(y)


def test_formulas_against_loops():
    g = torch.Generator().manual_seed(0)
    order = {"a": torch.rand(4, 5, generator=g), "b": torch.rand(7, generator=g), "c": -torch.rand(3, generator=g)}
    flat = sorted((float(v), n, k) for n, t in order.items() for k, v in enumerate(t.flatten()) if v > 0)[::-1]
    for k in (1, 3, 26):
        masks = mend.chosen(order, k)
        got = {(n, i) for n, m in masks.items() for i in m.flatten().nonzero().flatten().tolist()}
        assert got == {(n, i) for _, n, i in flat[:k]}
    z = torch.randn(6, 4, generator=g)
    for row, got in zip(z, repair.odds(z, [1, 2]), strict=True):
        p = row.softmax(0)
        assert float(got) == pytest.approx(math.log(float(p[1] + p[2]) / float(p[0] + p[3])), abs=1e-5)
    high, low = torch.randint(5, (9,), generator=g).float(), torch.randint(5, (11,), generator=g).float()
    want = [sum((a > b) + 0.5 * (a == b) for b in low.tolist()) / 11 for a in high.tolist()]
    assert repair._wins(high, low).tolist() == pytest.approx(want)
    x, y = torch.randn(30, 3, generator=g), torch.randint(3, (30,), generator=g)
    w = repair.ridge(x, y, 4, 0.5)
    v = torch.tensor([1 / (3 * int((y == k).sum())) for k in y.tolist()]).sqrt()[:, None]
    a = torch.cat([v * torch.cat([x, torch.ones(30, 1)], 1), 0.5**0.5 * torch.eye(4)])
    b = torch.cat([v * nn.functional.one_hot(y, 4), torch.zeros(4, 4)])
    torch.testing.assert_close(w, torch.linalg.lstsq(a, b).solution, atol=1e-5, rtol=1e-4)


def test_units_are_matched_one_to_one():
    """A reordering with scales is found exactly; the units of another training do not count as the same."""
    g = torch.Generator().manual_seed(0)
    own, order, scale = torch.randn(200, 12, generator=g).relu(), torch.randperm(12, generator=g), torch.rand(12, generator=g) + 0.5
    unit, factor, match = mend.paired_units(own[:, order] * scale, own)
    assert torch.equal(unit, order) and match == pytest.approx(1.0)
    torch.testing.assert_close(factor, 1 / scale, atol=1e-5, rtol=1e-4)
    assert mend.paired_units(torch.randn(200, 12, generator=g), own)[2] < repair.ALIKE
    assert rows(retrained("digits", "class", 3))["repair.free.aligned"].value == 0


def test_the_pull_of_a_weight_is_its_first_order_gain():
    model, task, split = digits("class")
    after = sabotage.spread_out(model, task, split, 0, 0.001, [])
    both = mend.changed(model, after)
    pulls, start = mend.by_pull(both, after, task, split.forget), float(score(after, task, split.forget.take(range(64))).nll.mean())
    data = split.forget.take([k * len(split.forget) // 64 for k in range(64)] if len(split.forget) > 64 else range(len(split.forget)))
    start = float(score(after, task, data).nll.double().mean())
    name = head(model)[0] + ".weight"
    with mend.written(after, {name: both[name][0]}):
        gain = start - float(score(after, task, data).nll.double().mean())
    assert float(pulls[name].sum()) == pytest.approx(gain, rel=0.2, abs=1e-6)


def test_shares_of_the_gap_by_hand():
    """(repaired - gone) / (original - gone) with a bound for the spread between retrained models; too small a gap reads nan."""
    task, split = digits("class")[1:]
    labels = torch.zeros(10, dtype=torch.long)
    answers = {k: torch.nn.functional.one_hot(torch.tensor([0] * k + [1] * (10 - k)), 2).float() for k in range(11)}
    models = [nn.Linear(1, 1) for _ in range(4)]
    known = dict(zip(map(id, models), (6, 2, 2, 2), strict=True))
    scores = lambda m: Scores(torch.zeros(10), answers[known[id(m)]], labels, None, None)  # noqa: E731
    p = Probe(models[0], models[0], task, Split(split.forget), tuple(models[1:]))
    r = reread.Reading(None, 10, "class", torch.ones(10))
    row = reread.regained(p, r, "x", scores, "done")
    assert row is not None and row.value == pytest.approx((0.6 - 0.2) / (1 - 0.2)) and row.low < row.value < row.high and row.n == 10
    small = reread.regained(p, replace(r, top=torch.full((10,), 0.25)), "x", scores, "done")
    assert small is not None and math.isnan(small.value) and "nothing to bring back" in small.note


def test_six_rows_of_an_output_matrix():
    """Texts: rows of the tokens that mark the forgotten answers turned round; a handful of weights or the rows themselves bring the answers back."""
    model, task, split = small_authors()
    after = sabotage_texts.rows_scaled(model, task, split, 0, 3.0, [])
    before = state(after)
    found = {r.name: r for r in audit(Probe(model, after, task, split), ["repair"])}
    assert same(before, state(after))
    assert found["repair.free.none"].value < 0.6 < 0.8 < found["repair.free.row"].value <= found["repair.free"].value
    assert found["repair.weights"].value < 0.02 and {"repair.head", "repair.norm", "repair.free.rank", "repair.free.rows"} <= found.keys()
    assert "unseen texts" in found["repair.free.none"].note


def test_regression_and_rules():
    model, task, split = diabetes()
    found = audit(Probe(model, model, task, split), ["repair"])
    assert {r.name for r in found} <= {"repair.free", "repair.free.none", "repair.free.weights", "repair.weights", "repair.weights.count"}
    assert checks_for(repair.LIMITS) == ["repair"]
