"""SalUn for diffusion models: the concept's prompt learns to give what another prompt gives on the concept's own pictures, in the most salient weights alone.

Paper    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024, arXiv:2310.12508.
Code     OPTML-Group/Unlearn-Saliency, MIT.
Forgets  concept.          Needs    forget and retain, with images; anchor (row by row, whose prediction to give instead) for to=anchor.
Scope    share `keep` of a part's weights, ranked together, with the largest |gradient| of || n - (e0 + g (ec - e0)) ||^2 on the forget images.
Forget   || e(x_t, t, c) - sg e(x_t, t, c') ||^2 (loss=rl), or minus the noise loss (ga).   Retain   alpha || n - e(x_t, t, r) ||^2.
Update   Adam, places outside the mask bitwise frozen.   Leaves  Replace.
Settings
    part        which weights the mask is drawn over: unet, xattn, text, or a pattern
    keep        share of them that may move, 0..1
    measure     of saliency, over batches: sum (|sum of gradients|, as published), mean (mean |gradient|), fisher (mean squared gradient)
    guidance    g of the mask's loss; the published w is g - 1
    loss        rl (towards another prompt's prediction) or ga (gradient ascent)
    to          c' of rl: anchor, random (a retained record's prompt, anew for each image) or null (the empty prompt)
    frozen      take the pseudo target from the model as it was, not from the one in training
    alpha       weight of the retain loss
    epochs      passes over the retain set
    batch_size  images per step (of each part)
    lr          step size of Adam
    clip        largest gradient norm of a step, of the weights that may move
Differs  Losses are means over the elements: the DDPM code adds up the retain loss over 3 x 32 x 32 of them at alpha 1e-3, which is alpha 3.072 here; Stable
         Diffusion takes 0.5 for objects (lr 1e-5, 5 epochs) and 0.1 for nudity, whose c' is a prompt of people in clothes: the anchor. The DDPM code drops
         prompts in out and pseudo target independently, and clips gradients before the mask and those of the mask per batch: here forget prompts are never
         dropped, clipping comes after the mask, and the mask's gradients are not clipped. Next class (label + 1) is the anchor of the world ddpm-digits.
Check
    >>> import torch; from expunge.parts.scopes.saliency import top
    >>> top({"w": torch.tensor([0.3, -0.1, 0.05, -0.4]).abs()}, 0.5).masks["w"].int()
    tensor([1, 0, 0, 1], dtype=torch.int32)
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Batch, Out, Paired, Scope, Split, Task, drawn
from expunge.modalities.diffusion.trajectory import squared
from expunge.parts.scopes.attention import part as weights
from expunge.parts.scopes.saliency import gradient_sum, top
from expunge.parts.updates.descend import descend

MEASURES = {"sum": lambda g: g, "mean": Tensor.abs, "fisher": Tensor.square}
LOSSES, TARGETS = ("rl", "ga"), ("anchor", "random", "null")


def guided(task: Any, guidance: float) -> Task:
    """The task whose prediction is e0 + g (ec - e0), in one forward pass of both prompts.

    >>> e0, ec, w = 0.4, 1.0, 2.0; round((1 + w) * ec - w * e0, 6), round(e0 + (w + 1) * (ec - e0), 6)
    (2.2, 2.2)
    """
    if guidance == 1:
        return task
    if task.null is None:
        raise SettingError("guidance needs the tokens of the empty prompt")

    def forward(model: nn.Module, batch: Batch) -> Out:
        n = len(batch["i"])
        twice = {k: torch.cat([v, task.null.expand_as(v) if k == "y" else v]) for k, v in batch.items()}
        out = task.forward(model, twice)
        cond, null = out.pred.split(n)
        pred, target = null + guidance * (cond - null), out.target[:n]
        return Out((pred - target).square().flatten(1).mean(1), out.count[:n], pred=pred, target=target)

    return replace(task, forward=forward)


def salient(model: nn.Module, task: Any, split: Split, scope: Scope, *, keep: float, measure: str, guidance: float, batch_size: int) -> Scope:
    """The share `keep` of the scope's weights that the gradient of the guided noise loss on the forget images points at, in eval mode, no prompt dropped."""
    if not 0 < keep <= 1:
        raise SettingError(f"keep must be in (0, 1], not {keep:g}")
    if measure not in MEASURES:
        raise SettingError(f"measure must be one of {', '.join(MEASURES)}, not '{measure}'")
    if split.forget.x is None:
        raise SplitError("the forget records have prompts and no images: salun_diffusion learns from the concept's own images; esd and uce need none")
    batches, found = task.batches(split.forget, batch_size), {}
    for k in range(len(batches)):
        for name, g in gradient_sum(model, guided(task, guidance), [batches[k]]).items():
            if name in scope.masks:
                found[name] = found.get(name, 0) + MEASURES[measure](g)
    return top({n: g.abs() for n, g in found.items()}, keep, scope.buffers)


