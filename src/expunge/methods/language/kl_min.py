"""KL minimisation: climb on the forget set while the retain set's predictions stay near those of the model as it was.

Paper    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, arXiv:2401.06121.
Code     locuslab/tofu, MIT, commit bdc209e; locuslab/open-unlearning, MIT, commit d3d7cf9.
Forgets  records.          Needs    forget; retain.
Scope    all weights, LoRA or named layers.   Forget  -CE_f = - sum S / sum |y| over the step.
Retain   mean of KL(p_ref || p) over target tokens (retain=kl).   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    mask  answer: the KL is that of target tokens; all: of every token, prompts too, divided by all places of the padded batch, for reproduction alone
Differs  The codes average over the places of prompts and padding too, so that the retain term is diluted by the share of padding. With mask=all a
         padded place counts in the divisor and adds nothing; in the codes it adds a KL of its own, between predictions of no meaning, and batches are
         padded to 500 tokens. The teacher is kept as its `top` likeliest tokens per place, the rest as one bin: top=0 is the whole vocabulary.
Check
    >>> import torch; from expunge.parts.losses.language import pooled, token_kl; from expunge.core.types import Out
    >>> out = Out(torch.zeros(1), torch.ones(1), torch.tensor([[[2.0, 0.0]]]), torch.tensor([[0]]))
    >>> kl = token_kl(out, torch.tensor([[[0.8, 0.2]]]).log()) * out.count
    >>> round(float(pooled(kl, out)), 6), round(float(pooled(kl, out, {"tokens": 2})), 6)     # one real place; with one padded place
    (0.026526, 0.013263)
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Split, Task
from expunge.modalities.language.memorise import full
from expunge.modalities.language.tuning import Tuning, cost, retain_batches, retained, tune
from expunge.parts.losses.language import pooled

MASKS = ("answer", "all")


@method(
    paper="arXiv:2401.06121", tasks=("causal_lm",), needs=("forget", "retain"), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "accumulate": 1},
    forgets=("records",),
    published={"batch_size": 16}, place="code: locuslab/tofu",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.89 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def kl_min(
    model: nn.Module, task: Task, split: Split, *, mask: str = "answer", seed: int = 0,
    tuning: Tuning = Tuning(epochs=5.0, accumulate=4, retain="kl", weight_decay=0.01, schedule="linear", warmup=0.2),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if mask not in MASKS:
        raise SettingError(f"mask must be one of {', '.join(MASKS)}, not '{mask}'")
    if mask == "all" and tuning.retain != "kl":
        raise SettingError(f"mask=all is about the KL; retain is {tuning.retain}")

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        return -pooled(out.nll, out, batch)

    if mask == "answer":
        return tune(model, task, split, forget, tuning, seed=seed)
    split = replace(split, retain=full(split.retain))
    kl = retained(model, task, split, tuning, retain_batches(task, split, tuning, seed))

    def keep(batch: Batch) -> Tensor:
        return kl({**batch, "tokens": batch["y"][:, 1:].numel()})

    return tune(model, task, split, forget, tuning, seed=seed, keep=keep)
