"""RWKU: probes and texts of one target (Target/1_NAME), of a batch, or of all (All). Source: card rwku (Jin et al., arXiv 2406.10890).

    forget_level1..3, neighbor_level1, 2   query, answer, level, type, subject
    forget_mia, retain_mia, passage, positive, negative, *_phi   text
    pair, pair_phi          prompt and two responses: the second is the model's own text, which must go
    pair_chosen, ..._phi    the same prompts with the first, the invented one: for --anchor
    reject, reject_phi      instruction, input, and a refusal as output
    retain_mmlu, triviaqa, retain_bbh      what models know besides

Parts may also be called as on the hub: mia_forget, train_positive_llama3 and so on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expunge.core.errors import DataError
from expunge.modalities.language.benchmarks.choices import choice
from expunge.modalities.language.benchmarks.files import asked, passage, said
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, listed

HUB = {
    "mia_forget": "forget_mia", "mia_retain": "retain_mia", "utility_general": "retain_mmlu", "utility_reason": "retain_bbh",
    "utility_factuality": "triviaqa", "train_original_passage": "passage",
    **{f"train_{a}_{model}": b + tail for a, b in {"positive": "positive", "negative": "negative", "pair": "pair", "refusal": "reject"}.items()
       for model, tail in (("llama3", ""), ("phi3", "_phi"))},
}  # fmt: skip
"""Name on the hub -> name of the file."""


def _response(number: int) -> Any:
    def make(row: Any, where: str) -> dict[str, Any]:
        prompt, both = said(row, "prompt", where), row.get("response")
        if not isinstance(both, list) or len(both) != 2 or not all(isinstance(r, str) and r.strip() for r in both):
            raise DataError(f"{where}: response must be a list of two texts, the invented and the model's own")
        return {**{k: v for k, v in row.items() if k not in ("prompt", "response")}, "question": prompt, "answer": both[number]}

    return make


def _refused(row: Any, where: str) -> dict[str, Any]:
    more = (row.get("input") or "") if isinstance(row, dict) else ""
    if not isinstance(more, str):
        raise DataError(f"{where}: input must be a text")
    found = asked("instruction", "output")(row, where)
    return {**{k: v for k, v in found.items() if k != "input"}, "question": f"{found['question']}\n\n{more}" if more.strip() else found["question"]}


def _trivia(row: Any, where: str) -> dict[str, Any]:
    """The first of the answers, which the record keeps all."""
    question = said(row, "question", where)
    if not isinstance(row.get("answers"), list) or not row["answers"] or not isinstance(row["answers"][0], str) or not row["answers"][0].strip():
        raise DataError(f"{where}: answers must be a list of texts")
    return {**row, "question": question, "answer": row["answers"][0]}


def _parts() -> dict[str, Part]:
    probe = asked("query", "answer")
    found: dict[str, tuple[str, Any]] = {f"forget_level{k}": ("forget", probe) for k in (1, 2, 3)}
    found |= {f"neighbor_level{k}": ("retain", probe) for k in (1, 2)} | {"forget_mia": ("forget", passage), "retain_mia": ("retain", passage)}
    found["passage"] = ("forget", passage)
    for tail in ("", "_phi"):
        found |= {f"positive{tail}": ("forget", passage), f"negative{tail}": ("anchor", passage), f"pair{tail}": ("forget", _response(1))}
        found |= {f"pair_chosen{tail}": ("anchor", _response(0)), f"reject{tail}": ("anchor", _refused)}
    found |= {"retain_mmlu": ("general", choice), "retain_bbh": ("general", asked()), "triviaqa": ("general", _trivia)}
    return {n: Part(kind, _stems(n), make) for n, (kind, make) in found.items()}


def _stems(name: str) -> tuple[str, ...]:
    file = name.replace("_chosen", "")
    return file, f"All/{file}"


PARTS = _parts()

RWKU: Benchmark = replace(listed("rwku", PARTS), part=lambda name: PARTS.get(HUB.get(name, name)))
