"""Forget losses: pure functions of one forward pass, (Out, ...) -> (B,). No model, no loop, no batch reduction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.core.types import Out


def ascent(out: Out) -> Tensor:
    """-nll / count: gradient ascent on the training loss. Unbounded below. Source: card bad-teacher-scrub-negrad, NegGrad.

    >>> ascent(Out(nll=torch.tensor([2.0]), count=torch.tensor([1.0])))
    tensor([-2.])
    """
    return -out.mean


def relabel(out: Out, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) to other labels (B,). Source: cards salun, bad-teacher-scrub-negrad (random labels).

    >>> relabel(Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 0.0]])), torch.tensor([1]))
    tensor([2.1269])
    """
    return F.cross_entropy(out.logits, labels.to(out.logits.device), reduction="none")


def random_labels(labels: Tensor, classes: int, *, other: bool) -> Tensor:
    """(B,) labels drawn uniformly from the global RNG of the run; never the true one if `other`.

    >>> _ = torch.manual_seed(0)
    >>> bool((random_labels(torch.zeros(100, dtype=torch.long), 3, other=True) == 0).any())
    False
    """
    if not other:
        return torch.randint(classes, labels.shape).to(labels.device)
    return (labels + torch.randint(1, classes, labels.shape).to(labels.device)) % classes
