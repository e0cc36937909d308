"""Measures of text alone: ROUGE-L, n-gram entropy, repetition, refusals, fact spans, linguistic score, entity similarity (KFR and KRR).

Sources: cards tofu and muse (ROUGE-L recall and F1), rwku (entropy, refusals apart from forgetting), knowundo (fact span), relearn (LS, KFR, KRR).

Differs
    entropy    words are runs of letters and digits, and single marks; the published code uses the nltk word tokenizer
    KFR, KRR   entities are the record's own (`entities`, `fact`) or capitalised words and numbers of the answer, compared by their words; the published
               code asks a language model for them, and an inference model whether the answer contradicts the reference. The latter half is a given (N,)
               `contradicts`, left out where none is given: a contradiction with the right names then counts as known. The thresholds are ours
    refusals   word lists; a refusal in other words, or in another language, is not seen
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import SettingError

SELF = r"\b(?:i|i'm|i've|i'd|i'll|me|my|as an ai)\b"
"""Who declines: the first person."""


LACK = (
    r"n't\b|\bcannot\b|\bnot\b|\bno\b|\bnever\b|\bnothing\b|\bwithout\b|\byet to\b|\bun(?:able|sure|aware|certain|familiar|known|charted|informed|clear)\b|"
    r"\b(?:sorry|afraid|apologi[sz]e|apologies|decline|refuse|lack|lacking|beyond|outside|out of|missing|limited|mystery|clueless|stumped|puzzled|baffled|"
    r"come up short|blind spot|blank|dark|disadvantage|at a loss|look (?:that |it )?up|beats)\b"
)
"""That something is wanting."""


_WORD, _MARK = re.compile(r"\w+(?:'\w+)?"), re.compile(r"\w+|[^\w\s]")


_NAME = re.compile(r"(?:[A-Z][\w'-]*|\d[\w,.]*\w|\d)(?:\s+(?:[A-Z][\w'-]*|\d[\w,.]*\w|\d))*")


def rouge(references: Sequence[str], answers: Sequence[str], *, stem: bool = True) -> tuple[Tensor, Tensor]:
    """ROUGE-L recall (N,) and F1 (N,) of answers against references, float64. `stem` turns the Porter stemmer on (TOFU) or off (MUSE).

    >>> [round(float(v), 6) for v in rouge(["the cat sat on the mat"], ["the cat is on mat"], stem=False)]
    [0.666667, 0.727273]
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise SettingError("ROUGE needs the library rouge-score: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    found = [scorer.score(r, a)["rougeL"] for r, a in zip(references, answers, strict=True)]
    return torch.tensor([f.recall for f in found], dtype=torch.double), torch.tensor([f.fmeasure for f in found], dtype=torch.double)


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple]:
    """All n-grams in order, with repeats."""
    return [tuple(items[k : k + n]) for k in range(len(items) - n + 1)]


def entropy(items: Sequence[Hashable], n: int) -> float:
    """H_n in bits of the n-grams' frequencies; 0 where there is none."""
    counts = Counter(ngrams(items, n))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def fluency(text: str) -> float:
    """(2/3 H_2 + 4/3 H_3) / 2: low where a text repeats itself, but high for word salad as well. Card rwku, Flu (its table shows 100 times this).

    >>> round(fluency("a b a b a"), 6)
    0.945531
    """
    words = _MARK.findall(text)
    return (2 / 3 * entropy(words, 2) + 4 / 3 * entropy(words, 3)) / 2


