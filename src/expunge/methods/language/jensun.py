"""JensUn: bring every answer token towards a refusal, and hold retain answers, both by the Jensen-Shannon divergence, which is bounded.

Paper    Singh et al., "Unlearning That Lasts: Utility-Preserving, Robust, and Almost Irreversible Forgetting in LLMs", arXiv:2509.02820.
Code     nmndeep/JensUn-Unlearning, no licence file, commit 9d0cfd5 (read only).
Forgets  records.          Needs    forget; anchor with source=anchor; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  mean over target tokens of JSD( p, onehot(r_t) ), r the refusal's tokens, over and over.
Retain   mean over target tokens of JSD( p_ref, p ).   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    source   refusal (the words of `refusal`) or anchor (the answers of the split's anchor to the same questions)
    refusal  what to say instead
    jsd      the retain loss is JSD to the model as it was, in place of what `retain` says; retain=none still leaves it out
Differs  JSD to a one-hot target depends on p_r alone: ln 2 + (p_r ln p_r - (1 + p_r) ln(1 + p_r)) / 2, at most ln 2. The published clamp of
         probabilities at 1e-9, which stops the gradient there, is not needed. The gradient fades with p_r: a model that gives the refusal no
         chance at all starts slowly. `top` is the number of teacher probabilities kept per retain token, the rest one bin. The published
         training data holds paraphrases too: put them among the forget and retain records.
Check
    >>> import torch; from expunge.modalities.language.task import aligned; from expunge.methods.language.jensun import to_token
    >>> to_token(aligned(torch.zeros(1, 1, 2), torch.tensor([[0]])), torch.tensor([[0]]))
    tensor([0.2158])
    >>> to_token(aligned(torch.tensor([[[100.0, 0.0]]]), torch.tensor([[0]])), torch.tensor([[1]]))      # ln 2
    tensor([0.6931])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task, drawn
from expunge.modalities.language.remember import top_logits
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, retain_batches, tune
from expunge.modalities.language.tuning import cost as shared
from expunge.parts.losses.language import kept, per_sequence, place, pooled

SOURCES = ("refusal", "anchor")


def to_token(out: Out, r: Tensor) -> Tensor:
    """(B,) sums over each sequence of JSD( p, onehot(r_t) ), for tokens r (B, T)."""
    logp = F.log_softmax(out.logits, -1).gather(-1, r[..., None]).squeeze(-1)
    p = logp.exp()
    each = math.log(2) + (p * logp - (1 + p) * torch.log1p(p)) / 2
    return per_sequence(each.masked_fill(~kept(out), 0.0), out, "sum")


def to_teacher(out: Out, index: Tensor, logp: Tensor) -> Tensor:
    """(B,) sums over each sequence of JSD( teacher, p ), for the teacher's k largest log-probabilities (B, T, k) at tokens index; the rest is one bin."""
    mine = F.log_softmax(out.logits, -1).gather(-1, index)
    if index.shape[-1] < out.logits.shape[-1]:
        mine, logp = (torch.cat([v, (1 - v.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()], -1) for v in (mine, logp))
    middle = torch.logaddexp(mine, logp) - math.log(2)
    each = (mine.exp() * (mine - middle) + logp.exp() * (logp - middle)).sum(-1) / 2
    return per_sequence(each.masked_fill(~kept(out), 0.0), out, "sum")


def refusals(data: Texts, said: list[str]) -> list[Tensor]:
    """Per record as many tokens as it has targets: those of its refusal, over and over, without an end token."""
    found = []
    for row, text, targets in zip(data.rows, said, data.targets, strict=True):
        if "question" in row:
            tokens, mask = replace(data.format, mask="answer").encode({**row, "answer": text})
            r = tokens[mask]
        else:
            r = torch.tensor(data.format.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        n = int(targets[1:].sum())
        found.append(r.repeat(-(-n // len(r)))[:n])
    return found


def _cost(n, s) -> tuple[float, float]:
    forward, backward = shared(reference=not s["jsd"])(n, s)
    steps = max(1, round(-(-n["forget"] // s["batch_size"]) * s["epochs"]))
    wants = "retain" in n and s["jsd"] and s["retain"] != "none" and s["alpha"]
    return forward + (min(n["retain"], drawn(n["retain"], s["retain_size"] or s["batch_size"], steps)) if wants else 0), backward


@method(
    paper="arXiv:2509.02820", tasks=("causal_lm",), needs=("forget",), cost=_cost, toy={"lr": 1e-3, "epochs": 10}, forgets=("records",),
    published={"batch_size": 4, "accumulate": 4}, place="code: nmndeep/JensUn-Unlearning (on each of several processes)",
    lacks="on tofu-tiny it costs 0.067 of the probability per token of retain answers, where 0.05 is allowed",
)  # fmt: skip
def jensun(
    model: nn.Module, task: Task, split: Split, *, source: str = "refusal", refusal: str = "No idea", jsd: bool = True,
    tuning: Tuning = Tuning(lr=8e-6, epochs=10.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if source not in SOURCES or not refusal.strip():
        raise SettingError(f"source must be one of {', '.join(SOURCES)} and refusal not empty; found '{source}' and '{refusal}'")
    if split.forget.format is None:
        raise SplitError("forget has no format to make tokens of a refusal with; build the split with data.text")
    said = [refusal.strip()] * len(split.forget)
    if source == "anchor":
        split.require("anchor")
        answers = {str(row.get("question")): str(row["answer"]) for row in split.anchor.rows if "answer" in row}
        if lacking := [k for k, row in enumerate(split.forget.rows, 1) if str(row.get("question")) not in answers]:
            raise SplitError(f"anchor has no answer to the question of forget record {lacking[0]}")
        said = [answers[str(row["question"])] for row in split.forget.rows]
    r = refusals(split.forget, said)

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        return pooled(to_token(out, place(r, batch, out)), out, batch)

    keep: Callable[[Batch], Tensor] | None = None
    if jsd and tuning.retain != "none" and tuning.alpha:
        split.require("retain")
        teacher = top_logits(model, task, split.retain, tuning.top, retain_batches(task, split, tuning, seed).positions())

        def held(batch: Batch) -> Tensor:
            out = task.forward(model, batch)
            return pooled(to_teacher(out, *teacher.at(batch, out)), out, batch)

        keep = held

    return tune(model, task, split, forget, tuning, seed=seed, keep=keep)
