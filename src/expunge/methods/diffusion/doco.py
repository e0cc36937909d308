"""DoCo: what is drawn for the concept must look to a discriminator like what is drawn for the anchor, by steps that do not go against the retained prompts.

Paper    Wu et al., "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient", AAAI 2025.
Code     yongliang-wu/DoCo, no licence file (read only).
Forgets  concept.          Needs    forget, anchor (row by row, what to draw instead), retain.
Scope    a part of the model (`part`).   Leaves  Replace.
Forget   L_G = BCE( D(x0(p)), 0 ), p = e(x_t, t, c*) on trajectories of the anchor's prompts c, x0(v) the image that a prediction v stands for.
         D is a patch discriminator that learns at every step, from L_D = BCE( D(x0(a)), 0 ) + BCE( D(sg x0(p)), 1 ), a = e*(x_t, t, c).
Retain   L_P = || e(x_t, t, r) - e*(x_t, t, r) ||^2 on trajectories of retained prompts, which only bends the gradient of L_G (see `combine`):
         g_u <- g_u - strength min(0, <g_u, g_r>) / ||g_r||^2 g_r, weight tensor by weight tensor, both shortened to norm 1 before.
Update   AdamW on the bent g_u, Adam (0.5, 0.999) on D, by turns; D alone in the warm-up.
Settings
    part           xattn-kv (keys and values of cross-attention), xattn, unet, text, or a pattern
    surgery        project (bend g_u alone), released (with the released code's scale), pcgrad (bend both and add them) or sum (L_G + alpha L_P, none)
    strength       share of the conflict that is taken out
    alpha          weight of L_P where it is added (pcgrad, sum)
    prior          outputs (L_P as above) or images (the training loss on retained images, as published)
    warmup         share of all steps in which D learns alone
    steps          updates, the warm-up among them
    batch_size     states per update (of each part)
    lr             step size of AdamW
    weight_decay   of AdamW
    critic_lr      step size of D
    width          channels of D's first layer
    latest         share of the noise time up to which states are used: x0 of later ones says little
    guidance       of the trajectories
    trajectories   of the frozen model, over the anchor's different prompts (and as many over retained ones); 0: one for each of these, 20 to 256
    path           states per trajectory
Differs  The released code bends g_u by cos * g_r / ||g_r||, which is right for ||g_u|| = 1 alone (`surgery=released`), and its D also steps on the gradient
         that L_G leaves in it, which nearly cancels what it should learn; here no step of one sees the other's gradient. There D has batch norm and no
         time; here group norm, which does not mix prompts, and the time as an input. Noised pictures of the anchor are replaced by its trajectories. The
         published step sizes (4.8e-5 for 1,000 steps) are for a large model. D's weights and moments are part of every checkpoint.
Check
    Card: cos = -0.8, exact and released; ln 2 for either label at logit 0; x0 = (1 - 0.6 * 0.6) / 0.8
    >>> import torch; from expunge.modalities.diffusion.task import Schedule; from expunge.parts.updates.combine import combine
    >>> u, r = [torch.tensor([3.0, -4.0])], [torch.tensor([0.0, 2.0])]
    >>> combine([u, r])[0].tolist(), [round(v, 4) for v in combine([u, r], "released")[0].tolist()]
    ([3.0, 0.0], [3.0, -3.2])
    >>> [round(float(called(torch.zeros(4), label)), 6) for label in (0, 1)]
    [0.693147, 0.693147]
    >>> x0, _ = Schedule("epsilon", abar=torch.full((1000,), 0.64)).parted(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.6), torch.tensor([10.0]))
    >>> round(float(x0), 6)
    0.8
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit, remembering
from expunge.core.types import Batch, Paired, Split, device_of, drawn
from expunge.modalities.diffusion.trajectory import counterparts, kept_times, lines, pool, squared, upto, worked
from expunge.parts.scopes import attention
from expunge.parts.updates.combine import rule
from expunge.parts.updates.descend import descend

PRIORS = ("outputs", "images")


class Critic(nn.Module):
    """Patch discriminator: images (B, C, H, W) at times t (B,) in 0..1000 -> logits (B, 1, h, w), above 0 where it sees the concept.

    4x4 convolutions of stride 2 with group norm and leaky ReLU, as many as leave 2 pixels (at most 4), then one 3x3 convolution to a logit.
    """

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        levels = max(1, min(4, int(math.log2(max(2, side))) - 1))
        sizes = [width * 2**k for k in range(levels)]
        self.first = nn.Conv2d(channels, width, 4, 2, 1)
        self.time = nn.Linear(4, width)
        self.rest = nn.Sequential(*[
            layer for a, b in itertools.pairwise(sizes) for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(math.gcd(8, b), b), nn.LeakyReLU(0.2))
        ])  # fmt: skip
        self.last = nn.Conv2d(sizes[-1], 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, 1, h, w)."""
        angle = t.float()[:, None] / 1000 * math.pi
        when = self.time(torch.cat([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], 1))
        return self.last(self.rest(F.leaky_relu(self.first(x) + when[:, :, None, None], 0.2)))


