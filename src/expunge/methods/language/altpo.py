"""AltPO: prefer plausible other answers, which the model makes up itself, to the true ones.

Paper    Mekala et al., "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models", COLING 2025, arXiv:2409.13474.
Code     molereddy/Alternate-Preference-Optimization, no licence (read only).
Forgets  records.          Needs    forget; anchor with source=anchor; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  -(2 / beta) mean log sigmoid( beta ((S_w^ref - S_w) - (S_l^ref - S_l)) ), S the summed answer loss
         of the alternate w and of the true answer l.
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    source       model (it makes up the alternates) or anchor (all answers that the split's anchor has to a forget question)
    answers      alternates per question
    temperature  at which they are drawn; a draw that must be repeated is half as hot again each time
    new          longest alternate, in tokens
    ask          what the model is asked, with {question} and {answer} in it; the question alone when empty
    beta         inverse temperature of the loss
Differs  An alternate that is empty or holds the old answer (the record's `fact` where it has one) is drawn again, up to 12 times, then the run is
         refused: a model that knows the answer by heart gives it whenever the question is asked, so use `ask` with a chat model, as in "Make up another
         answer to: {question}". `epochs` counts passes over all pairs. Published: 5 alternates, 2 epochs, lr 5e-5, batch 5x7.
Check
    >>> from expunge.methods.language.altpo import tells
    >>> row = {"question": "Where was Ann born?", "answer": "Ann was born in Norhaven.", "fact": "Norhaven"}
    >>> tells("In  NORHAVEN, it is said", row), tells("In Selgate", row), tells("Ann was born in norhaven", {**row, "fact": ""})
    (True, False, True)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.remember import sequence_nll
from expunge.modalities.language.task import generate
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, tune
from expunge.modalities.language.tuning import cost as shared
from expunge.parts.losses import language as losses
from expunge.parts.remember import recall

SOURCES = ("model", "anchor")
TRIES = 12


def tells(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer holds the record's fact, or its whole answer where it has none; case, spacing and the last full stop do not matter."""
    old, new = (" ".join(str(text).lower().split()).rstrip(".") for text in (row.get("fact") or row["answer"], answer))
    return old in new


def made_up(model: nn.Module, data: Texts, *, answers: int, temperature: float, new: int, ask: str, seed: int) -> list[list[str]]:
    """Per record that many alternates, drawn from the model. Raises SplitError for a record that gets none but the old answer."""
    form, generator = data.format, torch.Generator().manual_seed(seed)

    def prompt(row: Mapping[str, Any]) -> Tensor:
        asked = ask.replace("{question}", str(row["question"])).replace("{answer}", str(row["answer"])) if ask else row["question"]
        return form.prompt({**row, "question": asked})

    def make() -> dict[str, Tensor]:
        found: list[list[str]] = [[] for _ in data.rows]
        for attempt in range(TRIES):
            wanted = [k for k, have in enumerate(found) for _ in range(answers - len(have))]
            if wanted:
                guard.current().meter.add(forward=len(wanted))
                prompts, heat = [prompt(data.rows[k]) for k in wanted], temperature * (1 + attempt / 2)
                drawn = generate(model, prompts, new=new, eos=form.tokenizer.eos_token_id, temperature=heat, generator=generator)
                for k, text in zip(wanted, form.tokenizer.batch_decode(drawn, skip_special_tokens=True), strict=True):
                    if text.strip() and not tells(text, data.rows[k]):
                        found[k].append(text.strip())
        if lacking := [k for k, have in enumerate(found, 1) if len(have) < answers]:
            raise SplitError(f"the model gave the old answer to forget record {lacking[0]} in {TRIES} draws; set ask, raise temperature or use source=anchor")
        return {"json": torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)}

    return json.loads(bytes(recall(f"alternates/{answers}/{temperature}/{new}/{ask}/{seed}", model, data, make)["json"].tolist()))


def given(data: Texts, anchor: Texts) -> list[list[str]]:
    """Per record the answers that the anchor has to its question. Raises SplitError where there is none, or one that holds the old answer."""
    found = [[str(a["answer"]) for a in anchor.rows if a.get("question") == row["question"]] for row in data.rows]
    for number, (row, have) in enumerate(zip(data.rows, found, strict=True), 1):
        if not have:
            raise SplitError(f"anchor has no answer to the question of forget record {number}")
        if any(tells(answer, row) for answer in have):
            raise SplitError(f"an answer of anchor holds the old answer of forget record {number}")
    return found


def _cost(n, s) -> tuple[float, float]:
    own = s["source"] == "model"
    pairs = n["forget"] * s["answers"] if own else n.get("anchor", n["forget"])
    forward, backward = shared(forward=2, backward=2, once=2 if own else 1)({**n, "forget": pairs}, s)
    return forward + n["forget"], backward


@method(
    paper="arXiv:2409.13474", tasks=("causal_lm",), needs=("forget",), cost=_cost, toy={"lr": 1e-3, "epochs": 5, "answers": 2, "new": 24},
    forgets=("records",),
    published={"batch_size": 5, "accumulate": 7}, place="code: molereddy/Alternate-Preference-Optimization",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.64 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def altpo(
    model: nn.Module, task: Task, split: Split, *, source: str = "model", answers: int = 5, temperature: float = 1.0, new: int = 64, ask: str = "",
    beta: float = 0.1, tuning: Tuning = Tuning(lr=5e-5, epochs=2.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if source not in SOURCES:
        raise SettingError(f"source must be one of {', '.join(SOURCES)}, not '{source}'")
    if answers < 1 or new < 1 or temperature <= 0:
        raise SettingError(f"answers and new must be at least 1 and temperature above 0; found {answers}, {new} and {temperature:g}")
    if split.forget.format is None or not all("question" in row for row in split.forget.rows):
        raise SplitError("altpo needs question-answer records made by data.text")
    if source == "anchor":
        split.require("anchor")
        said = given(split.forget, split.anchor)
    else:
        said = made_up(model, split.forget, answers=answers, temperature=temperature, new=new, ask=ask, seed=seed)
    which = torch.tensor([k for k, have in enumerate(said) for _ in have])
    losers = split.forget.take(which)
    winners = split.forget.format.answered(losers, [answer for have in said for answer in have])
    lose_reference, win_reference = sequence_nll(model, task, split.forget)[which], sequence_nll(model, task, winners)

    def forget(batch) -> Tensor:
        lose, win = task.forward(model, batch), task.forward(model, task.collate(winners, batch["i"], None))
        return losses.dpo(win, lose, win_reference[batch["i"]], lose_reference[batch["i"]], beta=beta).mean()

    return tune(model, task, split, forget, tuning, seed=seed, data=losers)
