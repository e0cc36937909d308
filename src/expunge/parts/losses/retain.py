"""Retain losses and distillation: pure functions, (Out, ...) -> (B,)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from expunge.core.types import Out


def nll(out: Out) -> Tensor:
    """Training loss per unit.

    >>> import torch
    >>> nll(Out(nll=torch.tensor([4.0]), count=torch.tensor([2.0])))
    tensor([2.])
    """
    return out.mean


def kl(out: Out, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL( softmax(teacher / T) || softmax(logits / T) ), (B,). Source: card bad-teacher-scrub-negrad, step 5.

    `teacher` are logits (B, C). The gradient with respect to the student's logits at T = 1 is p_student - p_teacher.

    >>> import torch
    >>> student = Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 0.0]]))
    >>> kl(student, torch.zeros(1, 2), temperature=4.0), kl(student, torch.zeros(1, 2))
    (tensor([0.4949]), tensor([0.4338]))
    """
    return temperature**2 * kl_to(out, F.softmax(teacher.to(out.logits) / temperature, -1), temperature=temperature)


def kl_to(out: Out, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL( target || softmax(logits / T) ) for target probabilities (B, C), without the T^2 factor, (B,).

    >>> import torch
    >>> student = Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 0.0]]))
    >>> kl_to(student, torch.tensor([[0.5, 0.5]]))
    tensor([0.4338])
    """
    student = F.log_softmax(out.logits / temperature, -1)
    return F.kl_div(student, target.to(student), reduction="none").sum(-1)
