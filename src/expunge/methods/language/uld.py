"""ULD: a small assistant learns what must be forgotten and nothing else, and its logits are subtracted when the model answers.

Paper    Ji et al., "Reversing the Forget-Retain Objectives: An Efficient LLM Unlearning Framework from Logit Difference", NeurIPS 2024, arXiv:2406.08607.
Code     UCSB-NLP-Chang/ULD, MIT, commit 858608c.
Forgets  records.          Needs    forget; retain helps.
Scope    LoRA in the model's own first blocks, with its embedding, last norm and head frozen.   Forget  reversed: CE of the true answers.
Retain   uniform * KL(uniform || p) on retain answers and on wrong answers.   Update  AdamW, a batch of each per step.
Leaves   Hook: z = z_base + weight * z_assist where the base finds a token plausible (a suppression: the weights still hold what they knew).
Settings
    blocks    decoder blocks of the assistant; 0 means a quarter of the model's (8 of 32)
    uniform   weight of KL(uniform || p)
    weight    w < 0, how much of the assistant's logits is added
    share     of the filter: a token is plausible when it is among the best of this share of the vocabulary, or at least this share as likely as the
              likeliest; 0 is no filter
    filtered  logits of tokens that are not plausible: keep them, or drop them by 1e3 (then they are never said, and cost 1e3 when scored)
    centred   add log p_assist + log V, which is 0 for an assistant that knows nothing, in place of its raw logits
Differs  The published code averages KL over prompt and padding too, as softmax().log(), which can be -inf; here over answer tokens, by log_softmax.
         With a filter, raw logits are added to some tokens and not to others, though their level is arbitrary; `centred` is without that flaw.
         The code drops filtered tokens when it generates and keeps them when it scores; one guard serves both here. Paraphrases and wrong answers come
         from the records, as `paraphrased_question`, `paraphrased_answer` and `perturbed_answer`; without the last, answers to other questions are the
         wrong ones. Batches of both kinds make one step, where the code takes turns. The paper picks the epoch by the test's forget quality; here the
         last one. Rank 16 as in the released settings (32 in the paper), no dropout.
Check
    >>> import torch; from expunge.core.types import Out
    >>> out = Out(torch.zeros(1), torch.ones(1), torch.tensor([[[0.5, 0.25, 0.25]]]).log(), torch.tensor([[0]]))
    >>> round(float(uniform_kl(out)), 6)
    0.056633
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook
from expunge.core.errors import DataError, SettingError
from expunge.core.hooks import bare
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Out, Split, Task, concat, drawn
from expunge.data.language.wrong import wrong_answers
from expunge.modalities.language.guards.offset import FILTERED, truncated
from expunge.modalities.language.task import blocks as decoder
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, aside, tune
from expunge.parts.adapters import stored
from expunge.parts.losses.language import kept, per_sequence, pooled

MOST = 400
"""Most retain records that the assistant is kept ignorant of."""


def _cost(n, s) -> tuple[float, float]:
    size = s["batch_size"]
    steps = max(1, round(-(-3 * n["forget"] // size) * s["epochs"]))
    other = n["forget"] + min(n.get("retain", 0), n["forget"], MOST)
    total = drawn(3 * n["forget"], size, steps) + drawn(other, size, steps)
    return total, total


@method(
    paper="arXiv:2406.08607", tasks=("causal_lm",), needs=("forget",), cost=_cost, toy={"lr": 1e-2, "epochs": 20, "batch_size": 8, "blocks": 2, "uniform": 1.0},
    forgets=("records",), assurance="suppression",
    published={"batch_size": 32, "lora": 32}, place="the paper's text; the released TOFU configuration has rank 16 and batches of 16",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.83 of its critical value, a second gold model's 0.50 (seed 0 alone)",
)  # fmt: skip
def uld(
    model: nn.Module, task: Task, split: Split, *, blocks: int = 0, uniform: float = 5.0, weight: float = -0.8, share: float = 0.01, filtered: str = "keep",
    centred: bool = False, tuning: Tuning = Tuning(epochs=10.0, lr=1e-3, batch_size=16, lora=16, lora_alpha=32.0, retain="none"), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    count = len(decoder(model))
    blocks = blocks or max(1, count // 4)
    if not 1 <= blocks <= count:
        raise SettingError(f"blocks must be in 0..{count}, the model's decoder blocks, not {blocks}")
    if filtered not in FILTERED or not 0 <= share < 1 or not weight < 0:
        raise SettingError(f"filtered must be one of {', '.join(FILTERED)}, share in 0..1 and weight below 0; found {filtered}, {share:g}, {weight:g}")
    if not tuning.lora or tuning.retain != "none":
        raise SettingError(f"uld trains LoRA alone, held by `uniform`: lora must be 1 or larger and retain none, not {tuning.lora} and {tuning.retain}")
    known, unknown = true_answers(split.forget), others(split, seed)
    more: dict[str, Any] = {}
    if unknown is not None and uniform:
        steps = len(task.batches(known, tuning.batch_size, epochs=tuning.epochs))
        per_epoch = -(-len(unknown) // tuning.batch_size)
        stream = task.batches(unknown, tuning.batch_size, epochs=steps / per_epoch, seed=seed + 1)
        more["uniform"] = (stream, lambda batch: uniform * pooled(uniform_kl(out := task.forward(model, batch)) * out.count, out, batch))
    with bare(model), truncated(model, blocks):
        patch = tune(
            model,
            task,
            split,
            lambda batch: pooled((out := task.forward(model, batch)).nll, out, batch),
            tuning,
            seed=seed,
            data=known,
            more=more,
            session=aside(model, tuning),
        )
    tensors, scale = stored(patch)
    if not tensors:
        return patch
    config = {"blocks": blocks, "weight": weight, "share": share, "filtered": filtered, "centred": centred, "scale": scale}
    return Patch((Hook(f"uld-{split.forget.digest[:8]}", "offset", tensors, config),))


def uniform_kl(out: Out) -> Tensor:
    """(B,) mean over the target tokens of KL( uniform || p ) = -log V - mean_v log p_v."""
    each = -math.log(out.logits.shape[-1]) - out.logits.log_softmax(-1).mean(-1)
    return per_sequence(each.masked_fill(~kept(out), 0.0), out)


def true_answers(data: Texts) -> Texts:
    """The records, and each again with its paraphrased question and with its paraphrased answer where it has them. Ids are those of the records."""
    parts = [data]
    for key, field in (("paraphrased_question", "question"), ("paraphrased_answer", "answer")):
        have = [k for k, row in enumerate(data.rows) if row.get(key)]
        if have:
            rows = [{**data.rows[k], field: data.rows[k][key]} for k in have]
            parts.append(data.format.texts(rows, data.ids[have]))
    return concat(*parts)


def others(split: Split, seed: int) -> Texts | None:
    """What the assistant must not know: wrong answers to the forget questions, and as many retain records, drawn by seed; None when there is neither."""
    forget, parts = split.forget, []
    retain = split.retain
    with contextlib.suppress(DataError):
        parts.append(forget.format.answered(forget, wrong_answers(forget.rows, seed=seed, others=() if retain is None else retain.rows)))
    if retain is not None:
        order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
        parts.append(retain.take(order[: min(len(forget), MOST)]))
    return concat(*parts) if parts else None
