"""Relearn time and AIN. Source: cards audits-classification (Relearn) and deep-regression (AIN)."""

from __future__ import annotations

import copy

from torch import nn

from expunge import guard
from expunge.audits.core import Probe, Row, score
from expunge.registry import check
from expunge.session import scratch
from expunge.updates.descend import descend

BUDGET, EVERY, LR, BATCH = 60, 2, 0.01, 64


@check(tasks=("classification", "regression"), needs=("forget",), slow=True)
def relearn(p: Probe) -> list[Row]:
    """relearn.steps: SGD steps on forget until its loss is within 5 % (or 0.05) of the original's; relearn.ain: divided by a retrained model's.

    AIN is 1 for an ideal result and far below 1 where residue makes relearning fast. At most 60 steps, evaluated every 2, interpolated.
    """
    goal = max(1.05 * float(p.scores("before", "forget").nll.mean()), float(p.scores("before", "forget").nll.mean()) + 0.05)
    note = f"SGD lr {LR}, batch {BATCH}, at most {BUDGET} steps, evaluated every {EVERY}"
    mine = steps(p, p.after, goal)
    rows = [Row("relearn.steps", mine, mine - EVERY, mine + EVERY, 1, note, indicative=True)]
    if p.references:
        rest = []
        for r in p.references[:2]:
            key = ("relearn", id(r), goal, p.seed)
            if key not in p.cache:
                p.cache[key] = (steps(p, r, goal), r)
            rest.append(p.cache[key][0])
        low, high, mean = min(rest), max(rest), sum(rest) / len(rest)
        value = mine / max(mean, 1e-9)
        rows.append(Row("relearn.ain", value, (mine - EVERY) / max(high, EVERY), (mine + EVERY) / max(low - EVERY, 1e-9), len(rest), note, indicative=True))
    return rows


def steps(p: Probe, model: nn.Module, goal: float) -> float:
    """Steps until the mean forget loss is at most `goal`, linear between evaluations; BUDGET if it never is."""
    twin = copy.deepcopy(model)
    for q in twin.parameters():
        q.requires_grad_(True)
    s = scratch(twin)
    before = float(score(twin, p.task, p.split.forget).nll.mean())
    if before <= goal:
        return 0.0
    with guard.watching(guard.Guard()):
        for done in range(0, BUDGET, EVERY):
            s.eval()
            batches = p.task.batches(p.split.forget, BATCH, epochs=EVERY / max(1, -(-len(p.split.forget) // BATCH)), seed=p.seed + done)
            taken = len(descend(s, lambda b: p.task.forward(twin, b).mean.mean(), batches, lr=LR, momentum=0.9, clip=10.0))
            after = float(score(twin, p.task, p.split.forget).nll.mean())
            if after <= goal:
                return done + taken * (before - goal) / max(before - after, 1e-12)
            before = after
    return float(BUDGET)
