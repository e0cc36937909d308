"""What a diffusion model predicts for a concept's prompts, where no judge can look at its drawings.

On states x_t of trajectories that the model before draws for the concept c, with a the anchor's prompt (the empty one where there is no anchor):
    left    < e(x_t, c) - e*(x_t, a), e*(x_t, c) - e*(x_t, a) > / || e*(x_t, c) - e*(x_t, a) ||^2
            1: as before; 0: the concept is drawn as its anchor would be; below 0: pushed beyond it
    shift   || e(x_t, r) - e*(x_t, r) ||^2 / || e*(x_t, r) - e*(x_t, empty) ||^2        on trajectories of retained prompts r: 0 is untouched
e* is the model before, e the model after.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.core.registry import check
from expunge.modalities.diffusion.task import jump
from expunge.modalities.diffusion.trajectory import Pool, counterparts, pool, under
from expunge.modalities.pictures import Pictures

PROMPTS, PATH, GUIDANCE = 16, 4, 3.0
"""Trajectories of each part, states of each, and the guidance they are drawn with."""


def left(after: Tensor, before: Tensor, anchor: Tensor) -> Tensor:
    """(N,) share of what told the concept from its anchor that is still there, for predictions (N, ...).

    >>> a, c = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> [float(left(x, c, a)) for x in (c, a, -c)]
    [1.0, 0.0, -1.0]
    """
    d = (before - anchor).flatten(1)
    return ((after - anchor).flatten(1) * d).sum(1) / d.square().sum(1).clamp(min=1e-12)


def shift(after: Tensor, before: Tensor, null: Tensor) -> Tensor:
    """(N,) how far predictions (N, ...) moved, in units of what the prompt does.

    >>> float(shift(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])))
    0.25
    """
    return (after - before).flatten(1).square().sum(1) / (before - null).flatten(1).square().sum(1).clamp(min=1e-12)


@check(tasks=("diffusion",), needs=("forget",))
def redirection(p: Probe) -> list[Row]:
    """redirection.left over the concept's prompts, and redirection.shift over retained ones: mean over prompts of the mean over states. Both are nan where a
    model draws in one step: what it predicts on the way of another, in many steps, says nothing."""
    task: Any = p.task
    if task.null is None:
        return []
    if one := [name for name, model in (("before", p.before), ("after", p.after)) if jump(model)]:
        why = f"not measured: the model {' and the model '.join(one)} draws in one step, and its predictions at other times say nothing"
        names = ("left",) if p.split.retain is None else ("left", "shift")
        return [Row(f"redirection.{name}", math.nan, -math.inf, math.inf, 0, why) for name in names]
    rows = []
    drawn, states = trajectories(p, p.split.forget)
    anchor = task.null.expand(len(drawn), -1) if p.split.anchor is None else counterparts(drawn, p.split.forget, p.split.anchor)
    found = left(under(p.after, task, states, drawn.tokens), states.cond, under(p.before, task, states, anchor))
    rows.append(mean("redirection.left", per_prompt(found, states), "1: as before; 0: as the anchor; " + note(states)))
    if p.split.retain is not None:
        kept, states = trajectories(p, p.split.retain)
        moved = shift(under(p.after, task, states, kept.tokens), states.cond, states.null)
        rows.append(mean("redirection.shift", per_prompt(moved, states), "of retained prompts; " + note(states)))
    return rows


def trajectories(p: Probe, data: Pictures) -> tuple[Pictures, Pool]:
    """States of the model before for some prompts of a part."""
    make = lambda: pool(p.before, p.task, data, PROMPTS, guidance=GUIDANCE, steps=PATH, seed=p.seed)  # noqa: E731
    return p.once(("trajectories", data.digest, p.seed), p.before, make)


def per_prompt(values: Tensor, states: Pool) -> Tensor:
    """The mean over each trajectory's states."""
    return torch.stack([values[states.i == k].mean() for k in states.i.unique()])


def mean(name: str, values: Tensor, note: str) -> Row:
    """The mean of (N,) values with one-sided 95 % bounds by Student's t."""
    n = len(values)
    error = float(stdtrit(n - 1, 0.95)) * float(values.std()) / n**0.5 if n > 1 else float("inf")
    return Row(name, float(values.mean()), float(values.mean()) - error, float(values.mean()) + error, n, note)


def note(states: Pool) -> str:
    """How many states it was read on."""
    return f"{len(states)} states of {len(states.i.unique())} trajectories of the model before"
