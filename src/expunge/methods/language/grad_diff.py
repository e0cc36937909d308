"""Gradient difference: climb on the forget set and descend on the retain set, each by the mean over all its tokens.

Paper    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, arXiv:2401.06121.
Code     locuslab/tofu, MIT, commit bdc209e; locuslab/open-unlearning, MIT, commit d3d7cf9.
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  -CE_f = - sum S / sum |y| over the step.
Retain   ce (same mean), kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Differs  The mean over tokens is that of the whole step, whatever parts it is put together from; in the codes it is that of each micro-batch. They
         pair each forget record with a retain record drawn with replacement; here retain is drawn without. With retain=none this is the GA of TOFU: it
         has no stop rule, and -CE has no bound, so that it destroys the model sooner or later (FQ 1e-239, MU 0 on forget10; card llm-ga).
Check
    >>> import torch; from expunge.parts.losses.language import pooled; from expunge.core.types import Out
    >>> out = Out(torch.tensor([6.0, 1.0]), torch.tensor([3.0, 1.0]))
    >>> -pooled(out.nll, out), -out.mean.mean()
    (tensor(-1.7500), tensor(-1.5000))
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import pooled


@method(
    paper="arXiv:2401.06121", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "accumulate": 1}, forgets=("records",),
    published={"epochs": 5.0, "batch_size": 16, "warmup": 0.2}, place="code: locuslab/tofu; the defaults here are open-unlearning's",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.86 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def grad_diff(
    model: nn.Module, task: Task, split: Split, *, seed: int = 0,
    tuning: Tuning = Tuning(epochs=10.0, accumulate=4, weight_decay=0.01, schedule="linear"),
) -> Patch:  # fmt: skip
    """See the module's docstring."""

    def forget(out: Out, batch: Batch) -> Tensor:
        return -pooled(out.nll, out, batch)

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
