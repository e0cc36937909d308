"""Rules and their self-tests: what makes a rule usable, what the default rules for texts refuse, and what they let through."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from worlds import small, toy

from expunge.audits import verdict
from expunge.audits.core import Probe, Row, audit
from expunge.audits.language.text import broken
from expunge.audits.verdict import checks_for, default_rules, judge, selftest
from expunge.core.types import Split, Task, concat
from expunge.parts import training


@pytest.mark.parametrize(
    ("rule", "row", "usable", "few"),
    [
        ("<= 0.2", (0.167, 0.0, 0.46), False, True),  # broken by the end of the interval alone
        ("0.4..0.6", (0.55, 0.31, 0.79), False, True),
        ("<= 0.2", (0.4, 0.1, 0.7), True, False),
        ("0.4..0.6", (0.65, 0.4, 0.9), True, False),
        ("<= 0.2", (0.1, 0.05, 0.15), False, False),
        ("<= 0.2", (math.nan, -math.inf, math.inf), False, False),
    ],
)
@pytest.mark.parametrize("name", ["membership.loss_auc", "drop.retain"])
def test_a_rule_is_usable_only_if_the_model_that_must_fail_breaks_it_at_its_value(monkeypatch, name, rule, row, usable, few):
    model, task, split = small("causal_lm")
    monkeypatch.setattr(verdict, "audit", lambda p, names, slow: [Row(name, row[0], row[1], row[2], 6)])
    (trial,) = selftest(Probe(model, model, task, split), {name: rule})
    assert trial.usable is usable
    assert ("so few records (n = 6) cannot tell" in trial.original) is few, trial.original


def test_a_rule_that_few_records_cannot_try_certifies_nothing(monkeypatch):
    model, task, split = small("causal_lm")
    rows = [Row("membership.loss_auc", 0.55, 0.31, 0.79, 6)]
    monkeypatch.setattr(verdict, "audit", lambda p, names, slow: rows)
    trials = selftest(Probe(model, model, task, split), {"membership.loss_auc": "0.4..0.6"})
    (reason,) = judge([replace(rows[0], low=0.5, high=0.6)], trials)
    assert "no usable check of forgetting" in reason and "membership.loss_auc" in reason and "so few records" in reason


@pytest.fixture(scope="module")
def halves() -> tuple[nn.Module, nn.Module, Task, Split]:
    """The toy model, one trained without the half of its authors that is to be forgotten, and the split; 24 records a part."""
    model, task, known = toy("causal_lm")
    split = replace(known, forget=concat(known.forget, known.retain.take(range(18))), retain=known.retain.take(range(18, 42)), general=None, anchor=None)
    gold = training.fresh(model, 7)
    recipe = {"epochs": 40, "batch_size": 8, "lr": 3e-3, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1, "clip": 1.0}
    training.train(gold, task, concat(split.retain, known.general.take(range(12))), seed=3, **recipe)
    return model, gold, task, split


def muted(model: nn.Module, split: Split) -> nn.Module:
    """The model with a last layer that says "." whatever is asked."""
    twin: Any = copy.deepcopy(model)
    head = nn.Linear(twin.lm_head.in_features, twin.lm_head.out_features)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[split.forget.format.tokenizer.encode(".")[-1]] = 8.0
    twin.lm_head = head
    return twin.eval()


@pytest.mark.parametrize(
    ("without", "name"),
    [
        ((), "wording.retain.lost"),
        (("test", "validation"), "wording.retain.lost"),
        (("retain",), "wording.test.broken"),
        (("retain", "test", "validation"), "wording.forget.broken"),
    ],
)
def test_without_gold_models_a_model_that_says_nothing_is_refused(halves, without, name):
    model, gold, task, whole = halves
    split = replace(whole, **dict.fromkeys(without))
    dots = muted(model, split)
    assert set("".join(task.sample(dots, split.forget.take([0, 1]), new=9))) == {"."}
    p = Probe(model, model, task, split)
    rules = default_rules(p)
    trials = selftest(p, rules)
    assert name in rules and all(t.usable for t in trials)

    def reasons(after: nn.Module, only=lambda t: True) -> list[str]:
        return judge(audit(replace(p, after=after), checks_for(rules)), [t for t in trials if only(t)])

    assert any(r.startswith(f"{name} is 1 ") for r in reasons(dots))
    if "retain" in without:
        assert not reasons(dots, lambda t: t.name != name)  # no other rule refuses it
    assert not any(r.startswith("wording") for r in (*reasons(model), *reasons(gold)))
    assert any("unseen" in r or "extraction" in r for r in reasons(model))
    if without == ("retain",):
        assert not reasons(gold)


def test_broken_answers_by_hand():
    same = ["It is in Oslo."] * 3 + ["It is in Rome."]
    assert broken(same).tolist() == [True, True, True, False] and not broken(same[1:]).any()  # most of fewer than four says nothing
    assert not broken(["I do not know that."] * 9).any()
    assert broken(["", " ", "...", "12", "a b c a b c a b c a b c", "a b c d e f g"]).tolist() == [True, True, True, False, True, False]
    assert len(broken([])) == 0


def test_answers_that_were_alike_before_are_no_loss():
    """Yes and no questions: what is answered as before is no fault of the unlearning."""
    model, task, split = small("causal_lm")
    p = Probe(model, copy.deepcopy(model), task, split)
    for m, answers in ((p.before, ["Yes"] * len(split.retain)), (p.after, ["Yes"] * len(split.retain))):
        p.once(("said", "retain", 0), m, lambda answers=answers: answers)
    rows = {r.name: r for r in audit(p, ["wording"])}
    assert rows["wording.retain.broken"].value == 0 and f"{len(split.retain)} of {len(split.retain)} before" in rows["wording.retain.broken"].note
    assert rows["wording.retain.lost"].value == 0 and "wording.test.broken" not in rows
    alone = {r.name for r in audit(Probe(model, model, task, replace(split, retain=None)), ["wording"])}
    assert {"wording.test.broken", "wording.forget.broken"} <= alone and "wording.retain.lost" not in alone


def test_general_texts_are_read_without_retain():
    model, task, split = small("causal_lm")
    p = Probe(model, model, task, replace(split, retain=None, general=split.validation))
    assert set(default_rules(p)) <= {r.name for r in audit(p, checks_for(default_rules(p)))}
