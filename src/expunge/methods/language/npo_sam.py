"""NPO+SAM: NPO whose gradient is taken where the forget loss is worst nearby, so that a few steps of relearning undo less.

Paper    Fan et al., "Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective and Beyond", ICML 2025,
         arXiv:2502.05374.          Code     OPTML-Group/Unlearn-Smooth, MIT (read only).
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  grad of L_NPO at theta + rho g / ||g||, g = grad L_NPO at theta, over the weights in scope.
Retain   ce, kl or none, at theta.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    beta       inverse temperature of NPO
    reduction  sum (as published for NPO) or mean: what S is, as in npo
    rho        length of the move uphill; 0 is npo at twice the cost
Differs  The reference model is one number per sequence, as in npo. With accumulation the move uphill is that of each part. The other smoothings of the
         paper (random, gradient penalty, curvature, averaged weights) are not here. rho .01 is this package's choice.
Check
    >>> import torch; from expunge.methods.language.npo_sam import sharp
    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)                                # L = |w|^2 / 2, so g / ||g|| = (.6, .8)
    >>> value = sharp([w], lambda: w.square().sum() / 2, rho=0.5)
    >>> print(round(value.item(), 3), torch.autograd.grad(value, w)[0], w.detach())     # 5.5^2 / 2, and the gradient at (3.3, 4.4)
    15.125 tensor([3.3000, 4.4000]) tensor([3., 4.])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.remember import sequence_nll
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.losses import language as losses


def sharp(params: Sequence[Tensor], loss: Callable[[], Tensor], *, rho: float) -> Tensor:
    """A number whose value and gradient at theta are those of the loss at theta + rho g / ||g||. The weights are left as they were, bit for bit."""
    g = torch.autograd.grad(loss(), params, allow_unused=True)
    norm = torch.stack([d.float().norm() for d in g if d is not None]).norm()
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, d in zip(params, g, strict=True):
            if d is not None and norm > 0:
                p.add_(d, alpha=rho / float(norm))
    value = loss()
    there = torch.autograd.grad(value, params, allow_unused=True)
    with torch.no_grad():
        for p, was in zip(params, saved, strict=True):
            p.copy_(was)
    return value.detach() + sum(((p - p.detach()) * d).sum() for p, d in zip(params, there, strict=True) if d is not None)


@method(
    paper="arXiv:2502.05374", tasks=("causal_lm",), needs=("forget",), cost=cost(forward=2, backward=2, once=1), toy={"lr": 1e-3, "epochs": 10},
    forgets=("records",),
    place="the card names no place: it has the form of the loss alone",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.58 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def npo_sam(
    model: nn.Module, task: Task, split: Split, *, beta: float = 0.1, reduction: str = "sum", rho: float = 0.01, tuning: Tuning = Tuning(epochs=10.0),
    seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    reference = sequence_nll(model, task, split.forget)

    def forget(batch) -> Tensor:
        def loss() -> Tensor:
            return losses.npo(task.forward(model, batch), reference[batch["i"]], beta=beta, reduction=reduction).mean()

        return sharp([p for p in model.parameters() if p.requires_grad], loss, rho=rho)

    return tune(model, task, split, forget, tuning, seed=seed)
