"""KnowUnDo, privacy and copyright: unlearn and retention, train and val. Source: card knowundo (Tian et al., arXiv 2407.01920).

Files are unlearn_train.json and the like ({text, labels}), or, as on the hub, unlearn.json with `train` and `val` lists in it.

Differs
    facts    the files have none: `entities` are the names and numbers of the answer that the question lacks; where there are none, its runs of words that
             are neither in the question nor function words; where there are none of these, the answer. Records that bring `fact` or `entities` keep them
"""

from __future__ import annotations

import re
from typing import Any

from expunge.core.errors import DataError
from expunge.modalities.language.benchmarks.files import Folder, asked, values
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, Rows, listed, named
from expunge.modalities.language.records.measures import entities

FUNCTION_WORDS = (
    "a an and are as at be been but by can did do does for from had has have he her hers him his i if in into is it its me my no nor not of on or our she so "
    "some such that the their them there these they this those through to was we were what when where which while who whose why will with yes you"
)
FUNCTION = frozenset(FUNCTION_WORDS.split())
"""Words that tell nothing by themselves."""

_GENITIVE = re.compile(r"['\u2019]s$")

_MAIL = re.compile(r"[\w.+-]+@\w+(?:[.-]\w+)+")

_FIRST = re.compile(r"(?:^|[.!?]\s+)(\w+)(?=\s+[^A-Z\s]|[,;:])")
"""A word at the start of a sentence that is no part of a longer name: its capital tells nothing."""

_WORD = re.compile(r"\w+(?:[-'\u2019.,/:@]\w+)*")


def facts(question: str, answer: str) -> list[str]:
    """Spans of the answer that tell what the question lacks, as they stand there.

    >>> facts("Where does Ann Lee live?", "She lives at 12 Elm Street in Oslo.")
    ['12 Elm Street', 'Oslo']
    >>> facts("How can one write to Ann Lee?", "Readers write to ann.lee@norhaven.org.")
    ['ann.lee@norhaven.org']
    >>> facts("Who are Ann Lee's parents?", "Ann Lee's father is a climate scientist, and her mother is a dancer.")
    ['father', 'climate scientist', 'mother', 'dancer']
    """
    names = [*_MAIL.findall(answer), *(_bare(name) for name in entities({"question": question, "answer": _MAIL.sub(" ", answer)}))]
    first = {m[1] for m in _FIRST.finditer(answer)}
    kept = [n for n in dict.fromkeys(names) if n in answer and n.lower() not in question.lower() and not (n in first and n[:1].isalpha())]
    if found := [n for n in kept if n]:
        return found
    known = FUNCTION | {_GENITIVE.sub("", w).lower() for w in _WORD.findall(question)}
    runs, last = [], -1
    for word in _WORD.finditer(answer):
        if _GENITIVE.sub("", word[0]).lower() not in known:
            if runs and answer[last : word.start()] == " ":
                runs[-1] = (runs[-1][0], word.end())
            else:
                runs.append((word.start(), word.end()))
            last = word.end()
    return list(dict.fromkeys(answer[a:b] for a, b in runs)) or [answer.strip().rstrip(".!?")]


def _bare(name: str) -> str:
    """A run of capitalised words without the function words that it begins with, and without the genitive s at its end."""
    while name and (first := name.split()[0]).lower() in FUNCTION:
        name = name[len(first) :].lstrip()
    return _GENITIVE.sub("", name)


def _made(row: Any, where: str) -> dict[str, Any]:
    found = asked("text", "labels")(row, where)
    return found if found.get("fact") or found.get("entities") else {**found, "entities": facts(found["question"], found["answer"])}


def read(folder: Folder, name: str, part: Part) -> tuple[Rows, str]:
    """(records, which file they come from)."""
    own, *rest = part.stems
    if rest and not folder.found(own) and folder.found(rest[0]):
        files, half = folder.one(rest, name), name.rpartition("_")[2]
        whole = [value for value, _ in values(files)]
        if len(whole) != 1 or not isinstance(whole[0], dict) or not isinstance(whole[0].get(half), list):
            raise DataError(f"{files[0].name} must hold one object with a list {half}")
        return [part.make(row, f"record {k} of {half} in {files[0].name}") for k, row in enumerate(whole[0][half], 1)], f"{half} of {named(files)}"
    files = folder.one((own,), name)
    return [part.make(value, where) for value, where in values(files)], named(files)


PARTS = {f"{a}_{b}": Part(kind, (f"{a}_{b}", a), _made) for a, kind in (("unlearn", "forget"), ("retention", "retain")) for b in ("train", "val")}

KNOWUNDO: Benchmark = listed("knowundo", {**PARTS, "full": Part("retain", ("full",), _made)}, read)
