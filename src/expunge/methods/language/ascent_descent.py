"""Ascent and descent: each step climbs on forget texts and descends on texts that stay, with equal weight for each text.

Paper    Yao et al., "Machine Unlearning of Pre-trained Large Language Models", ACL 2024, arXiv:2402.15159 (its methods four to seven).
Code     yaojin17/Unlearning_LLM, MIT, commit d4b1287.
Forgets  records.          Needs    forget; retain, or anchor if general.
Scope    all weights, LoRA or named layers.   Forget  - mean over texts of S / |y|.
Retain   mean over texts of S / |y| (retain=ce), or of 1 / |y| sum_t KL(p_ref || p) (retain=kl).   Update  AdamW, both signs in each step.
Leaves   Replace or LowRank.
Settings
    general  the texts that stay are the anchor part, a general corpus (methods six and seven); False: the retain part, of the forget texts' own source
Differs  The code walks one list in which retain and forget texts take turns with factors +1 and -1, and averages factor * loss over it: half of the sum
         of the two means here. Sharded over an even number of processes each sees one sign only; here each step holds both. Its KL term is the
         cross-entropy - sum p_ref log(p + 1e-12) over all positions, padding included: the same gradient plus an offset by the reference's entropy
         and the pull of padding; here it is the KL, from log-softmax, over target tokens. Published: micro-batches of 1 put together to 60 or 85, one
         epoch. Method one, ascent alone, is knowledge_unlearning with its stop rule; two and three are random_target and adversarial_target.
Check
    >>> import torch; from torch.nn.functional import log_softmax
    >>> z, p = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([0.8, 0.2])
    >>> ce, entropy = -(p * log_softmax(z, 0)).sum(), -(p * p.log()).sum()
    >>> slope = torch.autograd.grad(ce, z)[0]
    >>> [round(float(v), 6) for v in (ce.detach(), ce.detach() - entropy, entropy, *slope)]
    [0.526928, 0.026526, 0.500402, 0.080797, -0.080797]
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.tuning import Tuning, cost, each_retained, retain_batches, tune


def _cost(n, s) -> tuple[float, float]:
    return cost()({**n, "retain": n["anchor"]} if s["general"] else n, s)


def _asks(s) -> dict[str, str]:
    if s["general"]:
        return {"anchor": "general=true needs anchor data, a general corpus; give some, or set general=false"}
    return {"retain": f"retain={s['retain']} needs retain data; give some, or a general corpus as anchor with general=true"}


@method(
    paper="arXiv:2402.15159", tasks=("causal_lm",), needs=("forget",), cost=_cost, asks=_asks, toy={"lr": 1e-3, "epochs": 10, "accumulate": 1},
    forgets=("records",),
    published={"batch_size": 1, "accumulate": 60}, place="code: yaojin17/Unlearning_LLM, arXiv texts (85 for GitHub), both signs counted",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.78 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def ascent_descent(
    model: nn.Module, task: Task, split: Split, *, general: bool = False, seed: int = 0,
    tuning: Tuning = Tuning(epochs=1.0, lr=2e-5, accumulate=4, schedule="cosine", warmup=0.03),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if tuning.retain == "none":
        raise SettingError("ascent_descent descends on texts that stay: retain must be ce or kl; for ascent alone there is knowledge_unlearning")
    for part, why in _asks({"general": general, "retain": tuning.retain}).items():
        if getattr(split, part) is None:
            raise SplitError(why)
    if general:
        asked = {row["question"] for row in split.forget.rows if "question" in row}
        if number := next((k for k, row in enumerate(split.anchor.rows, 1) if row.get("question") in asked), 0):
            raise SplitError(f"general=true needs a general corpus as anchor; its record {number} is a question of the forget set")
        split = replace(split, retain=split.anchor)
    each = each_retained(model, task, split.retain, tuning, retain_batches(task, split, tuning, seed))

    def forget(batch) -> Tensor:
        return -task.forward(model, batch).mean.mean()

    return tune(model, task, split, forget, tuning, seed=seed, keep=lambda batch: each(batch)[1].mean())
