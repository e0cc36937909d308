"""References are checked before they are believed: models that are said to never have seen the forget set.

A reference is refused, with the reason, when it
  is of another architecture (names, shapes or types of its weights), or holds weights or gives answers that are not finite;
  has the weights of the original, of the candidate or of another reference (each counts once);
  resembles one of these as a copy with noise or a fine-tune does (`kinship` of at least KIN), unless its record (`parts.provenance`) says that it was trained
  from newly drawn weights, or from a base that is none of these;
  knows the forget set: recalls a removed class, or has `knowledge` of the records, surely more than none and more than half of the original's.

    kinship(a, b) = mean over weight matrices W of |cos(W_a, W_b)|            independent trainings: near 0; fine-tunes and noisy copies: near 1
    knowledge     = recall of the removed class on forget                      for a class
                  = (a - e) / (a_retain - e) for records with labels, a the accuracy on forget and e what a model that never saw them would have:
                    e = a_unseen min(1, g / t), with g and t the accuracy of 5 nearest kept inputs on forget and on unseen records (wrong labels: g is low)
                  = (unseen - forget) / (unseen - retain), mean losses, for the others: 1 as what it was trained on, 0 as unseen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe
from expunge.core.digest import model_digest
from expunge.core.errors import ModelError
from expunge.core.stats import bootstrap, matched, wilson
from expunge.core.types import measured, vectors
from expunge.engine.sound import ALL, broken
from expunge.parts.provenance import Reference

KIN = 0.9
"""Kinship from which a model counts as a descendant. Measured: independent trainings of digits at most 0.03, trainings from one start
(`authors`) 0.60, fine-tunes of either above 0.99. Fine-tunes of one large base all lie above it: such references need a record."""

RECALLS, KNOWS = 0.02, 0.5
"""Recall of a removed class (at the lower end of its interval), and share of the original's knowledge of records, above which a model has seen them."""

NEAR, SOME = 5000, 500
"""Most kept records among which nearest ones are looked for, and most records that are looked up."""


@dataclass(frozen=True)
class Refusal:
    """A reference that is not believed, and why."""

    name: str
    why: str


def listed(references: Sequence[Any]) -> list[Reference]:
    """References as records, named by their number where they have no name."""
    made = [r if isinstance(r, Reference) else Reference(r) for r in references]
    return [r if r.name else Reference(r.model, f"reference {k}", r.record) for k, r in enumerate(made, 1)]


def believed(p: Probe, references: Sequence[Any]) -> tuple[list[Reference], list[Refusal]]:
    """(those that count, those that do not and why). `p.before` is the original, `p.after` the candidate (the original again where there is none yet)."""
    kept: list[Reference] = []
    refused: list[Refusal] = []
    others = [("the original", p.before), *([] if p.after is p.before else [("the candidate", p.after)])]
    for r in listed(references):
        if not isinstance(r.model, nn.Module):
            raise ModelError(f"{r.name} is {type(r.model).__name__}, no torch module: load it first")
        why = _odd(p.before, r.model) or _unread(p, r.model) or _resembles(r, [*others, *((k.name, k.model) for k in kept)], len(others)) or _known(p, r.model)
        if why:
            refused.append(Refusal(r.name, why))
        else:
            kept.append(r)
    return kept, refused


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _odd(original: nn.Module, model: nn.Module) -> str:
    mine, theirs = _tensors(original), _tensors(model)
    if mine.keys() != theirs.keys():
        return f"another architecture: {min(mine.keys() ^ theirs.keys())} is not in both"
    for name, t in theirs.items():
        if t.shape != mine[name].shape:
            return f"another architecture: {name} is {tuple(t.shape)}, the original's {tuple(mine[name].shape)}"
    return ""


def _unread(p: Probe, model: nn.Module) -> str:
    why = broken(model, p.task, p.split, ALL)
    return f"it {why}" if why else ""


