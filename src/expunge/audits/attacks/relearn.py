"""Relearning as an attack with a budget: how fast the forget set comes back, all of it (relearn) or the half that is not shown (relearning).

Sources: cards audits-classification (Relearn), deep-regression (AIN), open-problems (B3).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.membership.losses import targets
from expunge.core import guard
from expunge.core.registry import check
from expunge.core.session import scratch
from expunge.core.stats import Z, bootstrap, matched
from expunge.core.types import Data, Task
from expunge.parts.reading import score
from expunge.parts.training import pace
from expunge.parts.updates.descend import descend

BUDGET, EVERY, BATCH = 60, 2, 64

STEPS = (0, 2, 4, 8, 16, 32)
"""Where the relearning curve is read, in SGD steps."""

LEAST = 0.1
"""Smallest area of the model before that a share of it can be taken of."""


@check(tasks=("classification", "regression", "causal_lm"), needs=("forget",), slow=True)
def relearn(p: Probe) -> list[Row]:
    """relearn.steps: steps on forget until its loss is within 5 % (or 0.05) of the original's; relearn.ain: divided by a retrained model's.

    AIN is 1 for an ideal result and far below 1 where residue makes relearning fast. At most 60 steps, evaluated every 2, interpolated.
    """
    goal = max(1.05 * float(p.scores("before", "forget").nll.mean()), float(p.scores("before", "forget").nll.mean()) + 0.05)
    note = f"batch {BATCH}, at most {BUDGET} steps, evaluated every {EVERY}"
    mine = steps(p, p.after, goal)
    rows = [Row("relearn.steps", mine, mine - EVERY, mine + EVERY, 1, note, indicative=True)]
    if p.references:
        rest = []
        for r in p.references[:2]:
            rest.append(p.once(("relearn", goal, p.seed), r, lambda r=r: steps(p, r, goal)))
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
            taken = len(descend(s, lambda b: p.task.forward(twin, b).mean.mean(), batches, **pace(p.task, twin)))
            after = float(score(twin, p.task, p.split.forget).nll.mean())
            if after <= goal:
                return done + taken * (before - goal) / max(before - after, 1e-12)
            before = after
    return float(BUDGET)


@check(tasks=("classification", "causal_lm"), needs=("forget", "test"), reference=True, slow=True)
def relearning(p: Probe) -> list[Row]:
    """relearning.<steps>: excess of what is known of one half of the forget set after the other half was relearnt for that many steps.

    relearning.area: its mean over the curve. gap_closed.relearning = 1 - area / area of the model before: 0 for doing nothing, 1 for retrained.
    Batch 32, step size and optimiser of `training.pace`; each half is read while the other is shown, so a record that is read was never trained on and
    what comes back was inside. Known: a removed class is answered, or a record's loss lies below those of unseen records of its label.
    """
    if len(p.split.forget) < 4:
        return []
    after, before, *rest = (p.once(("relearning", p.seed), m, lambda m=m: curve(p, m)) for m in (p.after, p.before, *p.references[:3]))
    mean = torch.stack(rest).mean(0)
    note = f"each half read while the other is relearnt; against {len(rest)} retrained models"
    rows = [_wider(paired(f"relearning.{s}", after[k] - mean[k], note), [r[k] - mean[k] for r in rest]) for k, s in enumerate(STEPS)]
    area, whole = (after - mean).mean(0), (before - mean).mean(0)
    rows.append(_wider(paired("relearning.area", area, note), [(r - mean).mean(0) for r in rest]))
    n, name = len(area), "gap_closed.relearning"
    if float(whole.mean()) < LEAST:
        return [*rows, Row(name, math.nan, -math.inf, math.inf, n, f"the model before is {float(whole.mean()):.3g} above retrained models: nothing to close")]
    gap = lambda r: float(1 - area[r].mean() / whole[r].mean().clamp(min=1e-12))  # noqa: E731
    return [*rows, Row(name, gap(torch.arange(n)), *bootstrap(gap, n, p.seed), n, note)]


def _wider(row: Row, others: list[Tensor]) -> Row:
    """The row with the spread between retrained models added to its interval, in squares."""
    between = torch.tensor([float(o.mean()) for o in others]).var(correction=1).item() if len(others) > 1 else 0.0
    half = math.hypot(row.value - row.low, Z * (between * (1 + 1 / len(others))) ** 0.5)
    return replace(row, low=row.value - half, high=row.value + half)


def curve(p: Probe, model: nn.Module) -> Tensor:
    """(S, N) what a model knows of each forgotten record, 0..1, after each of STEPS steps on the half that the record is not in."""
    n = len(p.split.forget)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(p.seed))
    found = torch.zeros(len(STEPS), n)
    for shown, hidden in ((order[: n // 2], order[n // 2 :]), (order[n // 2 :], order[: n // 2])):
        for k, twin in enumerate(relearnt(p.task, model, p.split.forget.take(shown), STEPS, p.seed)):
            found[k, hidden] = known(p, twin, hidden)
    return found


def relearnt(task: Task, model: nn.Module, shown: Data, steps: Sequence[int], seed: int) -> Iterator[nn.Module]:
    """A copy of the model after each of these numbers of steps on `shown`: batch 32, step size and optimiser of `training.pace`. It trains on when the next is
    asked for."""
    twin = copy.deepcopy(model).requires_grad_(True)
    s = scratch(twin)
    for a, b in itertools.pairwise((0, *steps)):
        if b > a:
            with guard.watching(guard.Guard()):
                s.eval()
                batches = task.batches(shown, 32, epochs=(b - a) / -(-len(shown) // 32), seed=seed + a)
                descend(s, lambda batch: task.forward(twin, batch).mean.mean(), batches, **pace(task, twin))
        yield twin


def known(p: Probe, model: nn.Module, rows: Tensor) -> Tensor:
    """(n,) per record of the forget set: a removed class is answered rightly, 0 or 1; or the share of matched unseen records with a larger loss."""
    mine = score(model, p.task, p.split.forget.take(rows))
    if p.removed():
        return mine.correct.float()
    test = score(model, p.task, p.split.test)
    drawn, _ = matched(targets(mine), targets(test), p.seed)
    losses = test.nll[drawn].sort().values
    below, above = torch.searchsorted(losses, mine.nll), torch.searchsorted(losses, mine.nll, right=True)
    return 1 - (below + above) / (2 * max(1, len(losses)))
