"""TOFU: every published figure from the per-row logs, a small case that always runs, and the check's rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import ks_2samp
from test_text_metrics import blank, rows_of, taught
from worlds import same, small, state

from expunge.audits.core import Probe
from expunge.audits.language import tofu, tokens
from expunge.core.errors import SettingError
from expunge.core.types import Split
from expunge.modalities.language.worlds import authors
from expunge.modalities.worlds import data_folder

FOLDER = data_folder() / "llm" / "tofu"
published = pytest.mark.skipif(not FOLDER.exists(), reason="no TOFU data; set EXPUNGE_DATA")


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@published
def test_every_published_utility_figure():
    logs, expected = read("reference_logs.json"), read("expected_metrics.json")["model_utility"]
    assert len(expected) == 8
    for model, forms in expected.items():
        for form, figures in forms.items():
            found = tofu.summary(logs[model], form)
            assert found["model_utility"] == pytest.approx(figures["model_utility"], rel=1e-12)
            for name, parts in figures["parts"].items():
                assert found["parts"][name] == pytest.approx(parts, rel=1e-12)


@published
def test_every_published_forget_quality():
    logs, expected = read("reference_logs.json"), read("expected_metrics.json")["forget_quality"]
    for pair, figures in expected.items():
        mine, gold = pair.split(" vs ")
        gold = mine if gold == "itself" else f"{mine.split('/')[0]}/{gold}"
        q = tofu.forget_quality(tofu.ratios(logs[mine]["forget"]), tofu.ratios(logs[gold]["forget"]))
        assert (q.d, q.p) == pytest.approx((figures["statistic"], figures["pvalue"]), rel=1e-12)
        assert q.shift < 0 or mine == gold, "the full model still remembers"
        assert (q.d <= q.critical) == (q.p >= 0.05)


def test_a_small_log_by_hand():
    """Two rows a set. Geometric: log R = l_para - mean l_pert; without a paraphrase the answer stands in."""
    log = {"avg_gt_loss": [0.0, math.log(2)], "avg_paraphrased_loss": [1.0, 2.0], "average_perturb_loss": [[2.0, 2.0], [1.0, 3.0]], "rougeL_recall": [1.0, 0.5]}
    general = {k: v for k, v in log.items() if k != "avg_paraphrased_loss"}
    found = tofu.summary({"forget": log, "retain": log, "real_authors": general, "world_facts": general})
    e = math.exp
    assert found["parts"]["forget"] == pytest.approx({"probability": 0.75, "rougeL_recall": 0.75, "truth_ratio": (e(-1) + 1) / 2})
    assert found["parts"]["retain"]["truth_ratio"] == pytest.approx((1 - e(-1)) / 2)
    normalised = (1 / (1 + 2 * e(-2)) + 0.5 / (0.5 + e(-1) + e(-3))) / 2
    assert found["parts"]["real_authors"]["probability"] == pytest.approx(normalised)
    assert found["parts"]["real_authors"]["truth_ratio"] == pytest.approx((1 - e(-2) + 1 - 2 * e(-2)) / 2)
    nine = [v for name in tofu.UTILITY for v in found["parts"][name].values()]
    assert len(nine) == 9 and found["model_utility"] == pytest.approx(9 / sum(1 / v for v in nine))
    arithmetic = tofu.ratios(log, "arithmetic").exp()
    assert arithmetic.tolist() == pytest.approx([e(1 - 2), e(2) * (e(-1) + e(-3)) / 2])
    with pytest.raises(SettingError, match="form must be one of geometric, arithmetic, not 'mean'"):
        tofu.ratios(log, "mean")


def test_cards_cases():
    right, wrong = torch.tensor([1.0]).double(), torch.tensor([[1.2, 1.5, 2.0, 2.3, 3.0]]).double()
    assert float(tofu.log_ratio(right, wrong).exp()) == pytest.approx(0.367879, abs=1e-6)
    assert float(tofu.log_ratio(right, wrong, "arithmetic").exp()) == pytest.approx(0.440202, abs=1e-6)
    assert float(tofu.normalised(torch.tensor([0.5]), torch.tensor([[1.0, 1.5, 2.0]]))) == pytest.approx(0.455054, abs=1e-6)
    assert tofu.harmonic([0.99, 0.986, 0.475, 0.4555, 0.933, 0.596, 0.4186, 0.8825, 0.539]) == pytest.approx(0.622753, abs=1e-6)
    assert tofu.harmonic([0.9] * 8 + [0.01]) == pytest.approx(0.083, abs=5e-4)
    assert tofu.harmonic([0.9, 0.0]) == 0 and tofu.harmonic([]) == 0


@pytest.mark.parametrize(("n", "floor"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_floors_of_the_card(n, floor):
    q = tofu.forget_quality(torch.arange(n), torch.arange(n) + 1000)
    assert q.d == 1 and q.p == pytest.approx(floor, rel=5e-3) and q.floor == pytest.approx(q.p, rel=1e-9) and q.shift == -1000


def test_critical_values_are_where_p_crosses_5_percent():
    assert tofu.critical(40) == 0.3 and tofu.critical(400) < 0.096
    for n in (5, 12, 22, 40, 61):
        k = round(tofu.critical(n) * n)
        above, below = (ks_2samp(torch.arange(n).numpy(), (torch.arange(n) + j - 0.5).numpy(), method="exact").pvalue for j in (k, k + 1))
        assert above >= 0.05 > below and tofu.ks_exact(n, k) == pytest.approx(above, rel=1e-9)
    assert tofu.critical(2) == 1, "too few rows to tell anything apart"


def test_forget_quality_is_blind_to_monotone_maps_and_knows_its_rows():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, generator=g), torch.randn(50, generator=g) + 0.5
    assert tofu.forget_quality(a, b).p == pytest.approx(tofu.forget_quality(-a.exp(), -b.exp()).p)
    assert tofu.forget_quality(b, a).shift == pytest.approx(-tofu.forget_quality(a, b).shift)
    with pytest.raises(SettingError, match="on the same rows; found 3 and 4"):
        tofu.forget_quality(torch.zeros(3), torch.zeros(4))


def test_underflow_saturates_nothing():
    """Losses of 2,000 a token: probabilities are 0 in any float, log R still ranks them."""
    para, wrong = torch.tensor([2000.0, 2100.0]), torch.tensor([[2050.0], [2050.0]])
    assert tofu.log_ratio(para, wrong).tolist() == tofu.log_ratio(para, wrong, "arithmetic").tolist() == [-50.0, 50.0]
    assert bool(tofu.normalised(para, wrong).isfinite().all())


def with_general() -> tuple:
    """The taught world, with three records of each set of general knowledge in test and general."""
    model, task, split = taught()
    form = split.forget.format
    test = form.texts([*split.test.rows, *authors.general(3)], torch.arange(500, 500 + len(split.test) + 3))
    return model, task, replace(split, test=test, general=form.texts(authors.world_facts(3), torch.arange(600, 603)))


def test_the_check_says_which_way():
    """A model that knows, against a blank gold: not told apart from itself; log R below gold's. Turned round, above."""
    model, task, split = with_general()
    empty, before = blank(model), state(model)
    knows = rows_of(Probe(model, model, task, split, (empty,)), "tofu")
    assert same(before, state(model))
    assert knows["tofu.d"].value == 1 and knows["tofu.forget_quality"].value == pytest.approx(knows["tofu.floor"].value)
    assert knows["tofu.shift"].high < 0 and knows["tofu.forget.probability_gap"].low > 0.5 and knows["tofu.forget.rouge_gap"].low > 0.4
    turned = rows_of(Probe(model, empty, task, split, (model,)), "tofu")
    assert turned["tofu.shift"].low > 0 and turned["tofu.forget.rouge_gap"].high < -0.4
    itself = rows_of(Probe(model, model, task, split, (empty, model, model)), "tofu")
    assert itself["tofu.forget_quality"].value == 1 and itself["tofu.d_over_critical"].value == 0 and "median D of 3" in itself["tofu.d"].note