def _steps(n, s) -> int:
    return s["epochs"] * -(-n["retain"] // s["batch_size"])


def _cost(n, s) -> tuple[float, float]:
    mask = n["forget"] * (1 if s["guidance"] == 1 else 2)
    forget, retain = (drawn(n[k], s["batch_size"], _steps(n, s)) for k in ("forget", "retain"))
    return mask + retain + forget * (2 if s["loss"] == "rl" else 1), mask + retain + forget


@method(
    paper="arXiv:2310.12508", tasks=("diffusion",), needs=("forget", "retain"), forgets=("class",), cost=_cost, toy={"epochs": 2},
    published={"alpha": 3.072, "batch_size": 128, "lr": 0.0001}, place="code: README, DDPM on CIFAR-10 (alpha is 1e-3 on a sum over 3,072 elements)",
    stable=True,
)  # fmt: skip
def salun_diffusion(
    model: nn.Module, task: Any, split: Split, *, part: str = "unet", keep: float = 0.5, measure: str = "sum", guidance: float = 8.5, loss: str = "rl",
    to: str = "anchor", frozen: bool = False, alpha: float = 3.0, epochs: int = 4, batch_size: int = 64, lr: float = 5e-4, clip: float = 1.0, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if loss not in LOSSES or to not in TARGETS:
        raise SettingError(f"loss must be one of {', '.join(LOSSES)} and to one of {', '.join(TARGETS)}, not '{loss}' and '{to}'")
    if loss == "rl" and to == "anchor" and (split.anchor is None or len(split.anchor) != len(split.forget)):
        have = 0 if split.anchor is None else len(split.anchor)
        raise SettingError(f"to=anchor needs anchor to say row by row what to draw instead: it has {have} rows, forget {len(split.forget)}; set to=random")
    if loss == "rl" and to == "null" and task.null is None:
        raise SettingError("to=null needs the tokens of the empty prompt")
    scope = salient(model, task, split, weights(model, part), keep=keep, measure=measure, guidance=guidance, batch_size=batch_size)
    teacher = copy.deepcopy(model) if frozen and loss == "rl" else model

    def forget(batch: Batch) -> Tensor:
        """|| e(x_t, t, c) - sg e(x_t, t, c') ||^2 (B,), c as the records have it."""
        batch = {**batch, "y": split.forget.tokens[batch["i"]]}
        if loss == "ga":
            return -task.forward(model, batch).mean
        with torch.no_grad():
            target = task.forward(teacher, {**batch, "y": other(batch["i"])}).pred
        return squared(task, model, batch, target)

    def other(rows: Tensor) -> Tensor:
        """(B, L) tokens of c' for forget records at these positions."""
        if to == "anchor":
            return split.anchor.tokens[rows]
        if to == "random":
            return split.retain.tokens[torch.randint(len(split.retain), (len(rows),))]
        return task.null.expand(len(rows), -1)

    steps = _steps({"retain": len(split.retain)}, {"epochs": epochs, "batch_size": batch_size})
    streams = [task.batches(p, batch_size, epochs=steps / -(-len(p) // batch_size), seed=seed + k) for k, p in enumerate((split.forget, split.retain))]
    with edit(model, scope) as e:
        e.eval()
        descend(e, lambda pair: forget(pair[0]).mean() + alpha * task.forward(model, pair[1]).mean.mean(), Paired(*streams), lr=lr, optimizer="adam", clip=clip)
    return e.patch
