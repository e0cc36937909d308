"""Knowledge unlearning: gradient ascent on texts, stopped as soon as they are no more memorised than text the model never saw.

Paper    Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", ACL 2023, arXiv:2210.01504.
Code     joeljang/knowledge-unlearning, no licence, commit 732876d (read only).
Forgets  records.          Needs    forget, validation (unseen text, for the thresholds).
Scope    all weights, LoRA or named layers.   Forget  -CE, mean over all target tokens of the step.   Retain  none; ce or kl if asked for.
Update   AdamW, one step per epoch over the whole forget set.   Leaves  Replace or LowRank.
Stop     after an epoch, when the means over the forget set of MA and of EL_n have come down to their means over the validation part under the
         untouched model (see expunge.modalities.language.memorise). The cap is `epochs`; the reason of the run tells which of the two it was.
Settings
    targets     data: what the format marks, as the answer; full: every token
    reduction   pooled: mean over all target tokens of the step, so that long texts weigh more (the code); sequence: each text weighs the same
    n           length of the n-grams of EL_n; a text with fewer target tokens has no EL_n and is left out of its mean
    min_epochs  the rule is not asked before
    full_batch  a step takes the whole forget set, in parts of batch_size; False takes `accumulate` parts
Differs  Thresholds in the code are numbers for GPT-Neo; here they are computed. The rule is at or below, not below: EL_n of unseen text is often
         exactly 0, and nothing is below that. Adam's second beta is 0.999 (0.98 in the code). In the code the padding token is the end token, so that
         ends are never learned or unlearned; here the format says whether they count. Passes for MA are metered, generations for EL_n are not. The
         sequential form, chunk after chunk, is several requests, each run on the model that the one before left.
Check
    >>> import torch; from torch.nn.functional import cross_entropy
    >>> z = torch.tensor([[2.0, 0.0]], requires_grad=True)
    >>> value = -cross_entropy(z, torch.tensor([0]))
    >>> [round(float(v), 6) for v in (value.detach(), *torch.autograd.grad(value, z)[0][0])]
    [-0.126928, 0.119203, -0.119203]
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.memorise import full, memorised, spans
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.losses.language import pooled
from expunge.parts.remember import recall

TARGETS = ("data", "full")
REDUCTIONS = ("pooled", "sequence")


def _cost(n, s) -> tuple[float, float]:
    forward, backward = cost()(n, s)
    asked = max(0, round(s["epochs"]) - max(1, s["min_epochs"]) + 1)
    return forward + asked * n["forget"] + n["validation"], backward


def means(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean MA and mean EL_n; texts too short for n-grams have no EL_n."""
    ma, el = found
    return float(ma.double().mean()), float(el.double().nanmean())


@method(
    paper="arXiv:2210.01504", tasks=("causal_lm",), needs=("forget", "validation"), cost=_cost, toy={"lr": 1e-3, "n": 4}, forgets=("records",),
    published={"targets": "full"}, place="code: joeljang/knowledge-unlearning",
    lacks="on tofu-tiny it costs a sixth of the utility (0.91 to 0.75), and D is 1.31 of its critical value",
)  # fmt: skip
def knowledge_unlearning(
    model: nn.Module, task: Task, split: Split, *, targets: str = "data", reduction: str = "pooled", n: int = 10, min_epochs: int = 1,
    full_batch: bool = True, tuning: Tuning = Tuning(epochs=20.0, lr=5e-5, retain="none", warmup=0.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    for name, value, known in (("targets", targets, TARGETS), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, not '{value}'")
    data, unseen = (full(part) if targets == "full" else part for part in (split.forget, split.validation))
    parts = len(task.batches(data, tuning.batch_size))
    if full_batch:
        tuning = replace(tuning, accumulate=parts)
    per_epoch = -(-parts // tuning.accumulate)
    for part, texts in (("forget", data), ("validation", unseen)):
        if max(b - a for a, b in spans(texts)) < n:
            raise SplitError(f"no text of {part} has n={n} target tokens, which the stop rule needs; lower n")
    limits = threshold(model, task, unseen, n)

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        return -(pooled(out.nll, out, batch) if reduction == "pooled" else out.mean.sum() * parts / len(data))

    def until(_, step: int) -> bool:
        epoch, rest = divmod(step + 1, per_epoch)
        if rest or epoch < min_epochs:
            return False
        ma, el = means(memorised(model, task, data, n))
        met = ma <= limits[0] and el <= limits[1]
        if met or epoch >= tuning.epochs:
            rule = f"stop rule {'met' if met else 'not met'} after {epoch} epochs"
            guard.current().stopped = f"{rule}: MA {ma:.3f} and EL_{n} {el:.3f}; of unseen text {limits[0]:.3f} and {limits[1]:.3f}"
        return met

    return tune(model, task, split, forget, tuning, seed=seed, data=data, until=until)


def threshold(model: nn.Module, task: Task, unseen: Texts, n: int) -> tuple[float, float]:
    """MA and EL_n of unseen text under the model as it is."""
    found = recall(f"memorised/{n}", model, unseen, lambda: dict(zip(("ma", "el"), memorised(model, task, unseen, n), strict=True)))
    return means((found["ma"], found["el"]))
