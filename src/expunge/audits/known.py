"""What is known of the forget set, record by record: the probability of its label, or per token of its answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits import unseen
from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.core.registry import check
from expunge.core.stats import Z
from expunge.core.types import Split

FEW, FEW_ALONE, FEW_LABELS = 20, 10, 30
"""Requests of fewer texts (the second: where no unseen ones are at hand), or of fewer records with a label, have intervals from the spread of unseen ones;
texts are then read by whole answers."""


def few(split: Split) -> bool:
    """Whether a request is read as one of few."""
    texts = FEW if split.test is not None else FEW_ALONE
    return len(split.forget) < (texts if hasattr(split.forget, "targets") else FEW_LABELS)


def probability(nll: Tensor, data: Any, whole: bool = False) -> Tensor:
    """(N,) double exp(-loss): the probability of the label, of texts the geometric mean over the answer's tokens, or of the whole answer."""
    return (-nll.double() * (torch.tensor([int(t.sum()) for t in data.targets]) if whole and hasattr(data, "targets") else 1)).exp()


@check(tasks=("classification", "causal_lm"), needs=("forget",))
def known(p: Probe) -> list[Row]:
    """known.forget: mean probability of forget's labels (texts: per token of the answers, of whole answers for few of them); known.excess: the same
    above the mean of references, for few records with the spread of that difference over unseen records of the same form (`audits.unseen`)."""
    small = few(p.split)

    def read(model: nn.Module) -> Tensor:
        return probability(p.seen(model, "forget").nll, p.split.forget, small)

    mine = read(p.after)
    rows = [paired("known.forget", mine, f"probability of the label, of texts {'of the answer' if small else 'per token'}")]
    if p.references:
        rest = torch.stack([read(m) for m in p.references]).mean(0)
        row = paired("known.excess", mine - rest, f"above the mean of {len(p.references)} retrained models")
        rows.append(_few(p, row) if small else row)
    return rows


def _few(p: Probe, row: Row) -> Row:
    u = unseen.same_form(p)
    if u is None or len(u.data) < 2:
        return replace(row, low=-math.inf, high=math.inf, note=f"{row.note}; no unseen records of the same form to tell its spread by")

    def read(model: nn.Module) -> Tensor:
        return probability(unseen.read(p, u, model).nll, u.data, True)

    apart = read(p.after) - torch.stack([read(m) for m in p.references]).mean(0)
    half = Z * float(apart.square().mean().sqrt()) / row.n**0.5
    return replace(row, low=row.value - half, high=row.value + half, note=f"{row.note}; interval by the spread of unseen records")
