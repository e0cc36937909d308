"""SFD: a one-step generator is distilled from the model, without a single image, and forgets on the way: what it draws for the concept is judged by the scores
that the model gives another prompt.

Paper    Chen et al., "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models", ICLR 2025, arXiv:2409.11219.
Code     tqch/score-forgetting-distillation, Apache-2.0.
Forgets  concept.          Needs    forget and retain (their prompts alone); anchor (row by row, what to draw instead) for instead=anchor.
Scope    all of the UNet, and the buffer `one_step` that says how it draws from then on.
Forget   L(c_o, c_f): the distance of the model's score under another prompt c_o from the generator's own score (psi, learnt) under the concept's c_f.
Retain   L(c, c) on the other prompts.   Update  Adam, in turns: psi learns the score of what the generator draws, then the generator moves.   Leaves  Replace.
With x_g what the generator draws, x_t = a x_g + b n, and X what a prediction at x_t makes of it (X of the model: phi, of the generator's score: psi):
    L = sum d ((X_phi - x_g) - a d) / w,   d = X_phi - X_psi,   w = max( mean |X_phi - x_g|, 1e-5 ), constant
Settings
    instead     c_o: anchor, random (a retained record's prompt, anew for each image), or itself (the control: distilled, nothing forgotten)
    weight      of the forget terms, of psi and of the generator, beside the retain terms
    a           of L: 1.2 as in the code, 1 gives d (X_psi - x_g) / w
    guidance    of the model's scores while the generator learns (1 is none, as in the class-conditional code)
    start       noise b / a of the time at which the generator draws: 2.5 is t = 440 of DDPM's linear betas
    low         noise b / a of the earliest time at which scores are compared: 0.137 is t = 38
    high        noise b / a of the latest: 13.1 is t = 712
    ahead       steps of psi for each step of the generator
    epochs      passes over the retained prompts by the generator (and `ahead` times as many by psi)
    batch_size  retained prompts per step, beside a quarter as many of the concept
    lr          step size of Adam, both networks
    ema         decay per step of the average of the generator's weights that is left, min(ema, (1 + k) / (10 + k)) at step k; 0 leaves the last ones
Differs  Times of one schedule became noise levels, which hold for flow and v as well. The class-conditional code runs 50,000 steps of lr 1e-5, batch 128 and
         128, weight 0.01, ema 0.9999, without guidance, psi and generator in equal turns with Adam's betas (0, 0.999): with the usual betas the two circle
         each other unless psi has more turns (`ahead`). Its two-stage option takes stage one's psi for the teacher, and is left out. The text encoder
         stays. The result draws in one step, so its noise loss says little: look at what it draws, and at instead=itself (the control) for the price of
         the distillation alone.
Check
    >>> import torch
    >>> X_phi, X_psi, x_g = (torch.tensor([[v]]) for v in (0.5, 0.3, 0.1))
    >>> round(float(distance(X_phi, X_psi, x_g, 1.2)), 6), round(float(distance(X_phi, X_psi, x_g, 1.0)), 6), float(distance(X_phi, X_phi, x_g, 1.2))
    (0.08, 0.1, 0.0)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit, scratch
from expunge.core.types import Batch, Batches, Paired, Split, device_of, drawn
from expunge.modalities.diffusion.task import Schedule, T, jump, states
from expunge.modalities.pictures import Pictures
from expunge.parts.scopes.attention import part
from expunge.parts.updates.descend import descend

INSTEAD = ("anchor", "random", "itself")


def distance(X_phi: Tensor, X_psi: Tensor, x_g: Tensor, a: float) -> Tensor:
    """(B,) sum d ((X_phi - x_g) - a d) / w over the elements, d = X_phi - X_psi; w holds no gradient. Source: card sfd, step 2."""
    d = X_phi - X_psi
    w = (X_phi - x_g).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return (d * ((X_phi - x_g) - a * d)).flatten(1).sum(1) / w


def time_of(schedule: Schedule, sigma: float) -> int:
    """The time, at least 1, whose noise b / a is closest to `sigma` on a logarithmic scale.

    >>> from expunge.modalities.diffusion.ddpm import linear
    >>> [time_of(Schedule("epsilon", linear()), s) for s in (0.137, 2.5, 13.1)], time_of(Schedule(), 2.5)
    ([38, 440, 712], 714)
    """
    a, b = schedule.mix(torch.arange(1.0, T))
    return 1 + int(((b / a).flatten().log() - torch.tensor(sigma).log()).abs().argmin())


@dataclass(frozen=True)
class Turns(Sequence):
    """Batches with whose turn it is: psi's (False) `ahead` times, then the generator's (True)."""

    batches: Sequence
    ahead: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k) -> tuple[bool, Any]:
        return (k + 1) % (self.ahead + 1) == 0, self.batches[k]


def asked(task: Any, data: Pictures, size: int, steps: int, seed: int) -> Batches:
    """`steps` batches of prompts: y and i with z and noise (B, C, H, W) and u (B,) in [0, 1); images are not read."""
    shape = task.shape if data.x is None else tuple(data.x.shape[1:])
    if not shape:
        raise SettingError("say what shape is drawn: the prompts have no images")

    def collate(prompts: Pictures, index: Tensor, generator: torch.Generator | None) -> Batch:
        z, noise = torch.randn(2, len(index), *shape, generator=generator)
        return {**task.collate(prompts, index, None), "z": z, "noise": noise, "u": torch.rand(len(index), generator=generator)}

    return Batches(collate, replace(data, x=None), size, epochs=steps / -(-len(data) // size), seed=seed)


def clipped(unet: nn.Module) -> nn.ModuleDict:
    """A copy of the network in a shell that tasks can call; no gradient of a weight goes beyond 1."""
    made = nn.ModuleDict({"unet": copy.deepcopy(unet).requires_grad_(True)})
    for p in made.parameters():
        p.register_hook(lambda g: g.clamp(-1, 1))
    return made


def _steps(n: int, epochs: int, batch_size: int, ahead: int) -> int:
    """Steps of psi and of the generator together."""
    return (ahead + 1) * epochs * -(-n // batch_size)


def _cost(n, s) -> tuple[float, float]:
    steps = _steps(n["retain"], s["epochs"], s["batch_size"], s["ahead"])
    seen = drawn(n["retain"], s["batch_size"], steps) + drawn(n["forget"], max(1, s["batch_size"] // 4), steps)
    moves = 3 if s["guidance"] == 1 else 4
    return seen * (2 * s["ahead"] + moves) / (s["ahead"] + 1), seen * (s["ahead"] + moves) / (s["ahead"] + 1)


@method(
    paper="arXiv:2409.11219", tasks=("diffusion",), needs=("forget", "retain"), forgets=("class",), cost=_cost, toy={"epochs": 1, "batch_size": 64, "lr": 2e-3},
    published={"weight": 0.01, "guidance": 1.0, "ahead": 1, "batch_size": 128, "lr": 1e-05, "ema": 0.9999}, place="code: DDPM/configs, CIFAR-10",
    lacks="it costs 9 points of the other styles on shapes, and on text2digit more passes than retraining",
)  # fmt: skip
def sfd(
    model: nn.Module, task: Any, split: Split, *, instead: str = "anchor", weight: float = 1.0, a: float = 1.2, guidance: float = 2.0, start: float = 2.5,
    low: float = 0.137, high: float = 13.1, ahead: int = 3, epochs: int = 4, batch_size: int = 32, lr: float = 1e-3, ema: float = 0.95, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if instead not in INSTEAD:
        raise SettingError(f"instead must be one of {', '.join(INSTEAD)}, not '{instead}'")
    if instead == "anchor" and (split.anchor is None or len(split.anchor) != len(split.forget)):
        have = 0 if split.anchor is None else len(split.anchor)
        raise SettingError(f"instead=anchor needs anchor to say row by row what to draw: it has {have} rows, forget {len(split.forget)}; set instead=random")
    if ahead < 1:
        raise SettingError(f"ahead must be at least 1, not {ahead}")
    if not (0 < low < high and start > 0 and 0 <= ema < 1):
        raise SettingError(f"low must be above 0 and below high, start above 0 and ema in [0, 1); found {low:g}, {high:g}, {start:g} and {ema:g}")
    if guidance != 1 and task.null is None:
        raise SettingError("guidance needs the tokens of the empty prompt")
    scope = part(model, r"^unet\.")
    if not hasattr(model, "one_step"):
        raise ModelError(f"{type(model).__name__} has no buffer one_step: model.register_buffer('one_step', torch.zeros((), dtype=torch.long)) makes one")
    if jump(model):
        raise ModelError("the model draws in one step already; give the one that it was distilled from")
    schedule = replace(task.schedule, clamp=0.0)
    t_init, t_min, t_max = (time_of(schedule, sigma) for sigma in (start, low, high))
    unet: Any = model.get_submodule("unet")
    phi: Any = nn.ModuleDict({"unet": copy.deepcopy(unet).requires_grad_(False)}).eval()
    psi, theta, mean = clipped(unet), clipped(unet), copy.deepcopy(phi)
    device = device_of(model)

    def x0(net: nn.Module, xt: Tensor, t: Tensor, tokens: Tensor, batch: Batch, scale: float = 1.0) -> Tensor:
        """What the network's prediction at x_t makes of the image, guided by `scale`."""
        with quiet(model):
            context = states(model, tokens)
            both = context if scale == 1 else torch.cat([context, states(model, task.null[None]).expand_as(context)])
        n = len(both) // len(xt)
        found = task.forward(net, {"xt": xt.repeat(n, 1, 1, 1), "t": t.repeat(n), "states": both, "i": batch["i"].repeat(n)}).pred.split(len(xt))
        return schedule.parted(xt, found[-1] + scale * (found[0] - found[-1]), t)[0]

    def drawing(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the generator draws, the noise, a time, and x_t there."""
        z, noise, u = (batch[k].to(device) for k in ("z", "noise", "u"))
        t = torch.full_like(u, t_init)
        x = x0(theta, schedule.mix(t)[1] * z, t, batch["y"], batch)
        t = (t_min + u * (t_max - t_min)).floor()
        return x, noise, t, schedule.noised(x, noise, t)

    def score(batch: Batch) -> Tensor:
        """(B,) loss of psi on what the generator draws."""
        with torch.no_grad():
            x, noise, t, xt = drawing(batch)
        with quiet(model):
            context = states(model, batch["y"])
        out = task.forward(psi, {"xt": xt, "t": t, "states": context, "i": batch["i"]})
        return (schedule.wanted(x, noise, t) - out.pred).square().flatten(1).sum(1)

    def move(batch: Batch, c_o: Tensor) -> Tensor:
        """(B,) loss of the generator: the model's score under c_o against psi's under the batch's own prompts."""
        x, _, t, xt = drawing(batch)
        return distance(x0(phi, xt, t, c_o, batch, guidance), x0(psi, xt, t, batch["y"], batch), x, a)

    def other(rows: Tensor, own: Tensor) -> Tensor:
        """(B, L) tokens of c_o for forget records at these positions."""
        if instead == "itself":
            return own
        return split.anchor.tokens[rows] if instead == "anchor" else split.retain.tokens[torch.randint(len(split.retain), (len(rows),))]

    def loss(turn: tuple[bool, tuple[Batch, Batch]]) -> Tensor:
        moves, (forget, retain) = turn
        psi.requires_grad_(not moves)
        theta.requires_grad_(moves)
        if moves:
            return move(retain, retain["y"]).mean() + weight * move(forget, other(forget["i"], forget["y"])).mean()
        return score(retain).mean() + weight * score(forget).mean()

    def average(step: int) -> None:
        k, moved = divmod(step + 1, ahead + 1)
        if not moved:
            share = min(ema, k / (9 + k)) if ema else 0.0
            with torch.no_grad():
                for p, q in zip(mean.parameters(), theta.parameters(), strict=True):
                    p.lerp_(q, 1 - share)

    steps = _steps(len(split.retain), epochs, batch_size, ahead)
    streams = asked(task, split.forget, max(1, batch_size // 4), steps, seed), asked(task, split.retain, batch_size, steps, seed + 1)
    session = scratch(nn.ModuleDict({"psi": psi, "theta": theta, "mean": mean}))
    session.eval()
    descend(session, loss, Turns(Paired(*streams), ahead), lr=lr, optimizer="adam", after=average)
    with edit(model, scope) as e, torch.no_grad():
        e.eval()
        for name, p in e.params.items():
            p.copy_(mean.get_parameter(name))
        model.get_buffer("one_step").fill_(t_init)
    return e.patch
