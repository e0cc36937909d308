"""ESD: given the concept, the model learns to predict what points away from it: guidance with a negative sign, made part of the weights.

Paper    Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv:2303.07345.
Code     rohitgandikota/erasing, MIT.
Forgets  concept.          Needs    forget (its prompts alone); retain only where alpha is above 0.
Scope    a part of the model (`part`).   Forget  || e(x_t, t, c) - (e0 - eta (ec - e0)) ||^2 on states x_t of the frozen model's own trajectories.
Retain   none, or alpha || e(x_t, t, r) - e*(x_t, t, r) ||^2 on trajectories of retained prompts.   Update  Adam.   Leaves  Replace, or LowRank (lora).
Settings
    part          xattn (cross-attention, for concepts named in the prompt), xattn-kv, noxattn (for what must vanish unprompted), unet, text, or a pattern
    eta           how far to point away; 0 redirects to the empty prompt. The current code's eta' is eta + 1
    base          what e0 is the prediction for: null (the empty prompt) or anchor (the anchor's prompt of the same row)
    alpha         weight of the retained prompts' outputs; 0 leaves them out, as published
    lora          rank of adapters on the linear layers of the part, trained in place of their weights; 0 trains the weights of the part themselves
    steps         updates
    batch_size    states per update (of each part)
    lr            step size of Adam
    guidance      of the trajectories
    trajectories  of the frozen model, over the concept's different prompts (and as many over retained ones); 0: one for each of these, 20 to 256
    path          states per trajectory
Differs  The paper samples anew for each update, up to the drawn time, with the model in training, and pairs a state with a time some 40 of 1000 noisier; the
         current code samples with the frozen model and pairs them rightly. Here all states of a few frozen trajectories are kept and drawn from in batches.
         base=anchor is ours: where a request's prompts say more than the concept ("a striped disc"), what they share with the anchor's ("a plain disc") drops
         out of ec - e0, and the model is not taught to point away from discs. Published prompts name the concept alone.
Check
    >>> import torch
    >>> negated(torch.tensor([0.1, 0.2]), torch.tensor([0.5, -0.2]), 1.0)
    tensor([-0.3000,  0.6000])
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split
from expunge.modalities.diffusion.trajectory import Pool, counterparts, follow, lines, squared, under
from expunge.modalities.diffusion.trajectory import cost as followed
from expunge.modalities.pictures import Pictures

BASES = ("null", "anchor")


def negated(null: Tensor, cond: Tensor, eta: float) -> Tensor:
    """e0 - eta (ec - e0): the prediction that points away from the concept."""
    return null - eta * (cond - null)


def cost(n, s) -> tuple[float, float]:
    """Passes of `follow`, and of the anchor's prompts at the states."""
    forward, backward = followed(n, s)
    return forward + (lines(n, s) * s["path"] if s["base"] == "anchor" else 0), backward


@method(
    paper="arXiv:2303.07345", tasks=("diffusion",), needs=("forget",), forgets=("class",), cost=cost, toy={"steps": 60, "alpha": 1.0, "trajectories": 10},
    published={"steps": 1000, "batch_size": 1, "lr": 1e-05, "path": 50}, place="code: the script of the paper's time, as carried in SalUn's repository",
    lacks="as published it unlearns the objects with the style on shapes (CRA 99.6 to 41.3); base=anchor with alpha=1 ends that",
)  # fmt: skip
def esd(
    model: nn.Module, task: Any, split: Split, *, part: str = "xattn", eta: float = 1.0, base: str = "null", alpha: float = 0.0, lora: int = 0,
    steps: int = 100, batch_size: int = 32, lr: float = 1e-3, guidance: float = 3.0, trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if base not in BASES:
        raise SettingError(f"base must be one of {', '.join(BASES)}, not '{base}'")
    if base == "anchor" and split.anchor is None:
        raise SettingError("base=anchor needs an anchor: name what to draw instead, or choose base=null")

    def beside(gone: Pictures, states: Pool) -> Pool:
        """The anchor's prediction in the place of the empty prompt's."""
        return replace(states, null=under(model, task, states, counterparts(gone, split.forget, split.anchor)))

    return follow(
        model, task, split, split.forget, lambda b, _: squared(task, model, b, negated(b["null"], b["cond"], eta)), part=part, alpha=alpha, steps=steps,
        batch_size=batch_size, lr=lr, guidance=guidance, trajectories=trajectories, path=path, lora=lora, seed=seed,
        made=beside if base == "anchor" else None,
    )  # fmt: skip
