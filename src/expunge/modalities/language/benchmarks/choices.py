"""Multiple choice: WMDP (questions and corpora) and MMLU (by subject). Sources: Li et al., arXiv 2403.03218; Hendrycks et al., arXiv 2009.03300.

A record becomes what the published evaluation asks: the question with its choices on lines A., B., ..., the letter as answer, the other letters as wrong
answers (`perturbed_answer`), so that the probability of the letter among all is measured.
"""

from __future__ import annotations

import re
import string
from typing import Any

from expunge.core.errors import DataError
from expunge.modalities.language.benchmarks.files import ENDINGS, Folder, passage, said
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, listed

LETTERS = string.ascii_uppercase

SPLITS = {"test": "test", "validation": "val", "dev": "dev"}
"""Part of a subject of MMLU -> what the authors' CSV files call it."""


def choice(row: Any, where: str) -> dict[str, Any]:
    """{"question", "answer", "choices", "perturbed_answer", ...} of question, choices and the answer's number or letter; or of a row of cells in that order.

    Raises DataError for fewer than two choices, or an answer that is none of them.
    """
    if isinstance(row, list):
        if len(row) != 6:
            raise DataError(f"{where} has {len(row)} cells; MMLU has the question, four choices and the letter")
        row = {"question": row[0], "choices": row[1:5], "answer": row[5].strip()}
    question, given, answer = said(row, "question", where), row.get("choices"), row.get("answer")
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS) or not all(isinstance(c, str) and c.strip() for c in given):
        raise DataError(f"{where}: choices must be a list of two texts or more")
    letters = list(LETTERS[: len(given)])
    if isinstance(answer, str) and answer in letters:
        answer = letters.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(given):
        raise DataError(f"{where}: answer must be a number from 0 to {len(given) - 1}, or a letter from A to {letters[-1]}")
    text = "\n".join([question.strip(), *(f"{letter}. {c}" for letter, c in zip(letters, given, strict=True))])
    return {**row, "question": text, "answer": letters[answer], "perturbed_answer": [x for k, x in enumerate(letters) if k != answer]}


def _wmdp() -> dict[str, Part]:
    found = {f"wmdp-{d}": Part("forget", (f"wmdp-{d}", f"wmdp-{d}/test", f"{d}_questions"), choice) for d in ("bio", "chem", "cyber")}
    for name, kind in (("bio-forget-corpus", "forget"), ("bio-retain-corpus", "retain"), ("cyber-forget-corpus", "forget"), ("cyber-retain-corpus", "retain")):
        older = ("bio_remove_dataset",) if name == "bio-forget-corpus" else ()
        found[name] = Part(kind, (name, f"{name}/train", *older), passage)
    return found


def _subject(name: str) -> Part | None:
    """The part SUBJECT/SPLIT: on the hub a folder per subject, with the authors one per split."""
    subject, _, split = name.partition("/")
    if split not in SPLITS or not re.fullmatch(r"[a-z_]+", subject):
        return None
    return Part("general", (f"{subject}/{split}", f"{SPLITS[split]}/{subject}_{SPLITS[split]}"), choice)


def _subjects(folder: Folder) -> list[str]:
    found = []
    for file in sorted(folder.path.glob("*/*")):
        if file.suffix in ENDINGS:
            at, stem = file.parent.name, re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
            found += [f"{stem.removesuffix(f'_{short}')}/{split}" for split, short in SPLITS.items() if at == short and stem.endswith(f"_{short}")]
            found += [f"{at}/{stem}"]
    return [n for n in dict.fromkeys(found) if _subject(n) is not None]


WMDP: Benchmark = listed("wmdp", _wmdp())

MMLU = Benchmark("mmlu", _subject, _subjects)
