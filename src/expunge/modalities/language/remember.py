"""The reference cache: what a method needs of the model as it was, computed once and kept as numbers, so that no second model lives in memory.

    S_ref (N,)                    one number per sequence              sequence_nll        NPO, DPO
    log p_ref(y_t), ragged        one number per target token          token_logp          TNPO
    the k largest log p_ref       k numbers per target token           top_logits          KL, UNDIAL, JensUn
    hidden states                 (T_i, D) per sequence                hidden_states       RMU
    the same weights, LoRA off    nothing                              scopes.lora.off     KL under LoRA

Values are kept by digest (weights, data, what) for as long as the guard of the run lives, and beside its checkpoints if it has a journal, so that
a resumed run does not compute them again. They go with the run. Exact as long as dropout is off, which it is in every language method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.types import Batch, Out, Task
from expunge.modalities.language.task import buckets, hidden
from expunge.modalities.language.texts import Texts
from expunge.parts.losses.language import kept, place
from expunge.parts.remember import recall


def passes(model: nn.Module, task: Task, data: Texts, size: int, rows: Tensor | None = None):
    """(positions, batch, Out) of every example (or of the `rows`), like lengths together, in eval mode without gradients."""
    chosen = torch.arange(len(data)) if rows is None else rows
    with guard.quiet(model):
        for part in buckets([len(data.tokens[k]) for k in chosen.tolist()], size):
            batch = task.collate(data, chosen[part], None)
            yield chosen[part], batch, task.forward(model, batch)


def sequence_nll(model: nn.Module, task: Task, data: Texts, size: int = 16) -> Tensor:
    """(N,) S_ref: the sum of each sequence's target-token losses."""

    def make() -> dict[str, Tensor]:
        found = torch.zeros(len(data), dtype=torch.float32)
        for rows, _, out in passes(model, task, data, size):
            found[rows] = out.nll.float().cpu()
        return {"nll": found}

    return recall("sequence_nll", model, data, make)["nll"]


def per_token(
    what: str, model: nn.Module, task: Task, data: Texts,
    pick: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]], rows: Tensor | None = None, size: int = 16,
) -> dict[str, tuple[Tensor, ...]]:  # fmt: skip
    """Name -> N tensors (T_i, ...): what `pick` makes of an example's target tokens, from logits (T_i, V), labels (T_i,) and
    losses (T_i,), kept under `what`. Examples that are not among `rows` have empty ones."""
    chosen = torch.arange(len(data)) if rows is None else rows
    counts = torch.zeros(len(data), dtype=torch.long)
    counts[chosen] = torch.tensor([int(data.targets[j][1:].sum()) for j in chosen.tolist()])

    def make() -> dict[str, Tensor]:
        found: dict[int, dict[str, Tensor]] = {}
        for positions, _, out in passes(model, task, data, size, chosen):
            for r, j in enumerate(positions.tolist()):
                mask = kept(out)[r]
                found[j] = pick(out.logits[r][mask], out.labels[r][mask], out.units[r][mask])
        each = [found[j] for j in sorted(found)]
        return {name: torch.cat([values[name].cpu() for values in each]) for name in each[0]}

    return {name: values.split(counts.tolist()) for name, values in recall(f"{what}/{_which(rows)}", model, data, make).items()}


def _which(rows: Tensor | None) -> str:
    return "all" if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


def token_logp(model: nn.Module, task: Task, data: Texts, size: int = 16) -> tuple[Tensor, ...]:
    """N vectors (T_i,): log p_ref of each target token."""
    return per_token("token_logp", model, task, data, lambda logits, labels, units: {"logp": -units.float()}, size=size)["logp"]


@dataclass(frozen=True)
class Top:
    """The k largest log-probabilities of each target token: per example index (T_i, k) and logp (T_i, k); rows that were not asked for are empty."""

    index: Sequence[Tensor]
    logp: Sequence[Tensor]

    def at(self, batch: Batch, out: Out) -> tuple[Tensor, Tensor]:
        """(B, T, k) tokens and log-probabilities where Out has its target tokens."""
        return place(list(self.index), batch, out).long(), place(list(self.logp), batch, out)


def top_logits(model: nn.Module, task: Task, data: Texts, k: int, rows: Tensor | None = None, size: int = 16) -> Top:
    """Log-probabilities of the k likeliest tokens (all of the vocabulary for k = 0) at each target token of the examples `rows`."""

    def best(logits: Tensor, labels: Tensor, units: Tensor) -> dict[str, Tensor]:
        width = logits.shape[-1]
        top = F.log_softmax(logits.float(), -1).topk(min(k or width, width), -1)
        return {"index": top.indices.int(), "logp": top.values}

    found = per_token(f"top_logits/{k}", model, task, data, best, rows, size)
    return Top(found["index"], found["logp"])


def hidden_states(model: nn.Module, task: Task, data: Texts, layer: str, rows: Tensor | None = None, size: int = 16) -> list[Tensor]:
    """N tensors (T_i, D): output of the named module at every token of the examples `rows`; the others are empty."""
    chosen = torch.arange(len(data)) if rows is None else rows
    counts = torch.zeros(len(data), dtype=torch.long)
    counts[chosen] = torch.tensor([len(data.tokens[j]) for j in chosen.tolist()])

    def make() -> dict[str, Tensor]:
        states: list[Any] = [None] * len(data)
        with guard.quiet(model):
            for part in buckets([len(data.tokens[j]) for j in chosen.tolist()], size):
                batch = task.collate(data, chosen[part], None)
                guard.current().meter.add(forward=len(part))
                found = hidden(model, batch, layer).cpu()
                for r, j in enumerate(chosen[part].tolist()):
                    states[j] = found[r, : len(data.tokens[j])]
        return {"states": torch.cat([s for s in states if s is not None])}

    return list(recall(f"hidden/{layer}/{_which(rows)}", model, data, make)["states"].split(counts.tolist()))
