"""Wrong answers to the questions at hand: those of the records themselves where they hold any, else the answers to other questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from expunge.core.errors import DataError
from expunge.modalities.language.records.format import normal


def wrong_answers(rows: Sequence[Mapping[str, Any]], *, seed: int, others: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """One wrong answer per record: drawn from its `perturbed_answer`, else the answer of another record of `rows` and `others` that differs from its own.

    Raises DataError where there is none.

    >>> wrong_answers([{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}], seed=0)
    ['2', '1']
    """
    generator = torch.Generator().manual_seed(seed)
    pool = [str(r["answer"]) for r in (*rows, *others) if r.get("answer")]
    out = []
    for number, row in enumerate(rows, 1):
        own = row.get("perturbed_answer") or []
        own = [own] if isinstance(own, str) else list(own)
        mine = normal({"answer": row.get("answer", "")})
        choices = own or [a for a in pool if normal({"answer": a}) != mine]
        if not choices:
            raise DataError(f"record {number} of forget has no wrong answer: give it `perturbed_answer`, or give retain data to draw one from")
        out.append(str(choices[int(torch.randint(len(choices), (1,), generator=generator))]))
    return out
