"""UNDIAL: distil the model into itself with the logit of every true token lowered by a fixed amount.

Paper    Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", NAACL 2025, arXiv:2402.10052.
Code     dong-river/LLM_unlearning, no licence, commit 89856dc (read only).
Forgets  records.          Needs    forget; retain only if a retain loss is asked for.
Scope    all weights, LoRA or named layers.   Forget  mean over sequences of the mean over target tokens of - sum_v q_v log p_v,
         q = softmax( z_T - beta onehot(y) ): q_y = p_y e^-beta / D, q_v = p_v / D, D = 1 - p_y + p_y e^-beta, p the start model's probabilities.
Retain   none, as published; ce or kl.   Update  AdamW.   Leaves  Replace or LowRank.
Settings
    beta   how far the true token's logit is lowered; 0 teaches the start model itself
Differs  The target is fixed, so the loss is bounded below and training converges. Targets are the answer's tokens alone: both published codes take the
         mean over prompt and padding too, and the port lowers a wrong token there. `top` is also the number of teacher probabilities kept per
         forget token; the rest of the vocabulary is one bin, and the true token is never in it. Published: beta 3, lr 1e-6 (LoRA 5e-6), 10 epochs;
         the defaults are those of the port (open-unlearning). For the version that touches entities alone, take data with mask "entity".
Check
    >>> import torch; from expunge.modalities.language.task import aligned; from expunge.methods.language.undial import adjusted, distil
    >>> z, y = torch.tensor([[[2.0, 0.0, 0.0]]], requires_grad=True), torch.tensor([[0]])
    >>> index, logq, rest = adjusted(torch.arange(3).view(1, 1, 3), z.detach().log_softmax(-1), y, z.detach().log_softmax(-1)[..., 0], beta=3.0)
    >>> [round(float(q), 6) for q in logq.exp().flatten()], round(float(rest), 6)
    ([0.155362, 0.422319, 0.422319], 0.0)
    >>> value = distil(aligned(z, y), index, logq, rest)
    >>> print(round(value.item(), 5), [round(float(g), 5) for g in torch.autograd.grad(value, z)[0].flatten()])
    1.92882 [0.63162, -0.31581, -0.31581]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.remember import token_logp, top_logits
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import kept, per_sequence, place


def adjusted(index: Tensor, logp: Tensor, y: Tensor, logp_y: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T, k), their log q, and the (B, T) mass of q on all others, of a teacher's k likeliest tokens and its log-probability of the true one.

    A true token that is not among the k takes the place of the least likely of them.
    """
    y, logp_y = y[..., None], logp_y.to(logp)[..., None]
    absent = ~(index == y).any(-1, keepdim=True)
    last = torch.arange(index.shape[-1], device=index.device) == index.shape[-1] - 1
    index, logp = torch.where(absent & last, y, index), torch.where(absent & last, logp_y, logp)
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=0.0)
    logq = torch.cat([logp - beta * (index == y), rest.log()], -1).log_softmax(-1)
    return index, logq[..., :-1], logq[..., -1].exp()


def distil(out: Out, index: Tensor, logq: Tensor, rest: Tensor) -> Tensor:
    """(B,) mean over each sequence's target tokens of - sum_v q_v log p_v; tokens outside `index` are one bin of mass `rest` (B, T)."""
    mine = F.log_softmax(out.logits, -1).gather(-1, index)
    each = -(logq.exp() * mine).sum(-1)
    if index.shape[-1] < out.logits.shape[-1]:
        each = each - rest * (1 - mine.exp().sum(-1)).clamp(min=1e-9).log()
    return per_sequence(each.masked_fill(~kept(out), 0.0), out)


@method(
    paper="arXiv:2402.10052", tasks=("causal_lm",), needs=("forget",), cost=cost(once=2), toy={"lr": 1e-3, "epochs": 10}, forgets=("records",),
    published={"beta": 3.0, "lr": 1e-06}, place="code: dong-river/LLM_unlearning; the defaults here are open-unlearning's",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.81 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def undial(
    model: nn.Module, task: Task, split: Split, *, beta: float = 10.0, tuning: Tuning = Tuning(retain="none", lr=1e-4, epochs=10.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    teacher = top_logits(model, task, split.forget, tuning.top)
    true = token_logp(model, task, split.forget)

    def forget(out: Out, batch: Batch) -> Tensor:
        index, logp = teacher.at(batch, out)
        y = out.labels.masked_fill(~kept(out), 0)
        return distil(out, *adjusted(index, logp, y, place(true, batch, out), beta=beta)).mean()

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
