"""LLMU: gradient ascent on the forget answers, with random other answers in their place, under a KL to the model as it was.

Paper    Yao, Xu, Liu, "Large Language Model Unlearning", NeurIPS 2024, arXiv:2310.10683.          Code     kevinyaobytedance/llm_unlearn, MIT.
Forgets  records.          Needs    forget, retain.
Scope    all weights, LoRA or named layers.   Forget  - gamma CE(forget) + mismatch CE(forget questions with random answers of retain).
Retain   kl (as published), ce or none.   Update  AdamW; ends once CE(forget) exceeds a bound.   Leaves  Replace or LowRank.
Settings
    mismatch  weight of the random answers; 0 leaves them out
    answers   random answers drawn per question, once, by seed; the steps go through all of them
    bound     nats per token of a step's forget records at which training ends; 0: never
Differs  Published: gamma .5, mismatch 1, alpha 1, lr 2e-6, batch 2, at most 1,000 steps. The bound's default and the number of answers are this
         package's choice. No answer that a forget record has is drawn. KL covers the answer tokens of retain alone.
Check
    >>> import torch; from expunge.methods.language.llmu import choose
    >>> choose(["a", "b", "c"], {"b"}, 3, 2, seed=0) == choose(["a", "b", "c"], {"b"}, 3, 2, seed=0)
    True
    >>> sorted({answer for answer in choose(["a", "b", "c"], {"b"}, 20, 5, seed=0)})
    ['a', 'c']
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batches, Split, Task, drawn
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, tune
from expunge.modalities.language.tuning import cost as shared
from expunge.parts.losses.language import pooled


def choose(pool: Sequence[str], banned: Collection[str], n: int, k: int, seed: int) -> list[str]:
    """n times k answers of the pool that are not banned, drawn with replacement: k rounds over the n questions."""
    left = [answer for answer in pool if answer not in banned]
    if not left:
        raise SplitError("retain has no answer that forget does not have; set mismatch=0")
    return [left[j] for j in torch.randint(len(left), (n * k,), generator=torch.Generator().manual_seed(seed)).tolist()]


def mismatched(split: Split, k: int, seed: int) -> Texts:
    """Every forget question with k random answers of retain."""
    rows = [row for row in split.forget.rows if "question" in row]
    pool = [str(row["answer"]) for row in split.retain.rows if "answer" in row]
    if len(rows) < len(split.forget) or split.forget.format is None:
        raise SplitError("random answers need question-answer records made by data.text; set mismatch=0 for plain text")
    said = choose(pool, {str(row["answer"]) for row in rows}, len(rows), k, seed)
    return split.forget.format.answered(split.forget.take(list(range(len(rows))) * k), said)


def _cost(n, s) -> tuple[float, float]:
    forward, backward = shared()(n, s)
    steps = max(1, round(-(-n["forget"] // s["batch_size"]) * s["epochs"]))
    other = drawn(n["forget"] * s["answers"], s["batch_size"], steps) if s["mismatch"] else 0
    return forward + other, backward + other


@method(
    paper="arXiv:2310.10683", tasks=("causal_lm",), needs=("forget", "retain"), cost=_cost, toy={"lr": 1e-3, "epochs": 10, "batch_size": 4},
    forgets=("records",),
    place="code: kevinyaobytedance/llm_unlearn",
    lacks="on tofu-tiny it costs an eighth of the utility (0.91 to 0.79)",
)  # fmt: skip
def llmu(
    model: nn.Module, task: Task, split: Split, *, mismatch: float = 1.0, answers: int = 5, bound: float = 10.0,
    tuning: Tuning = Tuning(lr=2e-6, batch_size=2, gamma=0.5, retain="kl"), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if mismatch < 0 or answers < 1 or bound < 0:
        raise SettingError(f"mismatch and bound must be 0 or larger and answers at least 1; found {mismatch:g}, {bound:g} and {answers}")
    risen = [0.0]  # CE of this step's forget records; empty at the start of every step

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        ce = pooled(out.nll, out, batch)
        risen[0] += float(ce.detach()) / tuning.accumulate
        return -ce

    def beyond(_, step: int) -> bool:
        ce, risen[0] = risen[0], 0.0
        return bound > 0 and ce > bound

    def other(batch) -> Tensor:
        out = task.forward(model, batch)
        return mismatch * pooled(out.nll, out, batch)

    more: dict[str, tuple[Batches, Callable]] = {}
    if mismatch:
        data = mismatched(split, answers, seed)
        steps = len(task.batches(split.forget, tuning.batch_size, epochs=tuning.epochs))
        per_epoch = -(-len(data) // tuning.batch_size)
        more["mismatch"] = (task.batches(data, tuning.batch_size, epochs=steps / per_epoch, seed=seed + 2), other)
    return tune(model, task, split, forget, tuning, seed=seed, more=more, until=beyond)
