"""All-but-one: the guidance of the concept is replaced by that of an alternative, and the unconditional prediction is held where it was.

Paper    Hong et al., "All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models", AAAI 2024, arXiv:2312.12807.
Forgets  concept.          Needs    forget; anchor (row by row, what to draw instead) where the concept is replaced, not emptied; retain where alpha is above 0.
Scope    a part of the model (`part`).   Forget  || g(c) - g*(a) ||^2, with g(c) = e(x_t, t, c) - sg( e(x_t, t, "") ), on trajectories of the concept.
Retain   lam || e(x_t, t, "") - e*(x_t, t, "") ||^2 there, and alpha || e(x_t, t, r) - e*(x_t, t, r) ||^2 on trajectories of retained prompts.
Update   Adam.   Leaves  Replace.
Settings
    part          xattn (cross-attention), xattn-kv (its keys and values), unet, text, or a pattern
    lam           weight of the unconditional prediction's drift
    rescale       give g*(a) the length of g*(c), state by state, so that the strength of guidance stays
    latest        share of the noise time up to which states are learned: below 1, the first part of a trajectory, which sets the layout, is left as it was
    alpha         weight of the retained prompts' outputs; 0 leaves them out
    steps         updates
    batch_size    states per update (of each part)
    lr            step size of Adam
    guidance      of the trajectories
    trajectories  of the frozen model, over the concept's different prompts (and as many over retained ones); 0: one for each of these, 20 to 256
    path          states per trajectory
Differs  Only the abstract was read, and no code is known: the guided prediction u + w g, of which g alone is to change while u is held, is the paper's; the
         losses, the stop-gradient and all defaults are a reconstruction. Without an anchor the alternative is the empty prompt: g*(a) = 0.
         States and targets are the frozen model's, drawn once.
Check
    u* = (0.1, 0.2), e*(c) = (0.5, -0.2), e*(a) = (0.2, 0.6): the wanted e(c) is e*(a), and with rescale u* + (0.137199, 0.548796)
    >>> import torch
    >>> u, c, a = (torch.tensor([v]) for v in ([0.1, 0.2], [0.5, -0.2], [0.2, 0.6]))
    >>> replaced(u, c, a), replaced(u, c, a, rescale=True) - u
    (tensor([[0.2000, 0.6000]]), tensor([[0.1372, 0.5488]]))
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Split, drawn
from expunge.modalities.diffusion.trajectory import Pool, counterparts, follow, kept_times, lines, squared, under, upto
from expunge.modalities.pictures import Pictures


def replaced(null: Tensor, cond: Tensor, other: Tensor, *, rescale: bool = False) -> Tensor:
    """u* + g*(a), what e(x_t, t, c) is to become; with `rescale`, g*(a) at the length of g*(c), state by state."""
    g = other - null
    if rescale:
        ratio = (cond - null).flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1).clamp(min=1e-12)
        g = g * ratio.view(-1, *[1] * (g.ndim - 1))
    return null + g


def _cost(n, s) -> tuple[float, float]:
    size, mine = lines(n, s) * s["path"], lines(n, s) * kept_times(s)
    seen = 2 * drawn(mine, s["batch_size"], s["steps"])
    forward, backward = seen + 2 * size + (mine if "anchor" in n else 0), seen if s["lam"] else seen / 2
    if "retain" in n and s["alpha"]:
        more = drawn(size, s["batch_size"], s["steps"])
        return forward + more + 2 * size, backward + more
    return forward, backward


@method(
    paper="arXiv:2312.12807", tasks=("diffusion",), needs=("forget",), forgets=("class",), cost=_cost, toy={"steps": 60, "alpha": 1.0, "trajectories": 10},
    place="the card names no place: the abstract alone was read",
    lacks="it costs 21 points of the other styles on shapes, and its losses are a reconstruction from the abstract",
)  # fmt: skip
def all_but_one(
    model: nn.Module, task: Any, split: Split, *, part: str = "xattn", lam: float = 1.0, rescale: bool = False, latest: float = 1.0, alpha: float = 0.0,
    steps: int = 100, batch_size: int = 32, lr: float = 1e-3, guidance: float = 3.0, trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if lam < 0 or alpha < 0 or not 0 < latest <= 1:
        raise SettingError(f"lam and alpha must be 0 or larger, latest above 0 and at most 1; found {lam:g}, {alpha:g} and {latest:g}")

    def made(gone: Pictures, states: Pool) -> Pool:
        """The states up to `latest`, with what e(x_t, t, c) is to become in the place of `cond`."""
        states = upto(states, latest)
        other = states.null if split.anchor is None else under(model, task, states, counterparts(gone, split.forget, split.anchor))
        return replace(states, cond=replaced(states.null, states.cond, other, rescale=rescale))

    return follow(
        model, task, split, split.forget, lambda b, _: guided(task, model, b, lam), part=part, alpha=alpha, steps=steps, batch_size=batch_size, lr=lr,
        guidance=guidance, trajectories=trajectories, path=path, seed=seed, made=made,
    )  # fmt: skip


def guided(task: Any, model: nn.Module, batch: Batch, lam: float) -> Tensor:
    """(B,) L_guid + lam L_unc at states whose `cond` is the wanted u* + g*(a) and whose `null` is u*."""
    with torch.set_grad_enabled(lam > 0):
        u = task.forward(model, {**batch, "y": task.null.expand(len(batch["i"]), -1)}).pred
    cond, null = batch["cond"].to(u.device), batch["null"].to(u.device)
    return squared(task, model, batch, u.detach() + (cond - null)) + lam * (u - null).square().flatten(1).mean(1)
