"""Grades: never greener than the evidence; what a file says of itself is a claim."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
from test_references import muted, original_of
from worlds import digits, original, retrained

import expunge
from expunge.audits.core import Row
from expunge.audits.grade import FAMILIES, GRADES, Finding, Grade, family, found, grade
from expunge.audits.named import Named
from expunge.audits.verdict import Trial
from expunge.core.errors import SettingError
from expunge.engine.run import Attempt
from expunge.planning.outcome import Try, assured, families, required

HOLDS = [Finding(f, f"{f}.row", "<= 1", "holds") for f in FAMILIES]


def with_state(which: str, state: str) -> list[Finding]:
    """All families hold, but for one whose rule is in that state."""
    return [replace(f, state=state, why="so it is") if f.family == which else f for f in HOLDS]


def test_all_families_and_a_comparison_are_verified():
    assert grade(HOLDS, [], comparison="3 references") == Grade("verified", tuple(HOLDS))
    bare = grade(HOLDS, [])
    assert bare.grade == "supported" and "compared" in bare.why[0] and "retrain" in bare.more[0]


@pytest.mark.parametrize("which", FAMILIES)
@pytest.mark.parametrize(
    ("state", "expected"), [("broken", "refuted"), ("thin", "inconclusive"), ("near", None), ("missing", "inconclusive"), ("unusable", None)],
)  # fmt: skip
def test_the_truth_table(which, state, expected):
    """A broken rule refutes; one that is thin or missing leaves it open, one that is near does outside of closeness; one that is unusable counts against its
    family and is named."""
    g = grade(with_state(which, state), [], comparison="3 references")
    assert g.grade == (expected or ("supported" if which == "closeness" else "inconclusive"))
    assert any(f"{which}.row" in why for why in g.why)
    both = grade([*with_state(which, state), Finding(which, "other", "<= 1", "holds")], [], comparison="3 references")
    assert both.grade == (expected or ("inconclusive" if state == "near" and which != "closeness" else "supported"))  # never verified with such a rule


@pytest.mark.parametrize("which", FAMILIES)
def test_a_family_without_a_rule_is_a_gap(which):
    g = grade([f for f in HOLDS if f.family != which], [], comparison="3 references")
    assert g.grade == ("supported" if which == "closeness" else "inconclusive") and any(which in why for why in g.why)
    assert grade([f for f in HOLDS if f.family != which], [], families=[f for f in FAMILIES if f != which], comparison="x").grade == "verified"


def test_named_checks_and_the_gate_are_one():
    for id_, expected in (("A1", "refuted"), ("B4", "refuted"), ("C5", "verified"), ("D3", "verified")):
        assert grade(HOLDS, [Named(id_, "a statement", "FAIL", "why")], comparison="3 references").grade == expected
    assert grade(HOLDS, [Named("B4", "a statement", "UNKNOWN", "why")], comparison="3 references").grade == "verified"
    assert grade(HOLDS, [], comparison="3 references", doubts=["x was not believed"]).grade == "supported"


def test_rows_become_findings_by_both_ends():
    trial = Trial("accuracy.forget", "<= 0.1", "1", "0", True)
    cases = {(0.0, 0.0, 0.05): "holds", (0.05, 0.0, 0.2): "near", (0.15, 0.05, 0.3): "thin", (0.5, 0.4, 0.6): "broken", (math.nan, 0, 1): "missing"}
    for (value, low, high), state in cases.items():
        (f,) = found([Row("accuracy.forget", value, low, high, 50)], [trial])
        assert (f.family, f.state) == ("output", state)
    assert found([], [trial])[0].state == "missing"
    assert found([Row("accuracy.forget", 0.5, 0.4, 0.6, 50, indicative=True)], [trial])[0].state == "thin"  # indicative rows decide nothing alone
    assert found([Row("accuracy.forget", 0.0, 0.0, 0.05, 50)], [replace(trial, usable=False)])[0].state == "unusable"
    assert {family(n) for n in ("klom_ratio.forget", "tofu.d_over_critical", "gap_closed.margin")} == {"closeness"}
    assert {family(n) for n in ("drop.test", "klom_ratio.test", "wording.retain.lost")} == {"utility"} and family("restore.closed") == "return"


def test_what_is_required():
    assert required(FAMILIES) == "verified" and required(("output", "utility")) == "supported" and required(FAMILIES, "supported") == "supported"
    with pytest.raises(SettingError, match="supported or verified, not 'yes'"):
        required(FAMILIES, "yes")
    task = expunge.classification()
    assert families(task, None) == FAMILIES and families(task, {"accuracy.forget": "<= 1", "drop.test": "<= 1"}) == ("output", "utility")
    assert [Grade(a).reaches("supported") for a in GRADES] == [False, False, True, True]
    assert not Try(Attempt("m", {}, 0, "ok", "", None), (Row("a", 0, 0, 0, 1),)).passed  # without a grade nothing passes


def test_what_a_file_says_of_itself_is_a_claim():
    """A patch whose meta says `retrain` is not exact for that; one that says less is taken at its word."""
    one = Try(Attempt("retrain", {}, 0, "ok", "", None), grade=Grade("verified"))
    assert assured(one) == {"assurance": "approximate", "claimed": "exact"}
    assert assured(replace(one, attempt=replace(one.attempt, ran=True))) == {"assurance": "exact"}
    assert assured(replace(one, attempt=replace(one.attempt, method="guardrail"))) == {"assurance": "suppression"}
    back = (Row("repair.free.none", 0.0, -0.1, 0.1, 99), Row("repair.free.weights", 0.98, 0.9, 1.0, 99, "1 of 650 weights put back: 0.98 of 1"))
    assert assured(replace(one, rows=back, attempt=replace(one.attempt, ran=True)))["assurance"] == "suppression"


def test_a_suppression_is_refuted_with_and_without_references():
    model, task, split = digits()
    cut = muted(model, split)
    true = [retrained("digits", "class", k) for k in range(3)]
    for references in (true, true[:1], []):
        v = expunge.audited(model, copy.deepcopy(cut), task, split, references=references, slow=False)
        assert not v.passed and v.grade.grade == "refuted", (len(references), v.grade)
    assert original("digits") is model


def test_three_originals_as_references_leave_it_unverified():
    model, task, split = digits()
    v = expunge.audited(model, retrained("digits", "class", 3), task, split, references=[model, original_of(1)], slow=False)
    assert len(v.refused) == 2 and v.grade.grade != "verified" and not v.passed and any("not believed" in n for n in v.notes)
