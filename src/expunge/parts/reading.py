"""Reading a model over data, in eval mode and without augmentation: losses and answers, features, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.guard import quiet
from expunge.core.types import Out, Task


@dataclass(frozen=True)
class Scores:
    """What one model says about one part: everything that checks read, computed in one pass. Tensors are float32 on CPU."""

    nll: Tensor
    """(N,) training loss per unit."""
    logits: Any
    """(N, C) for classifiers; None for texts, whose tokens `audits.language.tokens` reads."""
    labels: Any
    """(N,)"""
    pred: Any
    """(N, ...) for regressors."""
    target: Any

    @property
    def correct(self) -> Tensor:
        """(N,) bool: argmax equals label."""
        return self.logits.argmax(-1) == self.labels

    @property
    def margin(self) -> Tensor:
        """(N,) what KLOM compares. Classifiers: phi = log p_y - log sum_{j != y} p_j; regressors: the first prediction itself; texts: log(p / (1 - p))
        of the probability per target token.

        p = (.9, .1), y = 0: phi = 2.1972 (card audits-classification).
        """
        if self.logits is not None:
            return margin(self.logits, self.labels)
        return torch.special.logit((-self.nll).exp(), eps=1e-6) if self.pred is None else self.pred.reshape(len(self.pred), -1)[:, 0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) phi = log p_y - log sum_{j != y} p_j of logits (N, C): the log-odds of the true label.

    >>> round(float(margin(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]))), 4)
    2.1972
    """
    mine = logits.gather(1, labels[:, None]).squeeze(1)
    rest = logits.masked_fill(torch.nn.functional.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return mine - rest.logsumexp(1)


def score(model: nn.Module, task: Task, data: Sequence, size: int = 500) -> Scores:
    """One pass in eval mode without augmentation; neither the model nor its modes change."""
    outs: list[Out] = []
    size = min(size, getattr(data, "at_once", size))
    with guard.quiet(model):
        batches = task.batches(data, size)
        for k in range(len(batches)):
            out = task.forward(model, batches[k])
            outs.append(out if out.units is None else replace(out, logits=None, labels=None, units=None))

    def joined(name: str) -> Tensor | None:
        values = [getattr(o, name) for o in outs]
        return None if values[0] is None else torch.cat([v.detach().cpu() for v in values])

    pick = {name: joined(name) for name in ("logits", "labels", "pred", "target")}
    pick = {n: v.float() if v is not None and v.is_floating_point() else v for n, v in pick.items()}
    return Scores(nll=torch.cat([o.mean.detach().cpu().float() for o in outs]), **pick)


def features(model: nn.Module, task: Task, data, layer: str = "", size: int = 256) -> Tensor:
    """(N, D) features of all of `data` in eval mode, without augmentation: the inputs of the last linear layer when `layer` is ""."""
    batches = task.batches(data, size)
    with quiet(model):
        return torch.cat([task.features(model, batches[k], layer).detach() for k in range(len(batches))])


def outputs(model: nn.Module, task: Task, data) -> Tensor:
    """(N, C) logits or (N, ...) predictions of `model` in eval mode, without augmentation: the constant targets of distillation."""
    batches = task.batches(data, 256)
    with quiet(model):
        outs = [task.forward(model, batches[k]) for k in range(len(batches))]
    return torch.cat([o.pred if o.logits is None else o.logits for o in outs])
