"""Benchmarks by name: `tofu:DIR/forget10` is the part forget10 of the TOFU files in DIR.

    rows, told = read("tofu:data/tofu/forget10")

A part may be written with the ending of its file, where the folder holds it in two forms: muse:DIR/raw/forget.txt.
"""

from __future__ import annotations

import re
from pathlib import Path

from expunge.core.errors import DataError, printable, suggest
from expunge.modalities.language.benchmarks.acr import ACR
from expunge.modalities.language.benchmarks.choices import MMLU, WMDP
from expunge.modalities.language.benchmarks.files import ENDINGS, Folder
from expunge.modalities.language.benchmarks.knowundo import KNOWUNDO
from expunge.modalities.language.benchmarks.muse import MUSE
from expunge.modalities.language.benchmarks.parts import KINDS, Benchmark, Part, Rows
from expunge.modalities.language.benchmarks.pistol import PISTOL
from expunge.modalities.language.benchmarks.rwku import RWKU
from expunge.modalities.language.benchmarks.tofu import TOFU

BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (TOFU, MUSE, RWKU, WMDP, MMLU, KNOWUNDO, PISTOL, ACR)}

UNSEEN = ("test", "validation", "plants")
"""Options for texts that no model was trained on."""

DEEPEST = 2
"""Most names of which that of a part is made."""


def split(spec: str, folder: Path | str = "") -> tuple[str, str] | None:
    """(benchmark, rest) of NAME:REST; None for what is the path of a file, relative to `folder`. Raises DataError for a name that is no benchmark's, where no
    such file is."""
    name, colon, rest = spec.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][\w-]+", name) or Path(folder, spec).is_file():
        return None
    if name not in BENCHMARKS:
        raise DataError(suggest("no benchmark", name, BENCHMARKS))
    if not rest:
        raise DataError(f"name folder and part, as {name}:DIR/PART")
    return name, rest


def read(spec: str, *, option: str = "", within: Path | None = None) -> tuple[Rows, str]:
    """(records, which files they come from in words) of NAME:DIR/PART.

    option   the one that they are given to: `test`, `validation` and `plants` take only parts that the benchmark's models never saw
    within   folder that DIR and its files may not leave

    Each record holds question and answer, or text, and what else the file has. Raises DataError for a part that there is not (with those that there are), a
    file that is missing or cannot be read, a record that lacks a field, and a part that the option cannot take.
    """
    found = split(spec)
    if found is None:
        raise DataError(f"'{spec}' names no benchmark; write NAME:DIR/PART, NAME one of {', '.join(BENCHMARKS)}")
    name, rest = found
    benchmark = BENCHMARKS[name]
    folder, asked, part = located(benchmark, rest, within)
    if option in UNSEEN and part.kind != "unseen":
        unseen = [n for n in benchmark.there(folder) if (p := benchmark.part(n)) and p.kind == "unseen"]
        way = f"unseen is {', '.join(unseen)}" if unseen else "this folder holds nothing unseen: give a file of your own, or leave it out"
        raise DataError(f"--{option} takes texts that no model was trained on, and {name} {asked} is no such part ({KINDS[part.kind]}); {way}")
    rows, told = benchmark.read(folder, asked, part)
    return rows, told


def called(spec: str) -> str:
    """Benchmark and part, as "muse raw/forget"; empty for what names no benchmark."""
    found = split(spec)
    return f"{found[0]} {located(BENCHMARKS[found[0]], found[1])[1]}" if found else ""


def located(benchmark: Benchmark, rest: str, within: Path | None = None) -> tuple[Folder, str, Part]:
    """(folder, name of the part, the part) of DIR/PART. Raises DataError for a folder or part that there is not."""
    steps = Path(rest).parts
    for depth in range(1, min(DEEPEST, len(steps)) + 1):
        place, last = Path(*steps[:-depth]), "/".join(steps[-depth:])
        ending = next((e for e in ENDINGS if last.endswith(e)), "")
        bare = last.removesuffix(ending)
        part = benchmark.part(bare)
        if part is None:
            continue
        if not place.is_dir():
            raise DataError(f"no folder {printable(str(place))}, where {benchmark.name} {bare} should be")
        folder = _folder(place, within)
        return folder, bare, Part(part.kind, tuple(f"{s}{ending}" for s in part.stems), part.make) if ending else part
    place = Path(rest).parent
    while not place.is_dir():
        place = place.parent
    raise DataError(suggest(f"{benchmark.name} has no part", Path(rest).relative_to(place).as_posix(), benchmark.there(_folder(place, within))))


def _folder(place: Path, within: Path | None) -> Folder:
    if within is not None and not place.resolve().is_relative_to(within.resolve()):
        raise DataError(f"path '{printable(str(place))}' leaves the folder {within.resolve().name}")
    return Folder(place, within)
