"""MUSE, the six-way audit, on text of one's own. Source: card muse (Shi et al., arXiv 2407.06460).

    1 VerbMem      ROUGE-L F1 of the continuation of forget passages (lower is better)          `memorisation.verbatim`
    2 KnowMem      ROUGE-L F1 of answers on forget (lower is better)                             4 the same on retain: utility
    3 PrivLeak     100 (AUC - AUC_retrain) / AUC_retrain, AUC = P(s_forget > s_holdout), s = -mean of the 40 % lowest log p (0 is ideal)
    5 scalability  the rows again for requests of growing size, each from the original model      `scalability`
    6 sustainability  the k-th request on the model that request k - 1 left                       `sustainability`

Differs
    Min-K       max(1, int(0.4 T)) tokens; the published int(0.4 T) is 0 for texts of one or two, whose mean is nan
    PrivLeak    without a retrained model its AUC is assumed to be 0.5, and the note says so
    scale       ROUGE in 0..1, not in percent; PrivLeak as published
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.language.memorisation import verbatim
from expunge.audits.language.text import share
from expunge.audits.language.text_membership import lowest
from expunge.audits.language.tokens import part, token_scores
from expunge.core.errors import SplitError
from expunge.core.registry import check
from expunge.core.stats import above, auc
from expunge.core.types import Split, Task
from expunge.modalities.language.memorise import full
from expunge.modalities.language.records.format import PLAIN
from expunge.modalities.language.records.measures import rouge
from expunge.modalities.language.task import generate
from expunge.modalities.language.texts import Texts

STOPS = ("\n\n", "\nQuestion", "Question:")
ASSUMED = 0.5
SHARE = 0.4
T = TypeVar("T")


def knowledge(model: nn.Module, data: Texts, *, shots: Sequence[Mapping[str, Any]] = (), new: int = 32) -> tuple[Tensor, list[str]]:
    """(N,) ROUGE-L F1, stemmer off, of greedy answers of at most `new` tokens, cut where a new question starts; and the answers.

    shots   records shown before each question, as blocks of Question and Answer (left out of chat templates)
    """
    form = data.format
    if shots and form.template != "chat":
        blocks = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        form = replace(form, template=blocks + (PLAIN if form.template == "plain" else form.template))
    tokenizer = form.tokenizer
    found = tokenizer.batch_decode(generate(model, [form.prompt(row) for row in data.rows], new=new, eos=tokenizer.eos_token_id), skip_special_tokens=True)
    answers = [cut(text).strip() for text in found]
    return rouge([str(row["answer"]) for row in data.rows], answers, stem=False)[1], answers


def cut(text: str) -> str:
    """The text up to the first sign of a new question.

    >>> cut(" Oslo\\n\\nQuestion: What"), cut(" Oslo Question: What")
    (' Oslo', ' Oslo ')
    """
    return text[: min((at for s in STOPS if (at := text.find(s)) >= 0), default=len(text))]


def surprise(model: nn.Module, task: Task, data: Texts) -> Tensor:
    """(N,) s = -mean of the 40 % lowest log p over the whole text, first token left out."""
    return -lowest(token_scores(model, task, full(data)).logp, SHARE)


def privleak(value: float, retrain: float = ASSUMED) -> float:
    """100 (AUC - AUC_retrain) / AUC_retrain, nan where AUC_retrain is 0. Negative: still remembered; positive: forgotten suspiciously well.

    >>> import torch
    >>> s_forget, s_holdout = torch.tensor([1.0, 1.2, 1.4]), torch.tensor([1.3, 2.0, 2.2])
    >>> a = auc(s_forget, s_holdout)[0]
    >>> round(a, 4), round(privleak(a, 0.4772), 3), round(privleak(a), 3)
    (0.1111, -76.716, -77.778)
    """
    return 100 * (value - retrain) / retrain if retrain > 0 else math.nan


def leak_row(mine: tuple[Tensor, Tensor], rest: Sequence[tuple[Tensor, Tensor]]) -> Row:
    """muse.privleak of (forget, holdout) surprises, against the mean AUC of retrained models or the assumed 0.5."""
    value = auc(*mine)
    others = [auc(*r) for r in rest] or [(ASSUMED, ASSUMED, ASSUMED)]
    retrain = sum(r[0] for r in others) / len(others)
    n = len(mine[0]) + len(mine[1])
    note = f"AUC {value[0]:.3f} against {retrain:.3f} of {len(rest)} retrained models" if rest else f"AUC {value[0]:.3f}; AUC of retraining assumed 0.5"
    if retrain <= 0:
        return Row("muse.privleak", math.nan, -math.inf, math.inf, n, f"{note}: nothing to divide by", True)
    centre, low, high = (100 * b / retrain for b in above(value, others))
    return Row("muse.privleak", centre, low, high, n, note, True)


@check(tasks=("causal_lm",), needs=("forget",))
def muse(p: Probe) -> list[Row]:
    """muse.verbmem.forget, muse.knowmem.forget, muse.knowmem.retain (utility) in 0..1, and muse.privleak (as published, 0 is ideal; forget against unseen
    texts). KnowMem reads rows with a question, without examples in the prompt. Criteria 5 and 6 are drivers: `muse.scalability`, `muse.sustainability`.
    """
    rows = [share("muse.verbmem.forget", verbatim(p.after, part(p, "forget")), p.seed, "at most 128 tokens, ROUGE-L F1")]
    for name in ("forget", "retain"):
        data = part(p, name)
        index = [] if data is None else [k for k, row in enumerate(data.rows) if "question" in row]
        if index:
            rows.append(share(f"muse.knowmem.{name}", knowledge(p.after, data.take(index))[0], p.seed, "32 tokens, no examples, ROUGE-L F1"))
    if part(p, "unseen") is not None:

        def sides(model: nn.Module) -> tuple[Tensor, Tensor]:
            a, b = (p.once(("surprise", name), model, lambda n=name: surprise(model, p.task, part(p, n))) for name in ("forget", "unseen"))
            return a, b

        rows.append(leak_row(sides(p.after), [sides(r) for r in p.references]))
    return rows


def scalability(run: Callable[[Split], Sequence[Row]], splits: Sequence[Split]) -> list[Row]:
    """Rows of `run(split)`, which starts from the original model each time, as scalability.<forget rows>.<row>; every request must hold the one before.

    Raises SplitError where one does not.
    """
    for a, b in itertools.pairwise(splits):
        if not set(a.forget.keys) < set(b.forget.keys):
            raise SplitError(f"scalability needs growing requests: that of {len(b.forget)} rows does not hold the one of {len(a.forget)}")
    return [replace(row, name=f"scalability.{len(s.forget)}.{row.name}") for s in splits for row in run(s)]


def sustainability(run: Callable[[T, Split], tuple[T, Sequence[Row]]], splits: Sequence[Split], start: T) -> tuple[T, list[Row]]:
    """Requests one after another: `run(state, split)` gives the state that the next one starts from, and rows, here sustainability.<k>.<row>, k = 1, 2, ...

    Returns the last state and all rows. Raises SplitError for requests that share rows.
    """
    gone: set[bytes] = set()
    for k, s in enumerate(splits, 1):
        if shared := gone & set(s.forget.keys):
            raise SplitError(f"sustainability needs disjoint requests: {len(shared)} row(s) of request {k} were asked for before")
        gone |= set(s.forget.keys)
    state, rows = start, []
    for k, s in enumerate(splits, 1):
        state, found = run(state, s)
        rows += [replace(row, name=f"sustainability.{k}.{row.name}") for row in found]
    return state, rows