def called(logits: Tensor, label: float) -> Tensor:
    """Mean BCE of logits when all of them should say `label`: 0 the anchor's domain, 1 the concept's."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def stepper_of(critic: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam (0.5, 0.999) whose moments are there from the start, so that a checkpoint can hold them."""
    found = torch.optim.Adam(critic.parameters(), lr, betas=(0.5, 0.999))
    for p in critic.parameters():
        found.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return found


def taught(critic: nn.Module, stepper: torch.optim.Optimizer, anchor: Tensor, concept: Tensor, t: Tensor) -> Tensor:
    """One step of D on L_D alone: gradients that others left in it are dropped before, its own after. Returns L_D."""
    stepper.zero_grad()
    loss = called(critic(anchor, t), 0.0) + called(critic(concept.detach(), t), 1.0)
    loss.backward()
    stepper.step()
    stepper.zero_grad()
    return loss.detach()


def hidden(critic: nn.Module, stepper: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that D is between two steps: its weights and its moments."""
    state = {f"expunge_critic_{k}": p.detach() for k, p in enumerate(critic.parameters())}
    return state | {f"expunge_critic_{k}_{n}": v for k, p in enumerate(critic.parameters()) for n, v in stepper.state[p].items()}


def _cost(n, s) -> tuple[float, float]:
    many, b = lines(n, s, "anchor"), s["batch_size"]
    size, mine = many * s["path"], many * kept_times(s)
    alone = int(s["warmup"] * s["steps"])
    states, rest = size if s["prior"] == "outputs" else n["retain"], (drawn(mine, b, s["steps"]), drawn(mine, b, alone))
    more = drawn(states, b, s["steps"]) - drawn(states, b, alone)
    return rest[0] + more + 2 * size * (2 if s["prior"] == "outputs" else 1), rest[0] - rest[1] + more


@method(
    paper="AAAI 2025", tasks=("diffusion",), needs=("forget", "anchor", "retain"), forgets=("class",), cost=_cost,
    toy={"steps": 120, "trajectories": 10},
    published={"prior": "images", "warmup": 0.5, "steps": 2000, "batch_size": 8, "lr": 4.8e-05, "width": 64},
    place="code: README and DoCo/gan.py, styles, one process",
    stable=True,
)  # fmt: skip
def doco(
    model: nn.Module, task: Any, split: Split, *, part: str = "xattn-kv", surgery: str = "project", strength: float = 1.0, alpha: float = 0.1,
    prior: str = "outputs", warmup: float = 0.25, steps: int = 300, batch_size: int = 32, lr: float = 1e-3, weight_decay: float = 0.01,
    critic_lr: float = 5e-4, width: int = 32, latest: float = 1.0, guidance: float = 3.0, trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if prior not in PRIORS or not 0 <= warmup < 1 or not 0 < latest <= 1 or width < 1:
        raise SettingError(
            f"prior must be one of {', '.join(PRIORS)}, warmup in [0, 1), latest above 0 and at most 1, width at least 1; "
            f"found {prior}, {warmup:g}, {latest:g} and {width}"
        )
    if prior == "images" and split.retain.x is None:
        raise SettingError("prior=images needs retained records with images: these are prompts alone")
    surgeon, scope, alone = rule(surgery, strength=strength, norm=1.0), attention.part(model, part), int(warmup * steps)
    instead, states = pool(model, task, split.anchor, trajectories, guidance=guidance, steps=path, seed=seed)
    states = upto(states, latest)
    tokens = counterparts(instead, split.anchor, split.forget)
    task.collate(split.forget, torch.arange(len(split.forget)), None)  # the run's meter counts whose prompts these are
    worked(split.forget, tokens, len(instead))
    if prior == "outputs":
        kept, others = pool(model, task, split.retain, len(instead), guidance=guidance, steps=path, seed=seed + 1)
        retained = others.batches(kept, batch_size, steps, seed + 1)
    else:
        retained = task.batches(split.retain, batch_size, epochs=steps / -(-len(split.retain) // batch_size), seed=seed + 1)
    critic = Critic(states.xt.shape[1], min(states.xt.shape[2:]), width).to(device_of(model))
    stepper = stepper_of(critic, critic_lr)

    def loss(given: tuple[Batch, Batch, int]) -> tuple[Tensor, ...]:
        b, r, k = given
        xt, t, a = (b[n].to(device_of(model)) for n in ("xt", "t", "cond"))
        with torch.set_grad_enabled(k >= alone):
            p = task.forward(model, {**b, "y": tokens[b["i"]]}).pred
        fake = task.schedule.parted(xt, p, t)[0]
        value = taught(critic, stepper, task.schedule.parted(xt, a, t)[0], fake, t)
        if k < alone:
            return (value,)
        prior_loss = squared(task, model, r, r["cond"]).mean() if prior == "outputs" else task.forward(model, r).nll.mean()
        return called(critic(fake, t), 0.0), alpha * prior_loss if surgery in ("pcgrad", "sum") else prior_loss

    with remembering(edit(model, scope), model, hidden(critic, stepper)) as e:
        e.eval()
        options = {"lr": lr, "optimizer": "adamw", "weight_decay": weight_decay}
        descend(e, loss, Paired(states.batches(instead, batch_size, steps, seed), retained, range(steps)), combine=surgeon, **options)
    return e.patch
