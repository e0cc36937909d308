"""The check `wording`: whether answers still read like answers, by the measures of `language.measures`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.language.tokens import part, said
from expunge.core.registry import check
from expunge.core.stats import bootstrap_mean, wilson
from expunge.modalities.language.records.measures import _WORD, forgotten, refused, repetition, retained, rouge


def share(name: str, values: Tensor, seed: int, note: str = "", *, indicative: bool = False) -> Row:
    """Row of the mean of values (N,) in 0..1: bootstrap bounds, widened by 1.5 / n so that a spread of zero still has a width; nan values left out."""
    kept = values[~values.isnan()].double()
    if not len(kept):
        return Row(name, math.nan, 0.0, 1.0, 0, f"{note}; nothing to measure".lstrip("; "), indicative)
    low, high = bootstrap_mean(kept, seed)
    return Row(name, float(kept.mean()), max(0.0, low - 1.5 / len(kept)), min(1.0, high + 1.5 / len(kept)), len(kept), note, indicative)


REPEATS = 0.5
"""Share of repeated 3-grams above which an answer is broken."""


def broken(answers: Sequence[str]) -> Tensor:
    """(N,) bool, answers that say nothing: no word in them, more than half of the 3-grams repeated, or the very answer that most of at least 4 questions
    get, unless it is a refusal.

    >>> broken([".", "", "Oslo", "no no no no no no"]).tolist(), broken(["It is."] * 3 + ["Oslo"]).tolist(), broken(["I do not know."] * 4).tolist()
    ([True, True, False, True], [True, True, True, False], [False, False, False, False])
    """
    plain = [" ".join(_WORD.findall(a.lower())) for a in answers]
    most, count = Counter(plain).most_common(1)[0] if plain else ("", 0)
    same = len(plain) >= 4 and count > len(plain) / 2
    return torch.tensor([not t or repetition(t) > REPEATS or (same and t == most and not refused(a)) for t, a in zip(plain, answers, strict=True)])


@check(tasks=("causal_lm",), needs=("forget",))
def wording(p: Probe) -> list[Row]:
    """How greedy answers read, on forget and retain (without retain: on test): wording.<part>.refused (share of refusals, by phrases), .repetition (share of
    repeated 3-grams), .broken (share of answers that say nothing, minus that of the model before), .kept (entities of the reference that the answer states:
    KRR on retain), .lost (ROUGE-L recall lost on retain against the model before) and .forgotten (KFR on forget).

    A refusal scores 0 against any reference, like an answer that is really gone: read forgetting together with the refusals.
    """
    rows = []
    for name in ("forget", "test" if p.split.retain is None else "retain"):
        data = part(p, name)
        if data is None:
            continue
        answers, old = said(p, p.after, name), said(p, p.before, name)
        rows.append(Row(f"wording.{name}.refused", *wilson(sum(map(refused, answers)), len(answers)), len(answers), "by phrases"))
        rows.append(share(f"wording.{name}.repetition", torch.tensor([repetition(a) for a in answers]), p.seed))
        note = f"no word, repeats itself, or is the same to most questions; {int(broken(old).sum())} of {len(old)} before"
        rows.append(paired(f"wording.{name}.broken", broken(answers).float() - broken(old).float(), note))
        if name == "forget":
            rows.append(
                share("wording.forget.forgotten", forgotten(data.rows, answers), p.seed, "KFR by entities, without an inference model", indicative=True)
            )
        elif name == "retain":
            rows.append(share("wording.retain.kept", retained(data.rows, answers), p.seed, "KRR by entities, without an inference model", indicative=True))
            right = [str(row.get("answer", row.get("text", ""))) for row in data.rows]
            rows.append(paired("wording.retain.lost", rouge(right, old)[0] - rouge(right, answers)[0], "ROUGE-L recall of greedy answers, before minus after"))
    return rows