def _resembles(r: Reference, others: Sequence[tuple[str, nn.Module]], models: int) -> str:
    digest = model_digest(r.model)
    for name, other in others:
        if model_digest(other) == digest:
            return f"it has the weights of {name}"
    if r.record is not None and (not r.record.base or r.record.base not in [model_digest(m) for _, m in others]):
        return ""  # its record says where it comes from
    for number, (name, other) in enumerate(others):
        if (near := kinship(r.model, other)) >= KIN:
            hint = "" if number >= models else "; `expunge retrain` makes references with a record that says how they came about"
            return (
                f"its weights resemble those of {name} (kinship {near:.2f}; independent trainings read below {KIN:g}), as a copy or fine-tune of it does{hint}"
            )
    return ""


def kinship(a: nn.Module, b: nn.Module) -> float:
    """Mean over weight matrices (two dimensions or more, of the same name) of |cos(W_a, W_b)|, each weighted by its size; 0 without matrices.

    >>> one, two = nn.Linear(100, 100), nn.Linear(100, 100)
    >>> kinship(one, one) > 0.999, kinship(one, two) < 0.1
    (True, True)
    """
    theirs, total, size = dict(b.named_parameters()), 0.0, 0
    for name, w in a.named_parameters():
        if w.ndim >= 2 and name in theirs and theirs[name].shape == w.shape:
            x, y = w.detach().flatten().double(), theirs[name].detach().flatten().double()
            norm = float(x.norm() * y.norm())
            total += len(x) * (abs(float(x @ y)) / norm if norm else 0.0)
            size += len(x)
    return total / size if size else 0.0


def _known(p: Probe, model: nn.Module) -> str:
    kind, value, low = knowledge(p, model)
    if kind == "class":
        return f"it recalls the removed class on {value:.0%} of forget; a model that never saw it on none" if low > RECALLS else ""
    mine = knowledge(p, p.before)[1]
    if low > 0 and value > KNOWS * mine:
        return f"it knows the forget records: {value:.2f} (at least {low:.2f}) of what it knows of its own, the original {mine:.2f}"
    return ""


def knowledge(p: Probe, model: nn.Module) -> tuple[str, float, float]:
    """("class" or "records", knowledge, its one-sided 95 % lower bound); 0 where there is no retain or unseen part, or the model knows retain no better."""
    forget = p.seen(model, "forget")
    if p.removed():
        value, low, _ = wilson(int(forget.correct.sum()), len(forget.nll))
        return "class", value, low
    if p.split.test is None or p.split.retain is None:
        return "records", 0.0, 0.0
    unseen, retain = p.seen(model, "test"), p.seen(model, "retain")
    n = len(forget.nll)
    if forget.labels is not None:
        rows, _ = matched(forget.labels, unseen.labels, p.seed)
        if not len(rows):
            return "records", 0.0, 0.0
        expected = float(unseen.correct[rows].float().mean()) * _looks(p, rows)
        top = max(float(retain.correct.float().mean()) - expected, 1e-9)
        value, low, _ = wilson(int(forget.correct.sum()), n)
        return "records", (value - expected) / top, (low - expected) / top
    apart = float(unseen.nll.mean() - retain.nll.mean())
    if apart <= 0:
        return "records", 0.0, 0.0

    def share(i: Tensor) -> float:
        return float(unseen.nll.mean() - forget.nll[i].mean()) / apart

    return "records", share(torch.arange(n)), bootstrap(share, n, p.seed)[0]


def _looks(p: Probe, rows: Tensor) -> float:
    """min(1, g / t): how well the labels of forget follow from their inputs, against those of the unseen `rows`; 1 where inputs have names (texts)."""
    parts = [p.split.retain, p.split.forget, p.split.test.take(rows)]
    if not all(measured(part.x) for part in parts):
        return 1.0

    def flat(part: Any, most: int) -> tuple[Tensor, Tensor]:
        some, x = vectors(part, most)
        return x, some.y

    def agree() -> float:
        (x, y), *asked = flat(parts[0], NEAR), flat(parts[1], SOME), flat(parts[2], SOME)
        hits = []
        for q, label in asked:
            near = torch.cdist(q, x).topk(min(5, len(x)), largest=False).indices
            hits.append(float((y[near].mode(1).values == label).float().mean()))
        return min(1.0, hits[0] / max(hits[1], 1e-9))

    return p.once(("looks", p.seed), p.before, agree)
