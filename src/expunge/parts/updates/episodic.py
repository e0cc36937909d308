"""Steps that remember: GEM and A-GEM bend a step so that it harms no memory, refresh learning stirs the weights before a step.

    GEM      if any <g, m_k> < 0:   v = argmin over v >= margin of 1/2 v'(M M' + eps I) v + (M g)'v,   g <- g + M'v
    A-GEM    m = mean of the m_k;   if <g, m> < 0:   g <- g - (<g, m> / <m, m>) m
    refresh  u = (one step of SGD on -CE) - theta;   theta <- theta + delta / (1 + damp F) (||theta|| / ||u|| u + noise N(0, I)), tensor by tensor

g is the gradient of the first loss, m_k those of the others. Both rules need nothing but the Gramian of (g, m_1 .. m_K), as those of `combine` do:
`rule("gem")` is what `descend` takes as `combine`, for a loss that gives the tuple (new, memory 1, .. memory K). For unlearning g is the forget
gradient and m_k the gradients of kept classes: a descent on forgetting that to first order harms no kept class.

Papers   Lopez-Paz and Ranzato, arXiv:1706.08840 (GEM); Chaudhry et al., arXiv:1812.00420 (A-GEM); Wang et al., ICLR 2024, arXiv:2403.13249 (refresh).
Card     continual-retention, losses 4 and 5. A-GEM of one memory is `combine`'s rule `project` over all tensors at once.
Differs  The paper of refresh learning preconditions a Langevin ascent by F^-1; its code, followed here, takes 1 / (1 + damp F), one step, and the norm of
         each tensor. F <- (1 - tau) F + tau g^2 is the running mean that decays by tau. A tensor without gradient or of norm 0 is left alone.
Check (card)
    >>> g, m = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    >>> rule("agem")([g, m]), rule("gem")([g, m])
    ([tensor([0.5000, 0.5000])], [tensor([0.5000, 0.5000])])
    >>> refreshed(torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)) - torch.tensor([3.0, 4.0]).double()
    tensor([3.0000e-05, 4.0000e-05], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import SettingError
from expunge.core.session import Session
from expunge.parts.updates.combine import Combine, gramian, pulls

RULES = ("gem", "agem")


def quadratic(P: Tensor, q: Tensor, low: float = 0.0) -> Tensor:
    """(K,) float64: argmin over v >= low of 1/2 v'P v + q'v for P (K, K) symmetric positive definite, exact up to rounding.

    Active set (Lawson and Hanson) on u = v - low: free the coordinate along which the value falls fastest, solve for the free ones, walk towards
    the solution until one of them meets its bound. Each set of free coordinates is seen once, so it ends; K is a few dozen at most.

    >>> quadratic(torch.eye(2), torch.tensor([-1.0, 2.0])), quadratic(torch.eye(2), torch.tensor([-1.0, 2.0]), low=0.5)
    (tensor([1., 0.], dtype=torch.float64), tensor([1.0000, 0.5000], dtype=torch.float64))
    """
    P, q = P.double().cpu(), q.double().cpu()
    q = q + low * P.sum(1)
    u, free = torch.zeros_like(q), torch.zeros(len(q), dtype=torch.bool)
    tiny = 1e-12 * float(q.abs().max()) if len(q) else 0.0
    refused = free.clone()
    while True:
        falls = (-(P @ u) - q).masked_fill(free | refused, -torch.inf)
        if not len(q) or float(falls.max()) <= tiny:
            return u + low
        new = int(falls.argmax())
        free[new] = True
        s = _free(P, q, free)
        if s[new] <= 0:  # rounding alone: along this coordinate nothing is to be gained
            free[new], refused[new] = False, True
            continue
        refused[:] = False
        while bool((s[free] <= 0).any()):
            bad = free & (s <= 0)
            u = u + float((u[bad] / (u[bad] - s[bad])).min()) * (s - u)
            worst = bad & (u <= 1e-15 * float(u.abs().max()))
            free &= ~(worst if bool(worst.any()) else bad)
            u = u.masked_fill(~free, 0.0)
            s = _free(P, q, free)
        u = s


def _free(P: Tensor, q: Tensor, free: Tensor) -> Tensor:
    """The minimum over the free coordinates, all others 0."""
    s = torch.zeros_like(q)
    if bool(free.any()):
        s[free] = torch.linalg.solve(P[free][:, free], -q[free])
    return s


def gem(G: Tensor, *, margin: float = 0.5, eps: float = 1e-3) -> Tensor:
    """(K + 1,) weights of (g, m_1 .. m_K) with the Gramian G (K + 1, K + 1): (1, v), or (1, 0, .. 0) where no memory is harmed.

    margin   least v: how strongly every memory is followed once one of them is harmed
    eps      added to the diagonal of M M'

    >>> gem(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), margin=0.0)  # 1 / 2.001
    tensor([1.0000, 0.4998], dtype=torch.float64)
    """
    G = G.double().cpu()
    w = torch.zeros(len(G), dtype=torch.double)
    w[0] = 1.0
    if bool((G[0, 1:] < 0).any()):
        w[1:] = quadratic(G[1:, 1:] + eps * torch.eye(len(G) - 1, dtype=torch.double), G[1:, 0], margin)
    return w


def agem(G: Tensor) -> Tensor:
    """(K + 1,) weights for the mean of the memories' gradients.

    >>> agem(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    G, K = G.double().cpu(), len(G) - 1
    w = torch.zeros(K + 1, dtype=torch.double)
    w[0] = 1.0
    if K and (along := float(G[0, 1:].mean())) < 0:
        w[1:] = -along / float(G[1:, 1:].mean()) / K
    return w


def rule(name: str, **options: Any) -> Combine:
    """`gem` or `agem` as the `combine` of `descend`, over all tensors at once. Raises SettingError for another rule and for margin < 0 or eps <= 0."""
    if name not in RULES:
        raise SettingError(f"rule must be one of {', '.join(RULES)}, not '{name}'")
    if not options.get("margin", 0.0) >= 0 or not options.get("eps", 1.0) > 0:
        raise SettingError("gem needs margin of 0 or more and eps above 0")
    return partial(_bend, partial(gem, **options) if name == "gem" else agem)


def _bend(weights: Callable[[Tensor], Tensor], gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    w = weights(gramian(gradients)).tolist()
    out = []
    for same in zip(*gradients, strict=True):
        wide = torch.promote_types(same[0].dtype, torch.float32)
        out.append(torch.as_tensor(sum(c * t.to(wide) for c, t in zip(w, same, strict=True) if c)).to(same[0].dtype))
    return out


def refreshed(theta: Tensor, u: Tensor, fisher: Tensor, *, delta: float = 1e-5, damp: float = 1e-3, noise: Tensor | None = None) -> Tensor:
    """theta + delta / (1 + damp F) (||theta|| / ||u|| u + noise), in float64; theta as it is where u or theta is 0. All of one shape."""
    t, u = theta.detach().double(), u.double()
    if not bool(u.any()) or not bool(t.any()):
        return t
    way = t.norm() / u.norm() * u + (0.0 if noise is None else noise.double())
    return t + delta / (1 + damp * fisher.double()) * way


def refreshing(
    session: Session, loss: Callable[[Any], Tensor], *, delta: float = 1e-5, lr: float = 0.01, sigma: float = 1e-3, damp: float = 1e-3, tau: float = 1e-5,
    fisher: dict[str, Tensor] | None = None, generator: torch.Generator | None = None,
) -> Callable[[Any], None]:  # fmt: skip
    """A step that precedes a step: batch -> None. Call it at the start of the loss that `descend` minimises, before its forward pass.

    loss     batch -> one number, the training loss whose ascent is the unlearning
    delta    share of the weights' norm that one refreshment moves them by
    lr       of the unlearning step; it cancels against ||u|| and is kept for the record
    sigma    deviation of the noise, as a number beside vectors of norm ||theta||
    tau      decay of F per step; `fisher` holds F by name, is updated in place and starts at 0
    """
    if not (delta >= 0 and lr > 0 and sigma >= 0 and damp >= 0 and 0 <= tau <= 1):
        raise SettingError("refresh learning needs delta, sigma and damp of 0 or more, lr above 0 and tau in 0..1")
    F = {} if fisher is None else fisher
    params, masks = session.params, list(session.masks.values())

    def refresh(batch: Any) -> None:
        (found,) = pulls([loss(batch)], list(params.values()), masks)
        with torch.no_grad():
            for (name, p), g, mask in zip(params.items(), found, masks, strict=True):
                F[name] = (1 - tau) * F.get(name, torch.zeros_like(p)) + tau * g.square()
                noise = None if not sigma else sigma * torch.randn(p.shape, generator=generator, dtype=torch.double).to(p.device)
                moved = refreshed(p, lr * g, F[name], delta=delta, damp=damp, noise=noise).to(p.dtype)
                p.copy_(moved if mask is None else torch.where(mask, moved, p))

    return refresh
