"""Adversarial targets: teach the forget texts' positions the token that the untouched model holds likeliest after the true one.

Paper    Yao et al., "Machine Unlearning of Pre-trained Large Language Models", ACL 2024, arXiv:2402.15159 (its third of seven methods).
Code     yaojin17/Unlearning_LLM, MIT, commit d4b1287.
Forgets  records.          Needs    forget; retain if retain=ce or kl.
Scope    all weights, LoRA or named layers.   Forget  mean over texts of 1 / |y| sum_t -log p(a_t | x_<t), a_t = argmax over a != x_t of p_ref(a | x_<t).
Retain   none; ce or kl if asked for.   Update  AdamW.   Leaves  Replace or LowRank.
Differs  The code is off by one: it strikes x_t out of the distribution of x_t+1 and stores the likeliest token left there as the target at t. Here a_t comes
         from the distribution that predicts x_t. Targets are found once, in one pass, and kept as int32: no second model. Published: steps of 60 (arXiv) or
         85 (GitHub) texts of 4,096 tokens, one epoch.
Check
    >>> import torch; from expunge.methods.language.adversarial_target import runner_up
    >>> runner_up(torch.tensor([[5.0, 4.0, 1.0]]), torch.tensor([0]))
    tensor([1])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.methods.language.random_target import relabelled
from expunge.modalities.language.remember import per_token
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, tune


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """(M,) the likeliest token but the label, of logits (M, V) and labels (M,)."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def adversaries(model: nn.Module, task: Task, data: Texts, size: int = 16) -> tuple[Tensor, ...]:
    """N vectors (T_i,): the runner-up at each target, under the model as it is."""
    pick = lambda logits, labels, units: {"labels": runner_up(logits, labels).int()}  # noqa: E731
    return per_token("adversaries", model, task, data, pick, size=size)["labels"]


@method(
    paper="arXiv:2402.15159", tasks=("causal_lm",), needs=("forget",), cost=cost(once=1), toy={"lr": 1e-3, "epochs": 10, "accumulate": 1},
    forgets=("records",),
    published={"batch_size": 1, "accumulate": 60}, place="code: yaojin17/Unlearning_LLM, arXiv texts (85 for GitHub)",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.72 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def adversarial_target(
    model: nn.Module, task: Task, split: Split, *, seed: int = 0,
    tuning: Tuning = Tuning(epochs=1.0, lr=2e-5, accumulate=8, retain="none", schedule="cosine", warmup=0.03),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    labels = adversaries(model, task, split.forget)

    def forget(batch) -> Tensor:
        return task.forward(model, relabelled(batch, labels)).mean.mean()

    return tune(model, task, split, forget, tuning, seed=seed)
