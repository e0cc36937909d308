"""MUSE, News and Books: SUBSET/SPLIT as in the authors' folders and on the hub. Source: card muse (Shi et al., arXiv 2407.06460).

raw, train, scal, sust, privleak   texts: a list of strings, objects with `text`, or one .txt file that is one text
verbmem/forget                     prompt and gt, the passage that follows it: one text, whose `prefix` is the prompt
knowmem/*_qa                       question and answer; *_qa_icl are examples for the prompt
"""

from __future__ import annotations

from typing import Any

from expunge.modalities.language.benchmarks.files import asked, passage, said
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, listed


def continued(row: Any, where: str) -> dict[str, Any]:
    """{"text", "prefix"} of a prompt and the passage that follows it, parted by a space where neither has one."""
    prompt, rest = said(row, "prompt", where), said(row, "gt", where)
    between = "" if prompt[-1].isspace() or rest[0].isspace() else " "
    return {**{k: v for k, v in row.items() if k not in ("prompt", "gt")}, "text": f"{prompt}{between}{rest}", "prefix": prompt}


def _parts() -> dict[str, Part]:
    names = {
        "forget": [*(f"{s}/forget" for s in ("raw", "privleak", "train")), *(f"{s}/forget_{k}" for s in ("scal", "sust") for k in (1, 2, 3, 4))],
        "retain": ["raw/retain1", "raw/retain2", "train/retain1", "train/retain2", "privleak/retain"],
        "unseen": ["raw/holdout", "privleak/holdout"],
    }
    found = {n: Part(kind, (n, "privleak/retain2") if n == "privleak/retain" else (n,), passage) for kind, ns in names.items() for n in ns}
    found["verbmem/forget"] = Part("forget", ("verbmem/forget",), continued)
    for name, kind in (("forget", "forget"), ("retain", "retain")):
        older = (f"knowmem/{name}2_qa",) if name == "retain" else ()
        found[f"knowmem/{name}_qa"] = Part(kind, (f"knowmem/{name}_qa", *older), asked())
        found[f"knowmem/{name}_qa_icl"] = Part("shots", (f"knowmem/{name}_qa_icl", *(f"{o}_icl" for o in older)), asked())
    return found


MUSE: Benchmark = listed("muse", _parts())
