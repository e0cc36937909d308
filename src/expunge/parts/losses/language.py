"""Losses on answer tokens: pure functions (Out, ...) -> (B,). Out's labels are aligned with its logits; IGNORE marks what does not count.

S = sum of the token losses l_t = -log p_t, |y| = number of target tokens, p_t = p(y_t | what stands before it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.core.errors import SettingError
from expunge.core.types import IGNORE, Batch, Out

REDUCTIONS = ("sum", "mean")


def kept(out: Out) -> Tensor:
    """(B, T) bool: the tokens that count."""
    return out.labels != IGNORE


def probability(out: Out) -> Tensor:
    """(B, T) p_t of each target token, with gradient; 1 where a token does not count."""
    return (-out.units).exp()


def per_sequence(values: Tensor, out: Out, reduction: str = "mean") -> Tensor:
    """(B, T) values of tokens, already 0 where a token does not count -> (B,) their sum, or their mean over the tokens that count.

    >>> out = Out(torch.zeros(1), torch.tensor([2.0]))
    >>> per_sequence(torch.tensor([[1.0, 3.0, 0.0]]), out)
    tensor([2.])
    """
    if reduction not in REDUCTIONS:
        raise SettingError(f"reduction must be one of {', '.join(REDUCTIONS)}, not '{reduction}'")
    total = values.sum(1)
    return total if reduction == "sum" else total / out.count


def pooled(values: Tensor, out: Out, batch: Batch | None = None) -> Tensor:
    """One number: the mean over all target tokens of the step of values (B,) that are sums over each sequence's tokens.

    batch   holds `tokens`, the step's target tokens per part, when a step has several parts; else the batch counts its own
    """
    return values.sum() / (batch["tokens"] if batch is not None and "tokens" in batch else out.count.sum())


def npo(out: Out, reference: Tensor, *, beta: float, reduction: str = "sum") -> Tensor:
    """-(2 / beta) log sigmoid( beta (S - S_ref) ), (B,). Source: card npo, step 2; reduction "mean" has S / |y| in place of S on both sides.

    >>> out = Out(nll=torch.tensor([3.0]), count=torch.tensor([4.0]))
    >>> npo(out, torch.tensor([3.0]), beta=0.1), npo(out, torch.tensor([1.0]), beta=0.1)
    (tensor([13.8629]), tensor([11.9628]))
    """
    if reduction not in REDUCTIONS:
        raise SettingError(f"reduction must be one of {', '.join(REDUCTIONS)}, not '{reduction}'")
    ratio = out.nll - reference.to(out.nll)
    return -(2 / beta) * F.logsigmoid(beta * (ratio if reduction == "sum" else ratio / out.count))


def simnpo(out: Out, *, beta: float, delta: float = 0.0) -> Tensor:
    """-(2 / beta) log sigmoid( beta (S / |y| - delta) ), (B,). Source: card simnpo, step 2; delta is the paper's gamma.

    >>> simnpo(Out(nll=torch.tensor([3.0]), count=torch.tensor([4.0])), beta=2.5)
    tensor([0.1141])
    """
    return -(2 / beta) * F.logsigmoid(beta * (out.mean - delta))


def dpo(win: Out, lose: Out, win_reference: Tensor, lose_reference: Tensor, *, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid( beta ((S_w^ref - S_w) - (S_l^ref - S_l)) ), (B,). Source: card llm-graddiff-kl-dpo-idk, loss 5.

    >>> one = torch.ones(1)
    >>> dpo(Out(one, one), Out(one * 4, one), one * 2, one * 2, beta=0.1)
    tensor([11.0871])
    """
    ratio = (win_reference.to(win.nll) - win.nll) - (lose_reference.to(lose.nll) - lose.nll)
    return -(2 / beta) * F.logsigmoid(beta * ratio)


def token_kl(out: Out, teacher: Tensor) -> Tensor:
    """(B,) mean over the target tokens of KL( teacher || model ), for teacher log-probabilities (B, T, V).

    >>> out = Out(torch.zeros(1), torch.ones(1), torch.tensor([[[2.0, 0.0]]]), torch.tensor([[0]]))
    >>> token_kl(out, torch.tensor([[[0.8, 0.2]]]).log())
    tensor([0.0265])
    """
    mine = F.log_softmax(out.logits, -1)
    each = (teacher.exp() * (teacher - mine)).sum(-1)
    return per_sequence(each.masked_fill(~kept(out), 0.0), out)


def top_kl(out: Out, index: Tensor, logp: Tensor) -> Tensor:
    """(B,) the same when the teacher's k largest log-probabilities (B, T, k) at tokens index (B, T, k) are kept: the rest of the vocabulary is one bin.

    It never exceeds the KL over the whole vocabulary, and equals it for k = V - 1 or more.
    """
    mine = F.log_softmax(out.logits, -1).gather(-1, index)
    each = (logp.exp() * (logp - mine)).sum(-1)
    if index.shape[-1] < out.logits.shape[-1]:
        rest, other = ((1 - x.exp().sum(-1)).clamp(min=1e-9) for x in (logp, mine))
        each = each + rest * (rest / other).log()
    return per_sequence(each.masked_fill(~kept(out), 0.0), out)


def soft_target(out: Out, target: Tensor, reduction: str = "mean") -> Tensor:
    """(B,) cross-entropy - sum_v target_v log p_v over the target tokens, for target probabilities (B, T, V) without gradient."""
    each = -(target * F.log_softmax(out.logits, -1)).sum(-1)
    return per_sequence(each.masked_fill(~kept(out), 0.0), out, reduction)


def place(values: list[Tensor] | tuple[Tensor, ...], batch: Batch, out: Out, fill: Any = 0) -> Tensor:
    """(B, T, ...) per-token values of the batch's rows, kept as one (T_i, ...) tensor per row of the data, where Out has its target tokens."""
    rows = torch.cat([values[k] for k in batch["i"].tolist()]).to(out.labels.device)
    whole = rows.new_full((*out.labels.shape, *rows.shape[1:]), fill)
    whole[kept(out)] = rows
    return whole
