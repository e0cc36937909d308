"""What a benchmark is to its reader: parts by name, each with the files that may hold it and how a record of them is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expunge.modalities.language.benchmarks.files import Folder, values

Rows = list[dict[str, Any]]

KINDS = {
    "forget": "its models were trained on it",
    "retain": "its models were trained on it",
    "unseen": "its models never saw it",
    "general": "it asks what models know anyway",
    "anchor": "it holds what to say instead",
    "shots": "it holds examples for a prompt",
}
"""Kind of a part -> what that says of it."""


@dataclass(frozen=True)
class Part:
    """kind    one of KINDS
    stems   files that may hold it, relative to the folder and without ending; one of them must be there
    make    (what a file holds of a record, where) -> the record: question and answer, or text, and all other fields
    """

    kind: str
    stems: tuple[str, ...]
    make: Callable[[Any, str], dict[str, Any]]


def plain(folder: Folder, name: str, part: Part) -> tuple[Rows, str]:
    """(records, the file's name) of a part that stands in one file as it is."""
    files = folder.one(part.stems, name)
    return [part.make(value, where) for value, where in values(files)], named(files)


def named(files: tuple) -> str:
    """The file's name, or that of the first shard and their number."""
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"


@dataclass(frozen=True)
class Benchmark:
    """name    as it stands before the colon
    part    name of a part -> the part, or None where there is no such part
    there   folder -> names of the parts that it holds
    read    (folder, name, part) -> (records, in words which files they come from)
    """

    name: str
    part: Callable[[str], Part | None]
    there: Callable[[Folder], list[str]]
    read: Callable[[Folder, str, Part], tuple[Rows, str]] = plain


def listed(name: str, parts: Mapping[str, Part], read: Callable[[Folder, str, Part], tuple[Rows, str]] = plain) -> Benchmark:
    """A benchmark whose parts are all known by name."""

    def there(folder: Folder) -> list[str]:
        return [n for n, part in parts.items() if any(folder.found(stem) for stem in part.stems)]

    return Benchmark(name, parts.get, there, read)
