"""WGA: gradient ascent whose force on a token fades with its probability.

Paper    Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025, arXiv:2502.19301.
Code     tmlr-group/G-effect, no licence (read only).
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  - mean over target tokens of sg( p_t^beta ) l_t, l_t = -log p_t, sg: no gradient.
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    beta   power of the weight; 0 is plain gradient ascent
Differs  beta 1 is that of open-unlearning; the original code starts from 5. The mean is over all target tokens of a step, as published. No copy of the
         model as it was: open-unlearning keeps one and never reads it.
Check
    >>> import torch; from expunge.modalities.language.task import aligned; from expunge.methods.language.wga import weighted
    >>> for beta in (1.0, 5.0):
    ...     z = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    ...     value = weighted(aligned(z, torch.tensor([[0]])), beta=beta)
    ...     print(round(value.item(), 6), [round(float(g), 6) for g in torch.autograd.grad(value, z)[0].flatten()])
    -0.111798 [0.104994, -0.104994]
    -0.067288 [0.063193, -0.063193]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import per_sequence, pooled, probability


def weighted(out: Out, *, beta: float) -> Tensor:
    """(B,) sums over each sequence of - sg( p_t^beta ) l_t."""
    return -per_sequence(probability(out).detach() ** beta * out.units, out, "sum")


@method(
    paper="arXiv:2502.19301", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 1e-3, "epochs": 10}, forgets=("records",),
    published={"beta": 5.0}, place="code: tmlr-group/G-effect; the defaults here are open-unlearning's",
    lacks="on tofu-tiny it costs 0.056 of the probability per token of retain answers, where 0.05 is allowed",
)  # fmt: skip
def wga(model: nn.Module, task: Task, split: Split, *, beta: float = 1.0, tuning: Tuning = Tuning(), seed: int = 0) -> Patch:
    """See the module's docstring."""

    def forget(out: Out, batch: Batch) -> Tensor:
        return pooled(weighted(out, beta=beta), out, batch)

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
