"""UnStar: ask the model; where it still answers, train it on a misleading rationale for a wrong answer, or on a refusal; ask again.

Paper    Sinha et al., "UnStar: Unlearning with Self-Taught Anti-Sample Reasoning for LLMs", TMLR 2025, arXiv:2410.17050.
Code     MachineUnlearn/UnStar, no licence, commit fbec97e (read only).
Forgets  records (questions with an answer).          Needs    forget; anchor (new answers), or the model writes them itself.
Scope    one LoRA (or all weights, or named layers), trained on and on.   Forget  CE(r | q) for each question q that is still answered, r the anti-sample.
Retain   none as published; ce or kl.   Update  rounds of: ask, write, AdamW on all anti-samples so far.   Leaves  LowRank or Replace.
Settings
    source     where new answers come from: anchor, self (the model writes), or auto (anchor where there is one)
    target     of source=self: rationale (misleading: the model learns to state falsehoods) or refusal
    questions  ways in which each question is asked in a round, new ones each round (by forms, or by the model where it writes rationales); the first round
               has the question itself too
    rounds     most rounds; it ends before when nothing is answered any more
    least      rounds that train on every question, answered or not; 0 as published, where a matcher that misses what the model knows ends the run at once
    tries      how often the model is asked again for a text that holds the right answer
    new        longest text, in tokens
Differs  MISINFORMATION: with target=rationale the model is taught false statements, with reasons. That is not the state of a model that never saw the
         facts: use refusal, or anchors of your own, for anything that will be served.
         Known means here: the reply holds the fact, or words like it (ratio above 0.8); WordNet and sentence embeddings are left out. The published
         code merges LoRA into 4-bit weights in each round: here one LoRA is trained over the growing set and merged once. It trains on
         prompts too, and reads the questions it trains on to decide when to stop: here each round asks in new ways. Replies are greedy, what is written is
         drawn with the seed. The declared cost is that of all rounds.
Check
    >>> known("He went to hogwart school", {"fact": "Hogwarts"}), known("He studied at Ilvermorny", {"fact": "Hogwarts"})
    (True, False)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import nn

from expunge.core import guard
from expunge.core.errors import DataError, SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.data.language.answers import given, holds, texts, words
from expunge.data.language.rewrite import Generator, Wanted, local, vague, variants, written
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, opened, tune
from expunge.parts.losses.language import pooled
from expunge.parts.scopes.lora import off

TARGETS = ("rationale", "refusal")
LIKE = 0.8
"""Ratio of matching characters above which words count as the fact's."""

AGAIN = "Write this question in other words. Reply with the question alone: {q}"
WRONG = "Name a wrong but plausible answer to this question. Reply with the answer alone: {q}"
RATIONALE = "Explain in two sentences why the answer to the question is {wrong}, as if it were true. Do not name any other answer. Question: {q}"

Asked = tuple[int, str]
"""Number of a record, and a question on it."""


def known(reply: str, row: Mapping[str, Any]) -> bool:
    """Whether the reply holds the old answer, or as many words in a row as the fact has that are like it."""
    if holds(reply, row):
        return True
    fact, have = words(str(row.get("fact") or row.get("answer", ""))), words(reply)
    runs = (" ".join(have[k : k + len(fact)]) for k in range(len(have) - len(fact) + 1))
    return bool(fact) and any(SequenceMatcher(None, run, " ".join(fact), autojunk=False).ratio() > LIKE for run in runs)


