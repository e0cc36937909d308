"""`combine`: one direction out of the gradients of K losses, by what their Gramian says of how they agree (gradient surgery).

    G_ij = <g_i, g_j>          g = sum_i w_i g_i          a rule gives w (K,) from G (K, K) alone

    sum        w_i = 1
    project    g_1 less what in it goes against the others: c = e_1; for j = 2..K, if <g, g_j> = (G c)_j < 0:   c_j <- c_j - strength (G c)_j / G_jj
    released   the same with the scale of DoCo's released code, which takes cos * g_j / ||g_j|| from g as it is: the step is divided by ||g||
    pcgrad     the sum of all g_i, each less what in it goes against the others (j = 1..K without i)

`project` follows the first loss alone: the others only bend it. With K = 2 and strength 1 the result never goes against g_2. With more, each is taken
in turn, and a later one can bring a little of an earlier one back. Source: card doco; rules on the Gramian: house of the updates.

Check (card doco)
    >>> g_u, g_r = [torch.tensor([3.0, -4.0])], [torch.tensor([0.0, 2.0])]
    >>> [[round(v, 4) for v in combine([g_u, g_r], rule)[0].tolist()] for rule in ("project", "released", "pcgrad", "sum")]
    [[3.0, 0.0], [3.0, -3.2], [3.96, 0.72], [3.0, -2.0]]
    >>> combine([[torch.tensor([3.0, 4.0])], g_r])
    [tensor([3., 4.])]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from expunge.core.errors import SettingError

RULES = ("project", "released", "pcgrad", "sum")

Combine = Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]
"""K gradients (each the list of its tensors) -> the direction that a step follows, tensor by tensor."""


def combine(
    gradients: Sequence[Sequence[Tensor]], rule: str = "project", *, strength: float = 1.0, norm: float = math.inf, whole: bool = False
) -> list[Tensor]:
    """The combined direction of K gradients, each a list of tensors over the same weights.

    strength   share of the conflict that is taken out
    norm       largest norm of each gradient over all its tensors: longer ones are shortened first
    whole      one Gramian over all tensors, in place of one for each tensor

    Raises SettingError for an unknown rule.
    """
    if rule not in RULES:
        raise SettingError(f"surgery must be one of {', '.join(RULES)}, not '{rule}'")
    each = [gramian([[t] for t in same]) for same in zip(*gradients, strict=True)]
    total = torch.stack(each).sum(0)
    scale = (norm / total.diagonal().sqrt()).clamp(max=1.0)
    out = []
    for same, own in zip(zip(*gradients, strict=True), each, strict=True):
        w = scale * weights((total if whole else own) * scale[:, None] * scale, rule, strength)
        value = sum(c * t.to(torch.promote_types(t.dtype, torch.float32)) for c, t in zip(w.tolist(), same, strict=True))
        out.append(torch.as_tensor(value).to(same[0].dtype))
    return out


def rule(name: str, **options) -> Combine:
    """`combine` with its rule and options set: what `descend` takes. Raises SettingError for an unknown rule, before anything runs."""
    combine([[torch.zeros(1)]], name, **options)
    return partial(combine, rule=name, **options)


def gramian(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """(K, K) inner products of K gradients over all their tensors, in float64.

    >>> gramian([[torch.tensor([3.0, -4.0])], [torch.tensor([0.0, 2.0])]]).tolist()
    [[25.0, -8.0], [-8.0, 4.0]]
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.double)
    for same in zip(*gradients, strict=True):
        rows = torch.stack([t.detach().flatten().double() for t in same])
        total += (rows @ rows.T).cpu()
    return total


def weights(G: Tensor, rule: str = "project", strength: float = 1.0) -> Tensor:
    """(K,) float64 weights of the gradients whose Gramian is G (K, K).

    >>> weights(torch.tensor([[25.0, -8.0], [-8.0, 4.0]])).tolist()
    [1.0, 2.0]
    """
    G = G.double()
    if rule == "sum":
        return torch.ones(len(G), dtype=torch.double)
    return torch.stack([_bent(G, i, rule, strength) for i in (range(len(G)) if rule == "pcgrad" else [0])]).sum(0)


def _bent(G: Tensor, i: int, rule: str, strength: float) -> Tensor:
    """Coefficients of g_i after what goes against the others is taken out of it."""
    c = torch.zeros(len(G), dtype=torch.double)
    c[i] = 1.0
    for j in range(len(G)):
        along = G[j] @ c
        if j != i and along < 0 < G[j, j]:
            length = (c @ G @ c).sqrt() if rule == "released" else 1.0
            c[j] -= strength * along / (G[j, j] * length)
    return c


def pulls(losses: Sequence[Tensor], params: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[list[Tensor]]:
    """The gradient of each loss over `params`, zero where nothing arrives and where a mask is False. No .grad is touched, of these weights or any other.

    >>> w = torch.tensor([3.0, 1.0], requires_grad=True)
    >>> pulls([w.square().sum(), w[0]], [w])
    [[tensor([6., 2.])], [tensor([1., 0.])]]
    """
    walls, out = masks or [None] * len(params), []
    for k, loss in enumerate(losses):
        found = torch.autograd.grad(loss, list(params), retain_graph=k + 1 < len(losses), allow_unused=True) if loss.requires_grad else [None] * len(params)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        out.append([g if mask is None else g.masked_fill(~mask, 0) for g, mask in zip(whole, walls, strict=True)])
    return out
