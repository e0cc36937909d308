"""Files of a benchmark's folder: one JSON list, JSON lines, Parquet (in shards, too), CSV or raw text, found by the name of what they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError, printable
from expunge.modalities import rows
from expunge.modalities.rows import ENDINGS

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Folder:
    """A benchmark's folder, and the one that none of its files may leave (None: links may lead anywhere)."""

    path: Path
    within: Path | None = None

    def found(self, stem: str) -> list[tuple[Path, ...]]:
        """The files that hold `stem` (a relative path without ending, or with one): each a tuple, of one file or of all shards of a Parquet file.

        Raises DataError where shards are missing, or where a file leads out of the folder that it may not leave.
        """
        if stem.endswith(ENDINGS):
            return [(self._held(file),)] if (file := self.path / stem).is_file() else []
        place = (self.path / stem).parent
        if not place.is_dir():
            return []
        whole: list[tuple[Path, ...]] = []
        shards: dict[str, dict[int, Path]] = {}
        for file in sorted(place.iterdir()):
            name, rest = Path(stem).name, file.stem[len(Path(stem).name) :]
            if not file.name.startswith(name) or file.suffix not in ENDINGS or not file.is_file():
                continue
            if not rest:
                whole.append((self._held(file),))
            elif file.suffix == ".parquet" and (shard := _SHARD.fullmatch(rest)):
                shards.setdefault(shard[2], {})[int(shard[1])] = self._held(file)
        for of, files in shards.items():
            if lacking := sorted(set(range(int(of))) - set(files)):
                raise DataError(f"{self.path.name} lacks {stem}-{lacking[0]:05d}-of-{of}.parquet")
            whole.append(tuple(files[k] for k in sorted(files)))
        return whole

    def one(self, stems: Sequence[str], what: str) -> tuple[Path, ...]:
        """The file, or shards, of the one stem that is there. Raises DataError naming the file that is missing, or those of which one must be named."""
        found = [files for stem in stems for files in self.found(stem)]
        if not found:
            named = " or ".join(s if s.endswith(ENDINGS) else f"{s}.json, .jsonl or .parquet" for s in stems)
            raise DataError(f"folder {self.path.name or self.path} lacks {named}, which holds {what}")
        if len(found) > 1:
            names = [files[0].relative_to(self.path).as_posix() for files in found]
            raise DataError(f"folder {self.path.name} holds {what} twice: name {' or '.join(names)}, with its ending")
        return found[0]

    def _held(self, file: Path) -> Path:
        if self.within is not None and not file.resolve().is_relative_to(self.within.resolve()):
            raise DataError(f"{file.name} of {self.path.name} leaves the folder {self.within.resolve().name}")
        return file


def values(files: Sequence[Path]) -> list[tuple[Any, str]]:
    """(what it holds, where it stands in words) of each record, in order; of CSV, which has no header here, a list of cells. Raises DataError for a file that
    cannot be read, or holds none."""
    return [(value, where) for file in files for where, value in (rows.cells(file) if file.suffix == ".csv" else rows.read(file))]


def said(row: Any, name: str, where: str) -> str:
    """The text of a field. Raises DataError where the record has none, or is no object."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object with {name}")
    if not isinstance(row.get(name), str) or not row[name].strip():
        has = printable(", ".join(map(str, row)))[:120]
        raise DataError(f"{where} has an empty or missing {name}; it holds {has or 'nothing'}")
    return row[name]


def asked(question: str = "question", answer: str = "answer") -> Any:
    """(record, where) -> the record with `question` and `answer`, which the file calls by these names; all other fields as they are."""

    def make(row: Any, where: str) -> dict[str, Any]:
        pair = {"question": said(row, question, where), "answer": said(row, answer, where)}
        return {**{k: v for k, v in row.items() if k not in (question, answer)}, **pair}

    return make


def passage(row: Any, where: str) -> dict[str, Any]:
    """A raw text: a string, or an object with `text`."""
    row = {"text": row} if isinstance(row, str) else row
    return {**row, "text": said(row, "text", where)}


def wrong(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The record, its `perturbed_answer`, where it has one, a list of texts. Raises DataError where it is neither a text nor such a list."""
    given = row.get("perturbed_answer")
    if given is None:
        return row
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(v, str) and v.strip() for v in given):
        raise DataError(f"{where}: perturbed_answer must be a list of texts")
    return {**row, "perturbed_answer": given}
