"""Audit formulas against the cards' numbers and slow oracles; directions of every measure; the report's safety."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import digits, retrained

from expunge.audits import distance, utility
from expunge.audits.core import Probe, Row, audit, bounds, gate
from expunge.audits.membership import losses as membership
from expunge.core import stats
from expunge.core.errors import GateError
from expunge.parts.reading import Scores
from expunge.report import html, table


def scores(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    return Scores(torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits, labels, None, None)


def test_margin_of_the_card():
    s = scores(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]))
    assert float(s.margin) == pytest.approx(2.1972, abs=1e-4)


def test_auc_is_the_brute_force_count():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(6, (50,), generator=g).float(), torch.randint(5, (40,), generator=g).float()
    brute = ((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean()
    assert stats.auc(a, b)[0] == pytest.approx(float(brute))


def test_wilson_covers():
    """One-sided 95 % bounds hold in at least 90 % (the score interval is known to dip below its level) of simulated samples, at several rates."""
    g = torch.Generator().manual_seed(1)
    for p in (0.05, 0.5, 0.9):
        hits = (torch.rand(2000, 60, generator=g) < p).sum(1).tolist()
        assert sum(stats.wilson(h, 60)[2] >= p for h in hits) / 2000 >= 0.9
        assert sum(stats.wilson(h, 60)[1] <= p for h in hits) / 2000 >= 0.9


def test_matched_non_members_follow_the_forget_set():
    forget, test = torch.tensor([0] * 30 + [1] * 10), torch.tensor([0] * 50 + [1] * 50 + [2] * 50)
    rows, note = stats.matched(forget, test, 0)
    drawn = test[rows].bincount(minlength=3).tolist()
    assert drawn[2] == 0 and drawn[0] / drawn[1] == pytest.approx(3, rel=0.1)
    assert str(len(rows)) in note


def test_non_members_for_several_targets_are_drawn_by_the_first_without_a_warning():
    several = torch.tensor([[0.0, 5.0], [1.0, 6.0], [1.0, 7.0]])
    assert torch.equal(stats.matched(several, several, 0)[0], stats.matched(several[:, 0].clone(), several[:, 0].clone(), 0)[0])


def test_klom_of_a_further_model_is_the_floor():
    """Gaussian margins: a further draw reads what leave-one-out reads; a shift of three deviations reads far more."""
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(4000, generator=g) + 0.5
    refs, new = torch.randn(6, 4000, generator=g) * scale, torch.randn(4000, generator=g) * scale
    floor, own = distance.klom_floor(refs).mean(), distance.klom_distance(new, refs).mean()
    assert float(own / floor) == pytest.approx(1, abs=0.12)
    assert distance.klom_distance(new + 3 * scale, refs).mean() > 5 * floor


def test_klom_of_populations_is_a_histogram_with_its_right_edge():
    """numpy.histogram counts the largest value in the last bin, as this does; one example at a time."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(30, 7, generator=g), torch.randn(40, 7, generator=g) + 1
    slow = []
    for a, b in zip(p.T.double().numpy(), q.T.double().numpy(), strict=True):
        edges = np.linspace(min(a.min(), b.min()), max(a.max(), b.max()), 21)
        u, v = (np.histogram(c, edges)[0] / len(c) for c in (a, b))
        slow.append(sum(x * np.log(x / max(y, 1e-5)) for x, y in zip(u, v, strict=True) if x))
    assert torch.allclose(distance.klom_binned(p, q), torch.tensor(slow).float(), atol=1e-5)
    assert distance.klom_binned(p, p).abs().max() == 0 and distance.klom_binned(p + 1e3, q - 1e3).isfinite().all()


def test_gap_closed_ends():
    floor, far = torch.full((50,), 0.5), torch.full((50,), 4.0)
    assert distance.gap_closed("g", far, far, floor, 0.5, 0, "").value == 0
    assert distance.gap_closed("g", far, floor, floor, 0.5, 0, "").value == 1
    refused = distance.gap_closed("g", floor, floor, floor, 0.5, 0, "")
    assert refused.value != refused.value and "does not memorise" in refused.note
    elsewhere = distance.gap_closed("g", far, floor, floor, 3.0, 0, "")  # as far on retain, which any two trainings both saw
    assert elsewhere.value != elsewhere.value and "distance on retain (3)" in elsewhere.note


