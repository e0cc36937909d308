"""PISTOL: contracts as edges of a graph, all in one file. Source: card pistol (Qiu et al., arXiv 2406.16810).

sample_data_1                all records
sample_data_1/A_C,A_C2       those of these edges
sample_data_1/not-A_C,A_C2   those of all other edges
factual_data                 general knowledge
"""

from __future__ import annotations

import re
from typing import Any

from expunge.core.errors import DataError, suggest
from expunge.modalities.language.benchmarks.files import ENDINGS, Folder, asked, said, values
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, Rows, named

GRAPH, FACTS = re.compile(r"(sample_data_\d+)(?:/(not-)?(\w+(?:,\w+)*))?"), "factual_data"

OTHERS = "not-"


def _edge(row: Any, where: str) -> dict[str, Any]:
    return {**asked()(row, where), "edge": said(row, "edge", where)}


def part(name: str) -> Part | None:
    if name == FACTS:
        return Part("general", (FACTS, f"data/{FACTS}"), asked())
    found = GRAPH.fullmatch(name)
    return Part("retain" if found[2] else "forget", (found[1], f"data/{found[1]}"), _edge) if found else None


def there(folder: Folder) -> list[str]:
    names = {p.stem for at in ("", "data") if (folder.path / at).is_dir() for p in (folder.path / at).iterdir() if p.suffix in ENDINGS and part(p.stem)}
    return [shown for n in sorted(names) for shown in ([n] if n == FACTS else [n, f"{n}/EDGE,EDGE", f"{n}/{OTHERS}EDGE,EDGE"])]


def read(folder: Folder, name: str, found: Part) -> tuple[Rows, str]:
    """(records of the edges that the name asks for, which file they come from)."""
    files = folder.one(found.stems, name)
    rows = [found.make(value, where) for value, where in values(files)]
    graph = GRAPH.fullmatch(name)
    if graph is None or not graph[3]:
        return rows, named(files)
    edges, has = set(graph[3].split(",")), list(dict.fromkeys(row["edge"] for row in rows))
    if odd := sorted(edges - set(has)):
        raise DataError(suggest(f"{files[0].name} has no edge", odd[0], has))
    kept = [row for row in rows if (row["edge"] in edges) != bool(graph[2])]
    if not kept:
        raise DataError(f"{files[0].name} has no other edges than {', '.join(has)}")
    return kept, f"{len(edges)} of {len(has)} edges of {named(files)}" if not graph[2] else f"{len(has) - len(edges)} of {len(has)} edges of {named(files)}"


PISTOL = Benchmark("pistol", part, there, read)