def loop(
    rows: Sequence[Mapping[str, Any]], ask: Callable[[int], Sequence[Asked]], answer: Callable[[list[str]], list[str]],
    write: Callable[[list[Asked], int], list[str | None]], train: Callable[[list[dict[str, Any]], int], None], *, rounds: int, least: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """All anti-samples {question, answer, record}, after as many rounds as were needed.

    ask     round -> questions         answer  questions -> the model's replies
    write   (questions still answered, round) -> an anti-sample for each, or None     train   (all anti-samples so far, round)
    """
    found: list[dict[str, Any]] = []
    for k in range(rounds):
        asked = list(ask(k))
        left = asked
        if k >= least:
            left = [pair for pair, reply in zip(asked, answer([q for _, q in asked]), strict=True) if known(reply, rows[pair[0]])]
        if not left:
            break
        new = [{"question": q, "answer": text, "record": r} for (r, q), text in zip(left, write(left, k), strict=True) if text is not None]
        found += new
        if found:
            train(found, k)
        if guard.current().stopped:
            break
    return found


def rationales(rows: Sequence[Mapping[str, Any]], asked: Sequence[Asked], generator: Generator, *, seed: int, tries: int) -> list[str | None]:
    """For each question a text that argues for a wrong answer, None where every one held the right answer. Wrong answers: the record's
    `perturbed_answer`, else the generator's own."""

    def wanted(template: str, **more: Sequence[str]) -> list[Wanted]:
        return [Wanted(template.format(q=q, **{n: v[j] for n, v in more.items()}), r, rows[r], {}) for j, (r, q) in enumerate(asked)]

    wrong = [str((rows[r].get("perturbed_answer") or [""])[j % max(1, len(rows[r].get("perturbed_answer") or [""]))]) for j, (r, _) in enumerate(asked)]
    if not all(wrong):
        said, _ = written(wanted(WRONG), generator, seed=seed, rounds=tries)
        wrong = [mine or other or "something else" for mine, other in zip(wrong, said, strict=True)]
    return written(wanted(RATIONALE, wrong=wrong), generator, seed=seed + 1, rounds=tries)[0]


def _cost(n, s) -> tuple[float, float]:
    forward = backward = 0.0
    for k in range(s["rounds"]):
        asked = n["forget"] * (s["questions"] + 1)
        f, b = cost()({**n, "forget": asked * (k + 1)}, s)
        writes = 0 if s["source"] != "self" and "anchor" in n else 2 if s["target"] == "rationale" else 1
        forward, backward = forward + f + asked * ((k >= s["least"]) + writes), backward + b
    return forward, backward


@method(
    paper="arXiv:2410.17050", tasks=("causal_lm",), needs=("forget",), cost=_cost, toy={"lr": 3e-3, "epochs": 5, "retain": "ce"}, forgets=("records",),
    published={"questions": 20, "least": 0}, place="code: MachineUnlearn/UnStar; those of its LoRA are from memory, unverified",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.83 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def unstar(
    model: nn.Module, task: Task, split: Split, *, source: str = "auto", target: str = "rationale", questions: int = 4, rounds: int = 3, least: int = 1,
    tries: int = 3, new: int = 48, tuning: Tuning = Tuning(epochs=4.0, batch_size=4, lora=8, retain="none"), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if target not in TARGETS:
        raise SettingError(f"target must be one of {', '.join(TARGETS)}, not '{target}'")
    if questions < 1 or rounds < 1 or not 0 <= least <= rounds:
        raise SettingError(f"questions and rounds must be 1 or larger and least in 0..rounds; found {questions}, {rounds} and {least}")
    rows, form = split.forget.rows, split.forget.format
    if plain := [k for k, row in enumerate(rows, 1) if "question" not in row]:
        raise DataError(f"record {plain[0]} has no question to ask")
    anchor = given(split, source)
    texts_of = {} if anchor is None else _by_record(split, anchor)
    if lacking := [k for k in range(len(rows)) if anchor is not None and not texts_of.get(k)]:
        raise DataError(f"anchor has no new answer for record {lacking[0] + 1}")

    def teller(temperature: float) -> Generator:
        return local(model, form.tokenizer, template=form.template, system=form.system, new=new, temperature=temperature)

    def ask(k: int) -> list[Asked]:
        plain = [(r, q) for r, row in enumerate(rows) for q in variants(str(row["question"]), questions, start=k * questions, seed=seed)]
        if anchor is None and target == "rationale":
            wanted = [Wanted(AGAIN.format(q=rows[r]["question"]), r, rows[r], {}) for r, _ in plain]
            with off(model):
                said, _ = written(wanted, teller(1.3 * (k + 1) / rounds), seed=seed + 10 * k, rounds=tries)
            plain = [(r, text or q) for (r, q), text in zip(plain, said, strict=True)]
        return [(r, str(row["question"])) for r, row in enumerate(rows) if k == 0] + plain

    def answer(asked: list[str]) -> list[str]:
        return teller(0.0).ask(asked, 0)

    def write(asked: list[Asked], k: int) -> list[str | None]:
        if anchor is not None:
            return [texts_of[r][j % len(texts_of[r])] for j, (r, _) in enumerate(asked)]
        if target == "refusal":
            return written([Wanted(q, r, rows[r], {}) for r, q in asked], vague(), seed=seed + k, rounds=tries)[0]
        with off(model):
            return rationales(rows, asked, teller(0.7), seed=seed + 10 * k + 5, tries=tries)

    with opened(model, tuning) as e:

        def train(found: list[dict[str, Any]], k: int) -> None:
            data = texts(split.forget, found)

            def forget(batch):
                return pooled((out := task.forward(model, batch)).nll, out, batch)

            tune(model, task, split, forget, tuning, seed=seed + k, data=data, session=contextlib.nullcontext(e))

        loop(rows, ask, answer, write, train, rounds=rounds, least=least)
    return e.patch


def _by_record(split: Split, anchor: Texts) -> dict[int, list[str]]:
    """Record number -> its new answers."""
    place, found = split.forget.ids.tolist(), {}
    for i, row in zip(anchor.ids.tolist(), anchor.rows, strict=True):
        if row.get("answer"):
            found.setdefault(place.index(i), []).append(str(row["answer"]))
    return found
