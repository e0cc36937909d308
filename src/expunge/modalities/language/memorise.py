"""How much of a text a causal model can be made to say: memorisation accuracy MA and extraction likelihood EL_n of each text.

Source: card llm-ga; Jang et al., arXiv:2210.01504. The targets of a text, from its first to its last, are x_1 .. x_m; where every token but the first is
a target (`full`), m = T - 1 and the formulas are the card's.

    MA(x)            share of targets that greedy decoding would say, each given the true text before it
    EL_n(x)          1 / (m - n + 1) sum_i OVERLAP_n( greedy continuation up to x_m of all that stands before x_i , x_i .. x_m )
    OVERLAP_n(a, b)  share of the n-grams of a, with repeats, that occur in b; 0 where either has none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.types import Task
from expunge.modalities.language.remember import passes
from expunge.modalities.language.task import generate, with_targets
from expunge.modalities.language.texts import Texts
from expunge.parts.losses.language import kept


def overlap_n(a: Sequence[int], b: Sequence[int], n: int) -> float:
    """OVERLAP_n(a, b).

    >>> overlap_n([1, 2, 1, 2], [1, 2, 3], 2), overlap_n([1], [1], 2)
    (0.6666666666666666, 0.0)
    """
    mine, other = ([tuple(x[k : k + n]) for k in range(len(x) - n + 1)] for x in (a, b))
    there = set(other)
    return sum(g in there for g in mine) / len(mine) if mine and other else 0.0


def full(data: Texts) -> Texts:
    """The same texts with every token but the first as target."""
    return with_targets(data, [torch.arange(len(t)) > 0 for t in data.tokens])


def spans(data: Texts) -> list[tuple[int, int]]:
    """Place of the first target of each text, and the place after its last."""
    places = [t.nonzero().flatten() for t in data.targets]
    return [(max(1, int(p[0])), int(p[-1]) + 1) for p in places]


def memorised(model: nn.Module, task: Task, data: Texts, n: int = 10, size: int = 32) -> tuple[Tensor, Tensor]:
    """MA (N,) and EL_n (N,), from one teacher-forced pass and few generations; EL_n is nan where a text has fewer than n targets.

    Greedy decoding follows the true text up to the next token that it misses, and goes on in one way from there whatever prefix it began with: one
    generation for each missed token is exact, and a text known by heart needs none. The end token counts like any other and ends nothing.
    """
    if n < 1:
        raise SettingError(f"n must be 1 or larger, not {n}")
    hits, places = _hits(model, task, data, size), spans(data)
    missed = [[a + j for j in (~hit).nonzero().flatten().tolist()] for (a, _), hit in zip(places, hits, strict=True)]
    ways = _ways(model, data, [(k, j, b - j) for k, (a, b) in enumerate(places) for j in _asked(missed[k], a, b - n)], size)
    el = torch.full((len(data),), torch.nan)
    for k, (a, b) in enumerate(places):
        if b - a < n:
            continue
        x, total = data.tokens[k].tolist(), 0.0
        for start in range(a, b - n + 1):
            j = next((j for j in missed[k] if j >= start), b)
            total += overlap_n(x[start:j] + (ways[k, j] if j < b else []), x[start:b], n)
        el[k] = total / (b - a - n + 1)
    return _accuracy(data, hits), el


def memorisation_accuracy(model: nn.Module, task: Task, data: Texts, size: int = 32) -> Tensor:
    """(N,) MA, from one pass."""
    return _accuracy(data, _hits(model, task, data, size))


def extraction_likelihood(model: nn.Module, task: Task, data: Texts, n: int = 10, size: int = 32) -> Tensor:
    """(N,) EL_n; nan where a text has fewer than n targets."""
    return memorised(model, task, data, n, size)[1]


def _hits(model: nn.Module, task: Task, data: Texts, size: int) -> list[Tensor]:
    """For each token from the first target of a text to its last: whether it is the likeliest one."""
    place = [torch.arange(len(t)) for t in data.tokens]
    whole = with_targets(data, [(p >= a) & (p < b) for p, (a, b) in zip(place, spans(data), strict=True)])
    hits: list[Any] = [None] * len(data)
    for rows, _, out in passes(model, task, whole, size):
        hit = out.logits.argmax(-1) == out.labels
        for r, k in enumerate(rows.tolist()):
            hits[k] = hit[r][kept(out)[r]].cpu()
    return hits


def _accuracy(data: Texts, hits: list[Tensor]) -> Tensor:
    """(N,) share of hits among the targets."""
    return torch.stack([hit[targets[a:b]].float().mean() for (a, b), hit, targets in zip(spans(data), hits, data.targets, strict=True)])


def _asked(missed: list[int], first: int, last: int) -> list[int]:
    """The missed places that a continuation begun at one of first .. last meets first."""
    return [j for before, j in zip([first - 1, *missed], missed, strict=False) if before < last]


def _ways(model: nn.Module, data: Texts, jobs: list[tuple[int, int, int]], size: int) -> dict[tuple[int, int], list[int]]:
    """For each (text, place, tokens wanted): what greedy decoding says from there on, given the true text before it."""
    ways: dict[tuple[int, int], list[int]] = {}
    jobs = sorted(jobs, key=lambda job: job[2])
    for some in (jobs[k : k + size] for k in range(0, len(jobs), size)):
        found = generate(model, [data.tokens[k][:j] for k, j, _ in some], new=some[-1][2], eos=(), size=size)
        ways |= {(k, j): way[:wanted].tolist() for (k, j, wanted), way in zip(some, found, strict=True)}
    return ways
