"""TOFU: forgetNN, retainNN, holdoutNN, full, real_authors and world_facts. Source: card tofu (Maini et al., arXiv 2401.06121).

    forget10          forget10.json, else forget10_perturbed.json, else the last 400 records of full.json
    retain90          retain90.json, else the first 3,600 records of full.json
    forget10_idk      the questions of forget10, each answered by a refusal: for --anchor

Records that also stand in NAME_perturbed.json (of retainNN and full: in retain_perturbed.json) get its paraphrases and wrong answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expunge.core.errors import DataError
from expunge.modalities.language.benchmarks.files import Folder, asked, values, wrong
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, Rows, listed, named
from expunge.modalities.language.texts import GENERAL
from expunge.modalities.language.worlds.build import REFUSALS, drawn, refusals

WHOLE = 4000
"""Records of full.json: 20 of each of 200 authors."""

FORGET = {"forget01": 0.01, "forget05": 0.05, "forget10": 0.1}
"""Share of full that is to be forgotten, from its end."""

RETAIN = {"retain99": 0.01, "retain95": 0.05, "retain90": 0.1}

SEEDED = 0
"""Seed by which refusals are drawn."""


def _made(row: Any, where: str) -> dict[str, Any]:
    return wrong(asked()(row, where), where)


def _parts() -> dict[str, Part]:
    kinds = {
        "forget": [*FORGET, *(f"{n}_perturbed" for n in FORGET)],
        "retain": ["full", *RETAIN, "retain_perturbed"],
        "unseen": ["holdout01", "holdout05", "holdout10"],
        "general": [*GENERAL, *(f"{n}_perturbed" for n in GENERAL)],
        "anchor": [f"{n}_idk" for n in FORGET],
    }
    stems = {n: (n.removesuffix("_idk"),) for names in kinds.values() for n in names}
    stems |= {n: (n, f"{n}_perturbed", "full") for n in FORGET} | {n: (n, "full") for n in RETAIN}
    stems |= {n: (n, f"{n}_perturbed") for n in GENERAL} | {f"{n}_idk": stems[n] for n in FORGET}
    return {n: Part(kind, stems[n], _made) for kind, names in kinds.items() for n in names}


def read(folder: Folder, name: str, part: Part) -> tuple[Rows, str]:
    """(records, which files they come from); those of general knowledge have its name as their `set`."""
    if part.kind == "anchor":
        rows, told = read(folder, name.removesuffix("_idk"), PARTS[name.removesuffix("_idk")])
        for file in REFUSALS:
            folder.found(file)  # refuses one that leads out of the folder
        said, source = refusals(folder.path)
        answers = drawn(said, len(rows), SEEDED)
        return [{"question": row["question"], "answer": answer} for row, answer in zip(rows, answers, strict=True)], f"questions of {told}, {source}"
    stem = next((s for s in part.stems if folder.found(s)), "")
    files, base = folder.one((stem,) if stem else part.stems, name), Path(stem).stem
    rows, told = [part.make(value, where) for value, where in values(files)], named(files)
    if base == "full" != name:
        rows, told = _cut(rows, name), f"{told}, cut as published"
    elif name.removesuffix("_perturbed") in GENERAL:
        rows = [{**row, "set": name.removesuffix("_perturbed")} for row in rows]
    beside = "retain_perturbed" if part.kind == "retain" else f"{name}_perturbed"
    if base.endswith("_perturbed") or not folder.found(beside):
        return rows, told
    return _joined(rows, told, folder.one((beside,), beside), part)


def _cut(rows: Rows, name: str) -> Rows:
    if len(rows) != WHOLE:
        raise DataError(f"the full file holds {len(rows)} records, TOFU's has {WHOLE}: {name} cannot be cut from it; add {name}.json")
    at = WHOLE - round(WHOLE * (FORGET | RETAIN)[name])
    return rows[at:] if name in FORGET else rows[:at]


def _joined(rows: Rows, told: str, files: tuple, part: Part) -> tuple[Rows, str]:
    """Records with the further fields of those of a perturbed file that ask and answer the same."""
    more = {(row["question"], row["answer"]): row for row in (part.make(value, where) for value, where in values(files))}
    both = [more.get((row["question"], row["answer"])) for row in rows]
    if not any(both):
        raise DataError(f"{files[0].name} shares no record with {told}: they are of two versions; take one out")
    return [{**(rich or {}), **row} for row, rich in zip(rows, both, strict=True)], f"{told}, {sum(b is not None for b in both)} as {named(files)} has them"


PARTS = _parts()

TOFU: Benchmark = listed("tofu", PARTS, read)