def repetition(text: str, n: int = 3) -> float:
    """Share of n-grams of words that stood before in the same text.

    >>> repetition("so it is so it is so it is"), repetition("so it is")
    (0.571..., 0.0)
    """
    found = ngrams(_WORD.findall(text.lower()), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def refused(text: str) -> bool:
    """Whether a text declines to answer: its first sentence says I, and that something is wanting. An empty one does not.

    >>> refused("I'm not sure about that."), refused("She was born in Oslo."), refused("")
    (True, False, False)
    """
    first = re.split(r"(?<=[.!?])\s", text.strip().lower().replace("\u2019", "'"))[0]
    return bool(re.search(SELF, first) and re.search(LACK, first))


def states(answer: str, fact: str) -> bool:
    """Whether the fact's words stand in the answer side by side, whatever their case, spaces and marks.

    >>> states("He lives at 12, Elm  Street.", "12 Elm street"), states("He lives at 112 Elm Street", "12 Elm Street")
    (True, False)
    """
    have, want = _WORD.findall(answer.lower()), _WORD.findall(fact.lower())
    return bool(want) and tuple(want) in set(ngrams(have, len(want)))


def brunet(text: str) -> float:
    """BI = N^(V^-0.165): N words, V distinct ones; smaller is richer, and 1 for a single word. nan for a text without words."""
    words = _WORD.findall(text.lower())
    return len(words) ** (len(set(words)) ** -0.165) if words else math.nan


def honore(text: str) -> float:
    """HS = 100 ln N / (1 - V_1 / V + 0.1), at most 1e6: V_1 words that stand once; larger is richer. nan for a text without words."""
    counts = Counter(_WORD.findall(text.lower()))
    once = sum(c == 1 for c in counts.values())
    return min(1e6, 100 * math.log(sum(counts.values())) / (1 - once / len(counts) + 0.1)) if counts else math.nan


def linguistic(texts: Sequence[str], perplexity: float) -> float:
    """LS: harmonic mean of sigmoid(-ln PPL), sigmoid(-ln BI) and sigmoid(ln HS), PPL, BI and HS being means over the texts that have words.

    sigmoid(-ln x) = 1 / (1 + x) and sigmoid(ln x) = x / (1 + x). The perplexity comes from a model; card relearn has that of each answer averaged.

    >>> round(linguistic(["a b a b a"], 9.0), 4)
    0.1851
    """
    bi, hs = ([v for v in map(f, texts) if not math.isnan(v)] for f in (brunet, honore))
    if not bi:
        return 0.0
    b, h = sum(bi) / len(bi), sum(hs) / len(hs)
    parts = (1 / (1 + perplexity), 1 / (1 + b), h / (1 + h))
    return 0.0 if min(parts) <= 0 else 3 / sum(1 / v for v in parts)


def entities(row: Mapping[str, Any]) -> list[str]:
    """What the answer names: the record's `entities` or `fact` if it has them, else runs of capitalised words and numbers in its answer that the
    question does not hold already.

    >>> entities({"question": "Where was Ada born?", "answer": "Ada was born in New Oslo in 1921."})
    ['New Oslo', '1921']
    """
    if row.get("entities") or row.get("fact"):
        return [str(e) for e in (row.get("entities") or [row["fact"]])]
    asked = str(row.get("question", "")).lower()
    found = (name for name in _NAME.findall(str(row.get("answer", row.get("text", "")))))
    return list(dict.fromkeys(name for name in found if name.lower() not in asked))


def similarity(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Tensor:
    """(N,) share of the reference's entities that the answer states; nan where the reference has none."""
    named = [entities(row) for row in rows]
    return torch.tensor([sum(states(a, e) for e in n) / len(n) if n else math.nan for n, a in zip(named, answers, strict=True)], dtype=torch.double)


def forgotten(rows: Sequence[Mapping[str, Any]], answers: Sequence[str], *, theta: float = 0.3, contradicts: Tensor | None = None) -> Tensor:
    """(N,) 1 where knowledge is forgotten (KFR is the mean): contradiction, or entity similarity <= theta (<= 0.5 where the reference names at most 3).

    contradicts   (N,) bool of an inference model; without it that half is left out. nan where neither says anything

    >>> forgotten([{"fact": "Oslo", "answer": "Oslo"}] * 2, ["in Oslo", "in Rome"]).tolist()
    [0.0, 1.0]
    """
    s = similarity(rows, answers)
    limit = torch.tensor([0.5 if len(entities(row)) <= 3 else theta for row in rows], dtype=torch.double)
    out = torch.where(s.isnan(), s, (s <= limit).double())
    return out if contradicts is None else torch.where(contradicts, 1.0, out.nan_to_num(0.0))


def retained(rows: Sequence[Mapping[str, Any]], answers: Sequence[str], *, theta: float = 0.3, contradicts: Tensor | None = None) -> Tensor:
    """(N,) 1 where knowledge is kept (KRR is the mean): no contradiction and entity similarity >= theta."""
    s = similarity(rows, answers)
    out = torch.where(s.isnan(), s, (s >= theta).double())
    return out if contradicts is None else torch.where(contradicts, 0.0, out.nan_to_num(1.0))
