"""SatImp: gradient ascent weighted by how well a token is known (saturation) and by how much it still matters (importance).

Paper    Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025, arXiv:2505.11953.
Code     locuslab/open-unlearning, MIT, commit d3d7cf9.
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  - mean over target tokens of sg( p_t^b1 (1 - p_t)^b2 ) l_t.
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    b1   power of the probability: small weights on what is forgotten already
    b2   power of its complement: small weights on what is certain
Differs  gamma .1 and alpha 1 are those of the trainer's file; its class and its README have them the other way round (gamma 1, alpha .1).
         A token known for certain (p_t = 1) has weight 0: it starts to move only when others have pulled it off.
Check
    >>> import torch; from expunge.modalities.language.task import aligned; from expunge.methods.language.satimp import reweighted
    >>> z = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    >>> value = reweighted(aligned(z, torch.tensor([[0]])), b1=5.0, b2=1.0)
    >>> print(round(value.item(), 6), [round(float(g), 6) for g in torch.autograd.grad(value, z)[0].flatten()])
    -0.008021 [0.007533, -0.007533]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import per_sequence, pooled, probability


def reweighted(out: Out, *, b1: float, b2: float) -> Tensor:
    """(B,) sums over each sequence of - sg( p_t^b1 (1 - p_t)^b2 ) l_t."""
    p = probability(out).detach().clamp(max=1.0)
    return -per_sequence(p**b1 * (1 - p) ** b2 * out.units, out, "sum")


@method(
    paper="arXiv:2505.11953", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 1e-3, "epochs": 20, "gamma": 1.0}, forgets=("records",),
    place="code: locuslab/open-unlearning, the trainer's file (its class and README have gamma and alpha the other way round)",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.86 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def satimp(
    model: nn.Module, task: Task, split: Split, *, b1: float = 5.0, b2: float = 1.0, tuning: Tuning = Tuning(gamma=0.1), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""

    def forget(out: Out, batch: Batch) -> Tensor:
        return pooled(reweighted(out, b1=b1, b2=b2), out, batch)

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
