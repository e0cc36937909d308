"""Memorisation of texts: extraction strength, exact and verbatim memorisation, MA and EL_n.

Sources: cards llm-ga (MA, EL; Jang et al., arXiv 2210.01504) and muse (VerbMem). T is the number of target tokens, the end token included.

    exact memorisation     share of target tokens that greedy decoding would say, each given the true text before it; MA where every token is a target
    extraction strength    1 - k / T, k the smallest prefix of the targets after which greedy decoding says all the rest; 0 where it misses the last token
    MA, EL_n               of whole texts, first token left out: `expunge.modalities.language.memorise`
    verbatim               ROUGE-L F1 of the greedy continuation of a passage against its true one
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.language.text import share
from expunge.audits.language.tokens import TokenScores, part, seen
from expunge.audits.unseen import compared, same_form
from expunge.core.registry import check
from expunge.modalities.language.memorise import full
from expunge.modalities.language.memorise import memorised as ma_el
from expunge.modalities.language.records.measures import rouge
from expunge.modalities.language.task import generate
from expunge.modalities.language.texts import Texts


def extraction_strength(hit: Sequence[Tensor]) -> Tensor:
    """(N,) 1 - k / T of N bool vectors (T_i,).

    >>> extraction_strength([torch.tensor([True, False, True, True]), torch.tensor([True, False])]).tolist()
    [0.5, 0.0]
    """
    return torch.tensor([1 - (int((~h).nonzero().max()) + 1 if not bool(h.all()) else 0) / len(h) for h in hit])


def exact_memorisation(hit: Sequence[Tensor]) -> Tensor:
    """(N,) share of True."""
    return torch.stack([h.float().mean() for h in hit])


def verbatim(model: nn.Module, data: Texts, *, new: int = 128) -> Tensor:
    """(N,) ROUGE-L F1, stemmer off, of the greedy continuation of each row's prompt against what really follows: as many tokens of both, at most `new`.

    The prompt of a passage is its first half; that of a question, the question as the format writes it, and what follows is the answer.
    """
    tokenizer = data.format.tokenizer
    prompts = [data.format.prompt(row) for row in data.rows]
    rest = [
        tokenizer(str(row["answer"]), add_special_tokens=False)["input_ids"] if "question" in row else t[len(q) :].tolist()
        for row, t, q in zip(data.rows, data.tokens, prompts, strict=True)
    ]
    longest = min(new, max(map(len, rest)))
    found = generate(model, prompts, new=longest, eos=tokenizer.eos_token_id)
    decode = lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True)  # noqa: E731
    return rouge(decode([r[:new] for r in rest]), decode([f[: max(1, len(r))] for f, r in zip(found, rest, strict=True)]), stem=False)[1]


MOST = 40
"""Most texts of a part whose EL is measured: it costs a generation for each token that is missed."""

N = 10
"""Length of the n-grams of EL."""

MEASURES = {"extraction_strength": extraction_strength, "exact": exact_memorisation}


@check(tasks=("causal_lm",), needs=("forget",))
def memorised(p: Probe) -> list[Row]:
    """memorised.extraction_strength.forget and .retain, memorised.exact.forget and .retain: means over rows, from one pass.

    With retrained models, .excess: minus their mean on the same forget rows. Even a model that never saw a text says many of its tokens, so that 0 is no goal;
    without retrained models .forget is indicative for that reason, and memorised.unseen.auc and .p compare extraction strength with that of unseen texts
    (`audits.unseen`).
    """

    def values(model: nn.Module, name: str) -> dict[str, Tensor]:
        s: TokenScores = seen(p, model, name)
        return {k: f(s.hit) for k, f in MEASURES.items()}

    rows = []
    for name in ("forget", "retain"):
        if part(p, name) is not None:
            alone = name == "forget" and not p.references
            rows += [share(f"memorised.{k}.{name}", v, p.seed, "greedy, teacher-forced", indicative=alone) for k, v in values(p.after, name).items()]
    if (u := same_form(p)) is not None and part(p, "unseen") is not None:
        mine, theirs = (values(p.after, name)["extraction_strength"] for name in ("forget", "unseen"))
        rows += compared(p, u, "memorised.unseen", -mine, -theirs)
    if p.references:
        mine, rest = values(p.after, "forget"), [values(r, "forget") for r in p.references]
        note = f"on forget, minus the mean of {len(rest)} retrained models"
        rows += [paired(f"memorised.{k}.excess", mine[k] - torch.stack([r[k] for r in rest]).mean(0), note) for k in MEASURES]
    return rows


@check(tasks=("causal_lm",), needs=("forget",), slow=True)
def extraction_likelihood(p: Probe) -> list[Row]:
    """memorised.ma.<part> and memorised.el.<part> of whole texts (EL over 10-grams) on forget and, for comparison, on unseen texts of at most 40 each.

    The card stops forgetting when both are below what the model before says of unseen text; gibberish gets there too: read them with the utility.
    """
    rows = []
    for name in ("forget", "unseen"):
        data = part(p, name)
        if data is None:
            continue
        some = full(data.take(range(min(MOST, len(data)))))
        ma, el = p.once(("ma_el", name, p.seed), p.after, lambda some=some: ma_el(p.after, p.task, some, N))
        rows += [share(f"memorised.ma.{name}", ma, p.seed, "whole texts"), share(f"memorised.el.{name}", el, p.seed, f"whole texts, n = {N}")]
    return rows
