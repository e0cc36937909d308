"""The audit of the audit: power, gates and redundancy on made-up cells, and what the sabotage really is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import digits, retrained, same, state

from expunge.audits.core import Probe, audit
from expunge.bench import power, sabotage
from expunge.modalities.classification.task import head
from expunge.parts.reading import outputs, score


def cell(truth: str, kind: str, seed: int, values: dict[str, float], rules: dict[str, str] | None = None) -> dict:
    rows = [
        {"name": n, "value": v, "low": v, "high": v, "n": 10, "note": "", "indicative": False, "at": None, "check": n.split(".")[0]} for n, v in values.items()
    ]
    rules = {"sees.all": "<= 3", "drop.test": "<= 0.1"} if rules is None else rules
    return {"world": "w", "scenario": "class", "truth": truth, "kind": kind, "seed": seed, "seconds": {"sees": 0.5, "drop": 0.25}, "rows": rows, "rules": rules}


@pytest.fixture
def cells() -> list[dict]:
    """24 gone models, 12 kept in three kinds: `sees` tells all, `half` misses one kind, `blind` none, `flat` is constant, `twin` repeats sees."""
    g, out = np.random.default_rng(0), []
    for k in range(24):
        a = float(g.normal())
        out.append(
            cell(
                "gone",
                "retrained",
                k,
                {"sees.all": a, "twin.x": 2 * a, "half.x": float(g.normal()), "blind.x": float(g.normal()), "flat.x": 1.0, "drop.test": 0.0},
            )
        )
    for k in range(12):
        a, far = 20 + float(g.normal()), 0.0 if k % 3 == 0 else 20.0
        row = {"sees.all": a, "twin.x": 2 * a, "half.x": far + float(g.normal()), "blind.x": float(g.normal()), "flat.x": 1.0, "drop.test": 0.0}
        out.append(cell("kept", f"kind{k % 3}", k, row))
    return out


def test_powers_and_redundancy(cells):
    found = {r["row"]: r for r in power.powers(cells)}
    assert found["sees.all"]["power"] == 1 and found["sees.all"]["missed"] == [] and found["sees.all"]["auc"] == 1
    assert found["sees.all"]["repeats"] == "twin.x" and found["twin.x"]["repeats"] == ""  # the cheaper one is the one to keep
    assert found["half.x"]["power"] == pytest.approx(8 / 12, abs=0.1) and found["half.x"]["missed"] == ["kind0"]
    assert found["blind.x"]["power"] < 0.4 and found["blind.x"]["auc"] < 0.75
    assert found["sees.all"]["needed"] <= 2 < found["blind.x"]["needed"]
    assert found["flat.x"]["power"] == 0 and found["flat.x"]["auc"] == 0.5
    text = power.markdown(cells)
    assert "24 models that are gone, 12 that are not" in text and "| sees.all | 1.00" in text


def test_gates_count_what_they_take(cells):
    cells[0]["rows"][0].update(value=9.0, low=9.0, high=9.0)  # a gone model that reads badly
    cells[-1]["rows"][0].update(value=0.0, low=0.0, high=0.0)  # a kept one that reads well
    default = {g["gate"]: g for g in power.gates(cells)}["default"]
    assert default["gone"][0] == pytest.approx(23 / 24) and default["kept"][0] == pytest.approx(1 / 12)
    assert default["gone"][1] < 23 / 24 < default["gone"][2]
    assert default["passes"] == [f"{cells[-1]['kind']} 1"] and default["seconds"] == pytest.approx(0.75)
    assert not power.accepted(cells[1], {"drop.test": "<= 0.1"})  # no rule measures forgetting
    assert not power.accepted(cells[1], {"missing.row": "<= 1", "sees.all": "<= 3"})


def test_sabotage_is_no_forgetting():
    """No maker touches the model it is given. Those that work on the output leave every other layer as it was, and what was learnt in it."""
    model, task, split = digits("class")
    before, told = state(model), outputs(retrained("digits", "class", 0), task, split.forget)
    made = {kind: make(model, task, split, 7) for kind, make in sabotage.SABOTAGE.items()} | {"copied": sabotage.masked(model, task, split, 7, told)}
    assert same(before, state(model))
    assert len(made) >= 8
    for kind in ("muted", "cooled", "top_only", "masked", "copied"):
        name = head(made[kind])[0]
        moved = {n for n, t in made[kind].state_dict().items() if not torch.equal(t, model.state_dict()[n])}
        assert moved and all(n.startswith(name) for n in moved), kind
    for kind in ("muted", "masked", "copied"):
        assert float(score(made[kind], task, split.forget).correct.float().mean()) < 0.1, kind
    for kind in ("no_op", "noise", "wrong_way", "cooled", "half", "one_view"):
        shown = replace(split.forget, x=split.forget.x.roll(1, -1)) if kind == "one_view" else split.forget
        assert float(score(made[kind], task, shown).correct.float().mean()) > 0.4, kind


def test_relearning_reads_records_that_were_not_shown():
    """Doing nothing reads 0, a further retrained model about 1; a bias that hides the class from the answers does not hide what is inside."""
    model, task, split = digits("class")
    refs = tuple(retrained("digits", "class", k) for k in range(3))
    cache: dict = {}
    models = {"nothing": model, "retrained": retrained("digits", "class", 3), "muted": sabotage.muted(model, task, split, 0)}
    before = {n: state(m) for n, m in models.items()}
    found = {n: {r.name: r for r in audit(Probe(model, m, task, split, refs, cache=cache), ["relearning"])} for n, m in models.items()}
    assert all(same(before[n], state(m)) for n, m in models.items())
    assert found["nothing"]["gap_closed.relearning"].value == 0
    assert found["retrained"]["gap_closed.relearning"].low > 0.8
    assert found["muted"]["relearning.0"].value < 0.1 < found["muted"]["relearning.area"].low
    assert found["muted"]["gap_closed.relearning"].high < 0.7
    curve = cache[("relearning", 0, id(model))][0]
    assert curve.shape == (6, len(split.forget)) and bool((curve[0] == score(model, task, split.forget).correct.float()).all())
