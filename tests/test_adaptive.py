"""The adversary that adapts: its families, its search on made-up gates, its pages, and one whole run on digits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from worlds import digits, retrained, same, small_authors, state, trained

from expunge.audits.core import Row
from expunge.bench import adaptive, sabotage, sabotage_texts
from expunge.bench.adaptive import Heard
from expunge.bench.sabotage import Family
from expunge.core.stats import wilson

TRICK = Family(lambda *a: a[0], 1.0, 1000.0, "")


def tried(gate, knowledge=lambda m, f: (1.0, "all"), **options):
    return adaptive.search("x", TRICK, lambda s: s, gate, knowledge, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("inside", [(1.0, 1.1), (4.0, 5.0), (50.0, 56.0), (700.0, 990.0)])
def test_a_strength_that_passes_is_found_within_the_budget(inside):
    low, high = inside
    calls = []

    def gate(s):
        calls.append(s)
        return Heard(low <= s <= high, max(math.log(low / s), math.log(s / high), 0.0))

    found = tried(gate, budget=14)
    assert found.found and low <= found.strength <= high and found.calls == len(calls) <= 14
    again, calls[:] = list(calls), []
    assert tried(gate, budget=14) == found and calls == again  # deterministic


def test_no_cheat_without_knowledge_or_without_the_gate():
    """What passes and knows nothing is no cheat; what the slower form of the gate refuses is none; the nearest is told, and the budget kept."""
    passes = lambda s: Heard(s > 100, 0.0 if s > 100 else 1.0)  # noqa: E731
    gone = tried(passes, lambda m, f: (0.1, "little"), budget=6)
    assert gone.passed and not gone.found and gone.calls == 6 and gone.strength > 100
    refused = tried(passes, sure=lambda m: False, budget=6)
    assert not refused.found and not refused.passed
    nearest = tried(lambda s: Heard(False, abs(math.log(s / 30))), budget=8)
    assert not nearest.found and 20 < nearest.strength < 45 and math.isnan(nearest.left)


def test_how_far_a_gate_is_missed():
    rows = [Row("a", 0.4, 0.3, 0.5, 9), Row("b", math.nan, -math.inf, math.inf, 9), Row("c", 2.0, 1.0, 3.0, 9)]
    assert adaptive.missed(rows, {"a": "<= 0.5", "c": ">= 1"}) == 0
    assert adaptive.missed(rows, {"a": "<= 0.2"}) == pytest.approx(math.log1p(0.3))
    assert adaptive.missed(rows, {"b": "<= 1", "d": "<= 1"}) == 20


def test_families_and_halves():
    assert len(sabotage.FAMILIES) >= 20 and len(sabotage_texts.FAMILIES) >= 6
    for task, families in adaptive.FAMILIES.items():
        a, b = adaptive.HALVES[task]
        assert sorted((*a, *b)) == sorted(families) and not set(a) & set(b) and abs(len(a) - len(b)) <= 1
        assert all(0 < f.low < f.high and f.what and f.make.__doc__ for f in families.values())


def test_every_trick_leaves_the_original_alone():
    """And makes a model that differs from it, in weights or by a hook, at its smallest strength."""
    model, task, split = digits("class")
    told = [retrained("digits", "class", k) for k in range(2)]
    before = state(model), state(told[0])
    for name, family in sabotage.FAMILIES.items():
        made = family.make(model, task, split, 0, family.low if name != "numbed" else 2.0, told)
        assert adaptive.share_touched(model, made) > 0 or any(m._forward_hooks for m in made.modules()), name
        assert not made.training and same(before[0], state(model)) and same(before[1], state(told[0])), name
        if family.undo is not None:
            after, _, other = family.undo(made, task, split)
            assert other is not split or not any(m._forward_hooks for m in after.modules())
    assert adaptive.share_touched(model, sabotage.bias_lowered(model, task, split, 0, 1.0, told)) == 1 / sum(p.numel() for p in model.parameters())


def test_every_trick_on_texts_leaves_the_original_alone():
    model, task, split = small_authors()
    before = state(model)
    for name, family in sabotage_texts.FAMILIES.items():
        if name == "half_told":
            continue  # 60 steps
        made = family.make(model, task, split, 0, min(family.low, 2.0), [model])
        hooked = any(m._forward_hooks for m in made.modules())
        assert adaptive.share_touched(model, made) > 0 or hooked or name.startswith(("gold", "averaged")), name
        assert same(before, state(model)), name


def test_the_table():
    head = {"world": "w", "digest": "d", "scenario": "class", "references": 3}
    cheat = {"strength": 2.0, "left": 0.9, "by": "repair.free", "touched": 0.01, "calls": 4, "said": "a 1; b 2"}
    cells = [
        {**head, "gate": g, "kind": k, "truth": "kept", "found": k == "x" and g == "default", "passed": True, **cheat}
        for g in ("default", "more")
        for k in "xy"
    ]
    cells += [{**head, "gate": "more", "kind": f"retrained {k}", "truth": "gone", "passed": k != 1, "said": ""} for k in range(12)]
    text = adaptive.markdown(cells)
    assert "| default | 1 of 2 | - | x |" in text and "| more | 0 of 2 | {:.2f} ({:.2f} to {:.2f}, n = 12) | none |".format(*wilson(1, 12)) in text
    assert "| x | default | 2 | 0.90, repair.free | 1.00% | 4 | a 1; b 2 |" in text


def test_the_option_needs_the_other():
    from expunge.cli.app import app

    found = CliRunner().invoke(app, ["bench", "--adaptive"])
    assert found.exit_code != 0 and "give --audit-power with it" in found.output + str(found.exception)


@pytest.mark.slow
def test_one_number_passes_no_gate(tmp_path, monkeypatch):
    """The bias of the removed class, lowered by a searched amount, is never `supported`, and retrained models are; a second run reads its cells back."""
    monkeypatch.setattr(adaptive, "FAMILIES", {"classification": {"bias_lowered": sabotage.FAMILIES["bias_lowered"]}})
    for k in range(5):
        retrained("digits", "class", k)
    cells = adaptive.bench("digits", ["class"], tmp_path, references=3, cache=trained(), gone=2)
    by = {(c["references"], c["gate"], c["kind"]): c for c in cells}
    assert not any(c["found"] for c in cells if c["truth"] == "kept") and by[3, "default", "bias_lowered"]["touched"] < 1e-4
    assert all(by[n, gate, f"retrained {k}"]["passed"] for n in (3, 0) for gate in ("default", "with repairs") for k in (1, 2))
    monkeypatch.setattr(adaptive, "search", lambda *a, **k: pytest.fail("searched again"))
    assert adaptive.bench("digits", ["class"], tmp_path, references=3, cache=trained(), gone=2) == cells
    assert len((tmp_path / "digits-adaptive.jsonl").read_text().splitlines()) == len(cells) == 12
    assert json.loads((tmp_path / "digits-adaptive.jsonl").read_text().splitlines()[0])["kind"] == "bias_lowered"


@pytest.mark.parametrize("labels", [10, 4])
def test_labels_share_their_strength(labels):
    """Biases of the forgotten labels fall by their share among the forgotten records."""
    split = digits("random")[2]
    split = replace(split, forget=split.forget.take((split.forget.y < labels).nonzero().squeeze(1)))
    layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    after = sabotage.bias_lowered(layer, None, split, 0, 5.0, [])
    fell = (layer[1].bias - after[1].bias).detach()  # pyright: ignore
    counts = split.forget.y.bincount(minlength=10).float()
    torch.testing.assert_close(fell, 5.0 * counts / counts.max(), atol=1e-5, rtol=1e-4)


def test_tables_of_grades_say_what_was_wrongly_taken():
    from expunge.bench import grades
    from expunge.cli.app import app

    assert [round(v, 2) for v in grades.reached([{"grade": g} for g in ("verified", "supported", "refuted")], "supported")] == [0.67, 0.25, 0.92]
    cells = [
        {"world": "w", "scenario": "s", "references": 1, "truth": t, "kind": k, "seed": 0, "grade": g, "why": ["because"]}
        for t, k, g in (("gone", "retrained", "refuted"), ("kept", "muted", "supported"), ("gone", "retrained, 3", "verified"))
    ]
    text = grades.markdown(cells)
    assert "Not gone, and at least supported: muted 0 (supported, 1 references)." in text and "Gone, and refuted: retrained 0, 1 references: because." in text
    assert "| retrained, 3 | 1 | 1 | 0 | 0 | 0 | 1 | 1.000" in text and "| not gone | 1 | 1 | 0 | 0 | 1 | 0 |" in text
    for wrong in (["--grades"], ["--audit-power", "--grades", "--sizes", "0"], ["--audit-power", "--sizes", "3"]):
        assert CliRunner().invoke(app, ["bench", "--world", "digits", *wrong]).exit_code != 0


@pytest.mark.slow
def test_grades_of_models_of_known_truth(tmp_path, monkeypatch):
    """Retrained models are verified with a reference and supported without, the untouched one and a lowered bias are refuted; cells are not run again."""
    from expunge.bench import grades

    monkeypatch.setattr(adaptive, "FAMILIES", {"classification": {"bias_lowered": sabotage.FAMILIES["bias_lowered"]}})
    monkeypatch.setattr(grades, "KINDS", {})
    ask = lambda: grades.bench("digits", ["class"], tmp_path, counts=(1, 0), gone=2, originals=1, quick=True, cache=trained())  # noqa: E731
    cells = ask()
    by = {(c["truth"], c["references"]): {x["grade"] for x in cells if (x["truth"], x["references"]) == (c["truth"], c["references"])} for c in cells}
    assert by == {("gone", 1): {"verified"}, ("gone", 0): {"supported"}, ("kept", 1): {"refuted"}, ("kept", 0): {"refuted"}}
    monkeypatch.setattr(grades, "examined", lambda *a, **k: pytest.fail("asked again"))
    assert ask() == cells
