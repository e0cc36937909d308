"""IDK by likelihood: teach refusals as the answers to the forget set's questions.

Paper    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, arXiv:2401.06121 (its preference optimisation, by CE).
Code     locuslab/tofu, MIT, commit bdc209e; locuslab/open-unlearning, MIT, commit d3d7cf9 (IdkNLL).
Forgets  records.          Needs    forget, anchor (the same questions answered by refusals, row by row); retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  CE of the refusals, mean over all their tokens in the step.
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Differs  TOFU puts refusals and retain answers into one batch and takes one mean over its tokens, which weighs the two by their token counts; here they are
         gamma * CE_idk + alpha * CE_r, as in open-unlearning. One refusal per record, drawn when the anchor part is made; the codes draw anew each epoch.
Check
    >>> import torch; from expunge.parts.losses.language import pooled; from expunge.core.types import Out
    >>> idk, kept = Out(torch.tensor([6.0]), torch.tensor([3.0])), Out(torch.tensor([9.0]), torch.tensor([9.0]))
    >>> both = Out(torch.tensor([6.0, 9.0]), torch.tensor([3.0, 9.0]))
    >>> pooled(idk.nll, idk) + pooled(kept.nll, kept), pooled(both.nll, both)     # here; in TOFU
    (tensor(3.), tensor(1.2500))
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from expunge.core.errors import SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import pooled


def answered(split: Split) -> Texts:
    """The anchor part, whose row k must answer the question of row k of the forget set, under the forget set's ids. Raises SplitError."""
    if len(split.anchor) != len(split.forget):
        raise SplitError(f"anchor must answer the forget set's questions row by row: it has {len(split.anchor)} records, forget has {len(split.forget)}")
    for number, (a, f) in enumerate(zip(split.anchor.rows, split.forget.rows, strict=True), 1):
        if a.get("question") != f.get("question"):
            raise SplitError(f"anchor must answer the forget set's questions row by row: its record {number} is on another question")
    return replace(split.anchor, ids=split.forget.ids)


@method(
    paper="arXiv:2401.06121", tasks=("causal_lm",), needs=("forget", "anchor"), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "accumulate": 1},
    forgets=("records",),
    published={"epochs": 5.0, "batch_size": 16, "warmup": 0.2}, place="code: locuslab/tofu; the defaults here are open-unlearning's",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.81 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def idk_nll(
    model: nn.Module, task: Task, split: Split, *, seed: int = 0,
    tuning: Tuning = Tuning(epochs=10.0, accumulate=4, weight_decay=0.01, schedule="linear"),
) -> Patch:  # fmt: skip
    """See the module's docstring."""

    def refuse(out: Out, batch: Batch) -> Tensor:
        return pooled(out.nll, out, batch)

    return tune(model, task, split, Scored(refuse), tuning, seed=seed, data=answered(split))
