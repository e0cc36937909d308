"""Forgotten records against unseen ones of the same form: an exact test for requests of any size."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from worlds import copied, digits, retrained, small

import expunge
from expunge.audits import unseen
from expunge.audits.attacks import reread
from expunge.audits.core import Probe, audit
from expunge.audits.unseen import Unseen, clusters, compared, same_form, strangers
from expunge.core.session import scratch
from expunge.core.types import concat
from expunge.modalities.records import validation
from expunge.parts.forms import better
from expunge.parts.reading import score
from expunge.parts.updates.descend import descend

G = torch.Generator().manual_seed(0)


def exact(mine, others) -> float:
    """Share of all ways to name as many units the forgotten ones with a mean share at least as large."""
    pooled, n = torch.cat([mine, others]), len(mine)

    def u(rows) -> float:
        rest = [k for k in range(len(pooled)) if k not in rows]
        return float(better(pooled[list(rows)], pooled[rest]).sum())

    ways = [u(rows) for rows in itertools.combinations(range(len(pooled)), n)]
    return sum(w >= u(range(n)) - 1e-9 for w in ways) / len(ways)


@pytest.mark.parametrize("n", [1, 3])
def test_p_is_that_of_all_ways_to_name_them(n):
    for _ in range(3):
        mine, others = torch.randn(n, generator=G) - 1, torch.randn(9, generator=G)
        value, _, p = unseen.tested(mine, torch.zeros(n), others, torch.zeros(9))
        assert value == pytest.approx(float(better(mine, others).mean())) and p == pytest.approx(exact(mine, others), abs=1e-9)


def test_many_records_against_few_unseen_ones_are_counted_whole():
    """12 against 2: 91 ways, one of them as it is."""
    assert unseen.tested(torch.zeros(12), torch.zeros(12), torch.ones(2), torch.zeros(2))[2] == pytest.approx(1 / 91)


def test_p_is_that_of_mann_and_whitney_and_forms_are_kept_apart():
    from scipy.stats import mannwhitneyu

    mine, others = torch.randn(12, generator=G) - 0.5, torch.randn(40, generator=G)
    p = unseen.tested(mine, torch.zeros(12), others, torch.zeros(40))[2]
    assert p == pytest.approx(mannwhitneyu(mine, others, alternative="less").pvalue, abs=0.02)
    form, forms = torch.arange(12) % 2, torch.arange(40) % 2
    moved = unseen.tested(mine + 100 * form, form, others + 100 * forms, forms)[2]  # a form that is harder for all changes nothing
    assert (
        moved == pytest.approx(unseen.tested(mine, form, others, forms)[2])
        and abs(moved - unseen.tested(mine + 100 * form, 0 * form, others, 0 * forms)[2]) > 0.1
    )


def test_chance_is_even_where_nothing_tells_them_apart():
    p = torch.tensor(
        [unseen.tested(torch.randn(3, generator=G), torch.zeros(3), torch.randn(30, generator=G), torch.zeros(30), draws=499)[2] for _ in range(200)]
    )
    assert 0.01 <= float((p < 0.05).float().mean()) <= 0.1 and 0.4 < float(p.mean()) < 0.6


def test_wordings_of_one_fact_are_one_unit():
    from types import SimpleNamespace as Data

    data = Data(rows=({"cluster": "a"}, {"cluster": "a"}, {"cluster": 3}, {}))
    assert clusters(data).tolist() == [0, 0, 1, 2]
    p = Probe(torch.nn.Identity(), torch.nn.Identity(), expunge.classification(), Data(forget=data))  # pyright: ignore[reportArgumentType]
    u = Unseen(Data(rows=({},) * 20), torch.zeros(20, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    rows = compared(p, u, "x", torch.tensor([0.0, 0.2, 0.1, 0.3]), torch.arange(1.0, 21.0))
    assert [r.n for r in rows] == [3, 3] and rows[0].value == 1.0 and rows[1].value < 0.01


def test_general_knowledge_is_no_unseen_text():
    _, _, split = small("causal_lm")
    rows = tuple({**row, "set": "world_facts"} if k < 3 else row for k, row in enumerate(split.test.rows))
    assert strangers(replace(split.test, rows=rows)).tolist() == list(range(3, len(rows)))


def wrong(n: int, seed: int = 0):
    """n records with wrong labels that the original has not learnt, of the digits."""
    model, task, split = digits("random")
    rows = torch.randperm(len(split.forget), generator=torch.Generator().manual_seed(seed))[:n]
    gone = split.forget.take(rows)
    return model, task, replace(split, forget=replace(gone, y=(gone.y + 1) % 10))


def test_a_wrong_label_is_compared_with_wrong_labels():
    model, task, split = wrong(6)
    p = Probe(model, model, task, split)
    u = same_form(p)
    assert u is not None and (u.mine >= 0).all() and len(u.data) == len(u.form)
    for k in range(len(split.forget)):
        mine = u.data.y[u.form == u.mine[k]]
        assert len(mine) > 10 and (mine == split.forget.y[k]).all()
    rows = {r.name: r for r in audit(p, ["unseen", "repair"])}
    assert rows["unseen.p"].value > 0.05 and rows["repair.p"].value > 0.025 and rows["unseen.p"].n == 6


@functools.cache
def learnt(n: int):
    """The original after it was taught n wrong labels by heart."""
    model, task, split = wrong(n)
    taught = copied(model)
    s, data = scratch(taught), concat(*[split.forget] * 8, split.retain.take(torch.arange(200)))
    s.train()
    descend(s, lambda b: task.forward(taught, b).mean.mean(), task.batches(data, 32, epochs=8, seed=0), lr=0.02, momentum=0.9)
    return taught.eval()


def test_few_records_are_graded():
    """Wrong labels learnt by heart: refuted for the model that knows them, at least supported for one that never saw them, with a reference or without."""
    _, task, split = wrong(3)
    taught = learnt(3)
    for references in ((), (retrained("digits", "random", 1),)):
        audits = [expunge.audited(taught, m, task, split, references=references, slow=False) for m in (copied(taught), retrained("digits", "random", 0))]
        grades = [v.grade.grade for v in audits]
        assert grades[0] == "refuted" and grades[1] in ("supported", "verified"), (len(references), grades)


def test_repairs_that_look_at_the_forgotten_records_are_not_tested():
    """Weights put back by what they take off the loss of the forgotten records favour these over unseen ones in any model."""
    _, task, split = wrong(3)
    p = Probe(learnt(3), retrained("digits", "random", 0), task, split)
    audit(p, ["repair"])
    losses = reread._losses(p)
    assert not any("pull" in said for said in losses) and any("size" in said for said in losses)


def test_a_repair_that_brings_back_next_to_nothing_is_no_sign():
    """Forgotten records first in rank, but not known: no memory. A tenth of what was known, and the same ranks tell."""
    _, task, split = wrong(3)
    p = Probe(learnt(3), retrained("digits", "random", 0), task, split)
    r = reread.reading(p)
    assert r is not None and reread.noticed(p, r, "repair.p") == []
    first = torch.arange(len(r.data)).double()
    for share, told in ((0.09, False), (0.11, True), (float("inf"), True)):
        reread._losses(p).clear()
        reread._losses(p)["ranks"] = first, share
        assert (reread.noticed(p, r, "repair.p")[0].value < 0.025) is told


def test_validation_compares_wrong_labels_with_wrong_labels():
    """The score of tuning is near 0 for a model that never saw the wrong labels, and near -1 for one that knows them; against validation records as they are
    labelled it would be the other way round."""
    _, task, split = wrong(12)
    taught, other = learnt(12), retrained("digits", "random", 0)
    validate = validation(taught, task, split)
    assert validate is not None and validate(other) > -0.3 and validate(taught) < -0.5
    old = torch.cat([score(other, task, part).nll for part in (split.forget, split.validation)])
    assert better(old[: len(split.forget)], old[len(split.forget) :]).mean() < 0.1
