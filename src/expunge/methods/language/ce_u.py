"""CE-U: train towards the model's own distribution with the true token struck out.

Paper    Yang, "CE-U: Cross Entropy Unlearning", arXiv:2503.01224.
Code     locuslab/open-unlearning, MIT, commit d3d7cf9.
Forgets  records.          Needs    forget; retain only if a retain loss is asked for.
Scope    all weights, LoRA or named layers.   Forget  mean over target tokens of - sum_v q_v log p_v, q = softmax( sg(z) with z_y = -inf ).
Retain   none, as published; ce or kl.   Update  AdamW.   Leaves  Replace or LowRank.
Settings
    skip_first   target tokens left out at the start of each answer; of an answer that is no longer than that, the last one stays
Differs  The gradient of the logits is p - q: the target follows the model, so nothing ends the descent but the number of steps. It is the limit
         beta -> infinity of undial with the model itself as teacher.
Check
    >>> import torch; from expunge.modalities.language.task import aligned; from expunge.methods.language.ce_u import struck
    >>> z = torch.tensor([[[2.0, 0.0, 0.0]]], requires_grad=True)
    >>> value = struck(aligned(z, torch.tensor([[0]])))
    >>> print(round(value.item(), 6), [round(float(g), 6) for g in torch.autograd.grad(value, z)[0].flatten()])
    2.239545 [0.786986, -0.393493, -0.393493]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.task import with_targets
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import kept, pooled, soft_target


def struck(out: Out) -> Tensor:
    """(B,) sums over each sequence of - sum_v q_v log p_v."""
    y = out.labels.masked_fill(~kept(out), 0)[..., None]
    q = out.logits.detach().scatter(-1, y, -math.inf).softmax(-1)
    return soft_target(out, q, "sum")


def later(targets: Tensor, skip: int) -> Tensor:
    """(T,) targets without their first `skip`; the last one always stays.

    >>> [later(torch.tensor([False, True, True, True]), k).int().tolist() for k in (0, 1, 9)]
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    """
    number = targets.cumsum(0)
    return targets & (number > min(skip, int(number[-1]) - 1))


@method(
    paper="arXiv:2503.01224", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 3e-4, "epochs": 6}, forgets=("records",),
    place="code: locuslab/open-unlearning",
    stable=True,
)  # fmt: skip
def ce_u(
    model: nn.Module, task: Task, split: Split, *, skip_first: int = 1, tuning: Tuning = Tuning(retain="none"), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if skip_first < 0:
        raise SettingError(f"skip_first must be 0 or larger, not {skip_first}")
    # the first token of a sequence never counts, whatever the mask says
    data = with_targets(split.forget, [later(torch.cat([torch.zeros_like(t[:1]), t[1:]]), skip_first) for t in split.forget.targets])

    def forget(out: Out, batch: Batch) -> Tensor:
        return pooled(struck(out), out, batch)

    return tune(model, task, split, Scored(forget), tuning, seed=seed, data=data)
