"""SimNPO: NPO without a reference, on the loss per token.

Paper    Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", NeurIPS 2025, arXiv:2410.07163.
Code     OPTML-Group/Unlearn-Simple, MIT, commit f1a355d.
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  -(2 / beta) mean log sigmoid( beta (S / |y| - delta) ).
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    beta   inverse temperature; 2.5 (TOFU forget05) to 4.5 (forget10) in the paper
    delta  the paper's margin gamma, in nats per token
Differs  The paper's coefficients are tuned per split (0.1375 and 0.125 on the forget loss): here they are `gamma`, and to be searched on validation.
         The published MUSE script takes another loss, over the whole vocabulary.
Check
    >>> import torch; from expunge.core.types import Out
    >>> from expunge.parts.losses.language import simnpo as loss
    >>> s = torch.tensor([3.0], requires_grad=True)
    >>> for beta in (2.5, 4.5):
    ...     value = loss(Out(s, torch.tensor([4.0])), beta=beta)
    ...     print([round(float(v.detach()), 6) for v in (value, *torch.autograd.grad(value, s))])
    [0.11414, -0.066482]
    [0.014954, -0.016543]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses import language as losses


@method(
    paper="arXiv:2410.07163", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "gamma": 1.0}, forgets=("records",),
    published={"accumulate": 4, "weight_decay": 0.01}, place="code: OPTML-Group/Unlearn-Simple, TOFU forget10",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.78 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def simnpo(
    model: nn.Module, task: Task, split: Split, *, beta: float = 4.5, delta: float = 0.0, tuning: Tuning = Tuning(epochs=10.0, gamma=0.125), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""

    def forget(out: Out, batch: Batch) -> Tensor:
        return losses.simnpo(out, beta=beta, delta=delta).mean()

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
