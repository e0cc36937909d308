"""Concept ablation: the prompt of the concept learns to give what the prompt of an anchor gives, on states of the anchor's own pictures.

Paper    Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023, arXiv:2303.13516.
Code     nupurkmr9/concept-ablation, MIT.
Forgets  concept.          Needs    forget and anchor (row by row, what to draw instead); retain only where alpha is above 0.
Scope    a part of the model (`part`).   Forget  || e(x_t, t, c*) - e*(x_t, t, c) ||^2 on trajectories of the anchor's prompts c.
Retain   none, or alpha || e(x_t, t, r) - e*(x_t, t, r) ||^2 on trajectories of retained prompts.   Update  Adam.   Leaves  Replace, or LowRank (lora).
Settings
    part          xattn-kv (keys and values of cross-attention), xattn, unet, text, or a pattern
    alpha         weight of the retained prompts' outputs; 0 leaves them out
    lora          rank of adapters on the linear layers of the part, trained in place of their weights; 0 trains the weights of the part themselves
    steps         updates
    batch_size    states per update (of each part)
    lr            step size of Adam
    guidance      of the trajectories
    trajectories  of the frozen model, over the anchor's different prompts (and as many over retained ones); 0: one for each of these, 20 to 256
    path          states per trajectory
Differs  The code takes noised pictures of the anchor and the current network's answer, without gradient, as the target; here both states and targets are
         the frozen model's, drawn once. The prior preservation on the anchor's pictures is the retain term here, on retained concepts.
Check
    >>> import torch
    >>> float((torch.tensor([0.5, -0.2]) - torch.tensor([0.2, 0.6])).square().mean())
    0.36500000953674316
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Split
from expunge.modalities.diffusion.trajectory import Pool, follow, squared, worked
from expunge.modalities.diffusion.trajectory import cost as followed
from expunge.modalities.pictures import Pictures


@method(
    paper="arXiv:2303.13516", tasks=("diffusion",), needs=("forget", "anchor"), forgets=("class",), cost=lambda n, s: followed(n, s, "anchor"),
    toy={"steps": 60, "alpha": 1.0, "trajectories": 10},
    published={"batch_size": 8, "lr": 1.6e-05}, place="code: README, styles and objects, two processes",
    lacks="at its defaults it costs 10 points of the other styles on shapes; with alpha=1 it keeps them",
)  # fmt: skip
def concept_ablation(
    model: nn.Module, task: Any, split: Split, *, part: str = "xattn-kv", alpha: float = 0.0, lora: int = 0, steps: int = 100, batch_size: int = 32,
    lr: float = 1e-3, guidance: float = 3.0, trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if len(split.anchor) != len(split.forget):
        raise SettingError(f"anchor must say row by row what to draw instead: it has {len(split.anchor)} rows, forget {len(split.forget)}")
    named = {row.numpy().tobytes(): k for k, row in enumerate(split.anchor.tokens)}

    def own(instead: Pictures, which: Iterable[int]) -> Tensor:
        """Rows of forget that the anchor's prompts at `which` stand for."""
        return split.anchor.ids.new_tensor([named[instead.tokens[k].numpy().tobytes()] for k in which])

    def told(instead: Pictures, states: Pool) -> Pool:
        worked(split.forget, split.forget.tokens[own(instead, range(len(instead)))], len(instead))
        return states

    def forget(batch: Batch, instead: Pictures) -> Tensor:
        """The anchor's states under the concept's own prompts, row by row."""
        rows = own(instead, batch["i"].tolist())
        return squared(task, model, {**batch, "y": task.collate(split.forget, rows, None)["y"]}, batch["cond"])

    return follow(
        model, task, split, split.anchor, forget, part=part, alpha=alpha, steps=steps, batch_size=batch_size, lr=lr, guidance=guidance,
        trajectories=trajectories, path=path, lora=lora, seed=seed, made=told,
    )  # fmt: skip
