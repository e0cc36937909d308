"""What keeps old knowledge while a model learns on: distillation, a pull on the weights, replay with logits. Pure functions.

    lwf      - sum_i q_i^old ln q_i^new,   q = softmax(z / T)          (B,), on the inputs at hand: no old data
    ewc      lambda sum_i F_i (theta_i - theta*_i)^2                   one number: it looks at no example
    der      mean over classes of (f(x_m) - z_m)^2                     (B,), on remembered inputs with the logits z of that day
    derpp    alpha der(x_m) + beta CE(f(x_m'), y_m')                   (B,), on two draws from the memory

Papers   Li and Hoiem, arXiv:1606.09282 (LwF); Kirkpatrick et al., arXiv:1612.00796 (EWC); Buzzega et al., arXiv:2004.07211 (DER, DER++).
Card     continual-retention, losses 1 to 3.
Differs  EWC has no factor 1/2 and no factor p_y in F, as in most codes; the Fisher sums of `data.records.memory` offer p_y.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.core.types import Out


def lwf(out: Out, teacher: Tensor, *, temperature: float = 2.0, classes: Tensor | None = None) -> Tensor:
    """(B,) cross-entropy of the tempered student to the tempered teacher, whose logits are (B, C).

    classes   positions of the old classes, to which both are restricted; all when None

    In probabilities q' = q^(1/T) / sum q^(1/T), which is softmax(z / T). At its least it is the teacher's entropy, not 0.

    >>> student = Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[0.5, 0.5]]).log())
    >>> round(float(lwf(student, torch.tensor([[0.8, 0.2]]).log())), 6)
    0.693147
    """
    old, new = teacher.to(out.logits), out.logits
    if classes is not None:
        old, new = old[:, classes], new[:, classes]
    return -(F.softmax(old / temperature, -1) * F.log_softmax(new / temperature, -1)).sum(-1)


def ewc(params: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor], *, strength: float = 100.0) -> Tensor:
    """lambda sum_i F_i (theta_i - theta*_i)^2 over the tensors that `fisher` names: one number, for the term reads no example.

    >>> float(ewc({"w": torch.tensor([1.2])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.5])}))  # 100 * .5 * .04
    2.0000...
    """
    return strength * torch.stack([(fisher[n].to(params[n]) * (params[n] - anchor[n].to(params[n])).square()).sum() for n in fisher]).sum()


def der(out: Out, z: Tensor) -> Tensor:
    """(B,) mean over classes of (logits - z)^2; z (B, C) are the logits that were kept with the examples.

    >>> der(Out(nll=torch.zeros(1), count=torch.ones(1), logits=torch.tensor([[2.0, 1.0]])), torch.tensor([[1.0, 3.0]]))
    tensor([2.5000])
    """
    return (out.logits - z.to(out.logits)).square().mean(-1)


def derpp(out: Out, z: Tensor, again: Out, *, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """(B,) alpha der(out, z) + beta * training loss of `again`, a second draw of as many examples.

    >>> first, again = (Out(nll=torch.ones(1), count=torch.ones(1), logits=torch.tensor([[2.0, 1.0]])) for _ in range(2))
    >>> derpp(first, torch.tensor([[1.0, 3.0]]), again, alpha=0.2, beta=1.0)
    tensor([1.5000])
    """
    return alpha * der(out, z) + beta * again.mean
