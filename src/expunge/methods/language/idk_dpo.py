"""IDK by preference: prefer a refusal to the true answer, relative to the model as it was.

Paper    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, arXiv:2401.06121; Zhang et al., COLM 2024, arXiv:2404.05868 (this form).
Code     locuslab/open-unlearning, MIT, commit d3d7cf9 (IdkDPO); licong-lin/negative-preference-optimization, no licence, commit 1207bbe (read only).
Forgets  records.          Needs    forget, anchor (the same questions answered by refusals, row by row); retain unless retain=none.
Scope    all weights, LoRA or named layers.
Forget   -(2 / beta) mean log sigmoid( beta ((S_w^ref - S_w) - (S_l^ref - S_l)) ), w the refusal, l the true answer, S summed answer losses.
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    beta  inverse temperature
Differs  The reference model is two numbers per record, computed before the first step: no second model and two forward passes a step instead of four.
         TOFU's own DPO branch cannot run as released. Utility collapses on large forget sets (MU .04 on 5 and 10 per cent of TOFU; card
         llm-graddiff-kl-dpo-idk): the loss falls as well by lowering the true answers without end.
Check
    >>> import torch; from expunge.core.types import Out; from expunge.parts.losses.language import dpo
    >>> out = lambda s: Out(torch.tensor([s], dtype=torch.double), torch.ones(1))
    >>> zero = torch.zeros(1, dtype=torch.double)     # log-ratios 1 and -2; then equal ones
    >>> [round(float(dpo(out(w), out(l), zero, zero, beta=0.1)), 6) for w, l in ((-1.0, 2.0), (3.0, 3.0))]
    [11.087105, 13.862944]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.methods.language.idk_nll import answered
from expunge.modalities.language.remember import sequence_nll
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.losses.language import dpo


@method(
    paper="arXiv:2401.06121", tasks=("causal_lm",), needs=("forget", "anchor"), cost=cost(forward=2, backward=2, once=2),
    toy={"lr": 1e-3, "epochs": 10, "accumulate": 1}, forgets=("records",),
    published={"epochs": 5.0, "batch_size": 16, "warmup": 0.2}, place="code: locuslab/tofu; the defaults here are open-unlearning's",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.89 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def idk_dpo(
    model: nn.Module, task: Task, split: Split, *, beta: float = 0.1, seed: int = 0,
    tuning: Tuning = Tuning(epochs=10.0, accumulate=4, weight_decay=0.01, schedule="linear"),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    refusals = answered(split)
    w_ref, l_ref = sequence_nll(model, task, refusals), sequence_nll(model, task, split.forget)

    def prefer(batch) -> Tensor:
        i = batch["i"]
        w, l = task.forward(model, task.collate(refusals, i, None)), task.forward(model, batch)  # noqa: E741
        return dpo(w, l, w_ref[i], l_ref[i], beta=beta).mean()

    return tune(model, task, split, prefer, tuning, seed=seed)
