"""NPO: push answers below what the model gave them before, with a force that fades as they become unlikely.

Paper    Zhang, Lin, Bai, Mei, "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", COLM 2024, arXiv:2404.05868.
Code     licong-lin/negative-preference-optimization, no licence, commit 1207bbe (read only).
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  -(2 / beta) mean log sigmoid( beta (S - S_ref) ), S the summed answer loss.
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    beta       inverse temperature; 0 would be gradient ascent
    reduction  sum (as published) or mean: what S is. With mean, beta acts about |y| times weaker; for long raw text use mean
Differs  The reference model is one number per sequence, computed before the first step: no second model, a third of the compute less, the
         same loss. The published data code pairs each forget record with one and the same retain record; here retain is drawn without replacement.
         The published code of MUSE, WAGLE and SimNPO calls other losses NPO (card npo); reduction=mean is the one of WAGLE and of SimNPO's WMDP script.
Check
    >>> import torch; from expunge.core.types import Out
    >>> from expunge.parts.losses.language import npo as loss
    >>> s = torch.tensor([2.0], requires_grad=True)
    >>> value = loss(Out(s, torch.ones(1)), torch.zeros(1), beta=0.1)
    >>> [round(float(v.detach()), 5) for v in (value, *torch.autograd.grad(value, s))]
    [11.96278, -0.90033]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.remember import sequence_nll
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses import language as losses


@method(
    paper="arXiv:2404.05868", tasks=("causal_lm",), needs=("forget",), cost=cost(once=1), toy={"lr": 1e-3, "epochs": 10}, forgets=("records",),
    published={"accumulate": 4, "weight_decay": 0.01, "schedule": "linear"}, place="code: licong-lin/negative-preference-optimization, TOFU and Llama-2-7B",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.64 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def npo(
    model: nn.Module, task: Task, split: Split, *, beta: float = 0.1, reduction: str = "sum", tuning: Tuning = Tuning(epochs=10.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    reference = sequence_nll(model, task, split.forget)

    def forget(out: Out, batch: Batch) -> Tensor:
        return losses.npo(out, reference[batch["i"]], beta=beta, reduction=reduction).mean()

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
