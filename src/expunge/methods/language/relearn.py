"""ReLearn: forget by learning other answers, vague ones, to the same questions asked in several ways.

Paper    Xu et al., "ReLearn: Unlearning via Learning for Large Language Models", ACL 2025, arXiv:2502.11190.
Code     zjunlp/unlearn, MIT, commit 0800fd2.
Forgets  records.          Needs    forget; retain unless retain=none; anchor (new answers), or the model writes them itself.
Scope    LoRA, all weights or named layers.   Forget  CE(q, a1') + sum_i CE(q_i, a_i'), q_i variants of the question q, a_i' new answers.
Retain   CE + kl * KL(as it was || now), over the target tokens.   Update  AdamW on paired batches.   Leaves  LowRank or Replace.
Settings
    kl           weight of KL beside the CE on retain data; with retain=kl the retain loss is KL alone
    source       where new answers come from: anchor, self (the model writes variants and answers), or auto (anchor where there is one)
    variants     other ways to ask each question, written when source=self: paraphrased, in a context, with noise, from another side, in turn
    rounds       how often the model is asked again for a text that holds the old answer; then the run is refused
    new          longest text it may write, in tokens
    completions  learn each new answer as a text to be completed too: its first quarter given, the rest trained
Differs  The published gather step keeps the old answer as a positive example and pairs each variant with its neighbour's answer: here every variant keeps its
         own answer, and none may hold the old one, a check on words in place of a language model's yes or no. KL covers answer tokens, where the code has
         all positions, prompts included. No generic questions are mixed in: put them into retain. The code writes with a commercial model; here the
         model itself does (or any: `data.language.rewrite` makes the anchor part), at no disclosure. The variant with DPO is left out.
         Old knowledge may be hidden and not gone: read the attacks that relearn.
Check
    >>> from expunge.data.language.rewrite import scripted
    >>> writer = scripted({ask.format(q="Where?"): f"q{k}" for k, ask in enumerate(ASK, 1)} | {ANSWER.format(q=f"q{k}"): f"a{k}" for k in (1, 2, 3, 4)})
    >>> [(row["question"], row["answer"]) for row in augment([{"question": "Where?", "answer": "Oslo"}], writer, variants=4)]
    [('Where?', 'a1'), ('q1', 'a1'), ('q2', 'a2'), ('q3', 'a3'), ('q4', 'a4')]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.errors import DataError, SettingError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task, concat
from expunge.data.language.answers import drafted, given, remembered, texts
from expunge.data.language.rewrite import Generator, Wanted, local, rewrite
from expunge.modalities.language.remember import top_logits
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.losses.language import pooled, token_kl, top_kl
from expunge.parts.scopes.lora import off

ASK = (
    "Write this question in other words. Reply with the question alone: {q}",
    "Put this question into a small everyday situation. Reply with the question alone: {q}",
    "Write this question as someone would who types in a hurry. Reply with the question alone: {q}",
    "Ask for the same thing from another side. Reply with the question alone: {q}",
)
ANSWER = "Answer in one vague sentence, without any name, place, title, date or number: {q}"


def augment(
    rows: Sequence[Mapping[str, Any]], generator: Generator, *, variants: int = 4, seed: int = 0, rounds: int = 3, path: Path | str | None = None
) -> list[dict[str, Any]]:
    """Records (q, a1'), (q_1, a_1'), ..., (q_n, a_n') for each of `rows`, with the number of their `record`; kept in `path` and a file beside it, if given."""
    if variants < 1:
        raise SettingError(f"variants must be 1 or larger, not {variants}")
    if plain := [k for k, row in enumerate(rows, 1) if "question" not in row]:
        raise DataError(f"record {plain[0]} has no question to ask in other ways; give the new texts as anchor")
    beside = None if path is None else Path(path).with_suffix(".questions.jsonl")
    wanted = [Wanted(ASK[j % len(ASK)].format(q=row["question"]), k, row, {}, "question") for k, row in enumerate(rows) for j in range(variants)]
    asked = rewrite(wanted, generator, beside, seed=seed, rounds=rounds).rows
    answers = [Wanted(ANSWER.format(q=row["question"]), row["record"], rows[row["record"]], {"question": row["question"]}) for row in asked]
    out: list[dict[str, Any]] = []
    for j, row in enumerate(rewrite(answers, generator, path, seed=seed + 1, rounds=rounds).rows):
        pair = {"question": row["question"], "answer": row["answer"], "record": row["record"]}
        out += [pair] if j % variants else [{**pair, "question": rows[row["record"]]["question"]}, pair]
    return out


def completed(data: Texts) -> Texts:
    """The answers as texts to be completed: the first quarter of the words stands before what is trained."""
    cut = [(row, row["answer"].split()) for row in data.rows if len(str(row.get("answer", "")).split()) > 1]
    if not cut:
        return data.take([])
    halves = [{"question": " ".join(w[: max(1, len(w) // 4)]), "answer": " ".join(w[max(1, len(w) // 4) :])} for _, w in cut]
    ids = data.ids[[k for k, row in enumerate(data.rows) if len(str(row.get("answer", "")).split()) > 1]]
    return replace(data.format, template="{question}").texts(halves, ids)


def _cost(n, s) -> tuple[float, float]:
    made, asked = drafted(n, s["source"], 2 * s["variants"])
    records = {**n, "forget": made if not asked else n["forget"] * (s["variants"] + 1)}
    records["forget"] *= 1 + s["completions"]
    forward, backward = cost()(records, s)
    if s["kl"] and s["retain"] == "ce":
        forward += cost(forward=0, backward=0)(records, s)[1] if s["lora"] else n.get("retain", 0)
    return forward + asked, backward


@method(
    paper="arXiv:2502.11190", tasks=("causal_lm",), needs=("forget",), cost=_cost, toy={"lr": 3e-3, "epochs": 10}, forgets=("records",),
    published={"completions": True, "batch_size": 2, "accumulate": 4}, place="code: zjunlp/unlearn, TOFU",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.78 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def relearn(
    model: nn.Module, task: Task, split: Split, *, kl: float = 1.0, source: str = "auto", variants: int = 4, rounds: int = 3, new: int = 64,
    completions: bool = False, tuning: Tuning = Tuning(epochs=2.0, lr=1e-4, lora=32, lora_alpha=32.0, schedule="cosine"), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    data = given(split, source)
    if data is None:
        form = split.forget.format
        writer = local(model, form.tokenizer, template=form.template, system=form.system, new=new)
        made = lambda: augment(split.forget.rows, writer, variants=variants, seed=seed, rounds=rounds)  # noqa: E731
        data = texts(split.forget, remembered(f"relearn/{variants}/{rounds}/{new}/{seed}", model, split.forget, made))
    if completions and len(more := completed(data)):
        data = concat(data, more)

    def forget(batch):
        return pooled((out := task.forward(model, batch)).nll, out, batch)

    keep = _both(model, task, split, tuning, kl) if kl and tuning.retain == "ce" and split.retain is not None else None
    return tune(model, task, split, forget, tuning, seed=seed, data=data, keep=keep)


def _both(model: nn.Module, task: Task, split: Split, tuning: Tuning, kl: float):
    """CE + kl * KL(as it was || now) on a retain batch; the model as it was is the same weights without LoRA, or its kept likeliest tokens."""

    def view(batch):
        with off(model), quiet(model):
            was = task.forward(model, batch).logits.log_softmax(-1)
        out = task.forward(model, batch)
        return pooled(out.nll + kl * token_kl(out, was) * out.count, out, batch)

    def cached(batch):
        out = task.forward(model, batch)
        return pooled(out.nll + kl * top_kl(out, *teacher.at(batch, out)) * out.count, out, batch)

    if tuning.lora:
        return view
    teacher = top_logits(model, task, split.retain, tuning.top)
    return cached