def test_the_checks_figures_are_those_of_the_functions():
    model, task, split = with_general()
    p = Probe(model, model, task, split)
    rows = rows_of(p, "tofu")
    logs = {name: tofu.log_of(p, model, name) for name in ("forget", *tofu.UTILITY)}
    found = tofu.summary(logs)
    assert rows["tofu.model_utility"].value == pytest.approx(found["model_utility"], rel=1e-6) and "9 of 9 parts" in rows["tofu.model_utility"].note
    assert rows["tofu.model_utility"].low <= rows["tofu.model_utility"].value <= rows["tofu.model_utility"].high
    for name, parts in found["parts"].items():
        for k, v in parts.items():
            assert rows[f"tofu.{name}.{tofu.ROWS[k]}"].value == pytest.approx(v, rel=1e-6)
    assert not any(name in rows for name in ("tofu.d", "tofu.forget_quality", "tofu.shift")), "no gold model, no forget quality"
    right = [row["paraphrased_answer"] for row in split.forget.rows]
    own = tokens.plain_nll(model, task, split.forget.format.answered(split.forget, right))
    assert torch.allclose(logs["forget"]["avg_paraphrased_loss"], own, atol=1e-4)
    assert rows == rows_of(replace(p, cache={}), "tofu"), "same seed, same rows"


def test_rows_without_wrong_answers_fall_back_to_the_loss():
    model, task, split = small("causal_lm")
    bare = split.forget.format.texts([{k: row[k] for k in ("question", "answer")} for row in split.forget.rows])
    rows = rows_of(Probe(model, model, task, Split(bare), (blank(model),)), "tofu")
    assert "tofu.forget.truth_ratio" not in rows and "tofu.model_utility" not in rows
    assert rows["tofu.d"].note.startswith("mean token loss: the rows have no wrong answers")


def test_answers_under_an_entity_mask_are_scored_whole():
    model, task, split = small("causal_lm")
    form = replace(split.forget.format, mask="entity")
    data = form.texts(split.forget.rows)
    wrong = [row["perturbed_answer"][:2] for row in data.rows]
    assert torch.equal(tokens.answers_nll(model, task, data, wrong), tokens.answers_nll(model, task, split.forget, wrong))