@pytest.mark.slow
def test_directions_on_known_truth():
    """Class removal: the untouched model reads 0 of the gap, a held-out retrained model about all of it."""
    model, task, split = digits("class")
    p = Probe(model, model, task, split, tuple(retrained("digits", "class", k) for k in range(3)))
    names = ["accuracy", "klom", "divergence", "literature"]
    nothing = {r.name: r for r in audit(p, names)}
    good = {r.name: r for r in audit(replace(p, after=retrained("digits", "class", 3)), names)}
    assert nothing["gap_closed.klom"].value == 0 and good["gap_closed.klom"].low > 0.9
    assert nothing["accuracy.forget"].value == 1 and good["accuracy.forget"].value == 0
    assert good["average_gap"].value < nothing["average_gap"].value
    assert good["kl.forget"].value < 2 * good["kl_floor.forget"].value < nothing["kl.forget"].value
    assert good["klom_ratio.retain"].value < 1.5


@pytest.mark.slow
def test_membership_is_two_sided_and_indicative():
    low, high = torch.rand(100) * 0.1, torch.rand(100) + 1
    assert stats.auc(high, low)[0] == 1.0 and stats.auc(low, high)[0] == 0.0
    assert gate([Row("membership.loss_auc", 0.12, 0.05, 0.2, 100)], {"membership.loss_auc": "0.45..0.55"})
    model, task, split = digits("random")
    rows = audit(Probe(model, model, task, split), ["membership"])
    assert rows and all(r.indicative and r.note for r in rows)


def test_svc_separates_what_differs():
    members, others = torch.full((40, 1), 0.99) + 0.001 * torch.rand(40, 1), torch.rand(40, 1) * 0.5
    assert membership.svc(members, others, torch.tensor([[0.2], [0.99]])).tolist() == [True, False]


def test_published_modified_entropy_differs():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    right, published = utility.modified_entropy(logits, labels), utility.modified_entropy_published(logits, labels)
    p = logits.softmax(-1)
    oracle = torch.stack(
        [sum(-(1 - p[i, y]) * p[i, y].log() if j == y else -p[i, j] * (1 - p[i, j]).log() for j in range(3)) for i, y in enumerate(labels.tolist())]
    )
    assert torch.allclose(right, oracle, atol=1e-5)
    assert not torch.allclose(right, published)


def test_rules():
    assert bounds("<= 0.02") == (float("-inf"), 0.02) and bounds("0.45..0.55") == (0.45, 0.55)
    with pytest.raises(GateError, match="cannot read the rule"):
        bounds("< 0.1")
    assert gate([], {"x": ">= 1"}) == ["x was not measured; the rule asks for >= 1"]
    nan = Row("x", float("nan"), float("-inf"), float("inf"), 1)
    assert gate([nan], {"x": ">= 0.5"})


def document() -> dict:
    evil = "<script>alert(1)</script>"
    row = {"name": evil, "value": float("nan"), "low": 0.0, "high": float("inf"), "n": 3, "note": evil, "indicative": True, "at": None}
    return {
        "title": evil, "asked": evil, "verdict": {"passed": False, "reasons": [evil]}, "notes": [evil],
        "chosen": {"method": evil, "settings": {"a": evil}, "seed": 0},
        "selftest": [{"name": evil, "rule": "<= 1", "original": "", "retrained": "", "usable": False}],
        "tries": [{"method": evil, "seed": 0, "outcome": "ok", "reason": evil, "passed": False, "reasons": [evil], "settings": {evil: evil},
                   "rows": [row], "cost": {}}],
        "pictures": {"loss": {"forget": {"before": [0.1, 2.0]}}, "offenders": [{"id": 1, "label": evil, "before": 0.5}],
                     "scatter": [{"method": "m", "seed": 0, "forgetting": 0.5, "utility": 0.9, "cost": 10, "passed": True}]},
    }  # fmt: skip


def test_report_is_inert_and_the_same_twice():
    page = html.render(document())
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "src=" not in page and ">nan<" not in page and "unusable" in page and "Not passed" in page
    assert page == html.render(document())
    json.loads(table.dump(document()), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))


def test_report_of_almost_nothing():
    assert "Not passed" in html.render({"title": "t"})
    assert table.markdown({"title": "t"}).count("\n") == 1


def test_bootstrap_of_means_agrees_with_the_loop():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    loop = stats.bootstrap(lambda r: float(values[r].mean()), 300, 0)
    assert stats.bootstrap_mean(values, 0) == pytest.approx(loop, abs=0.02)
