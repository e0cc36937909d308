"""What data is, read once from the training data and the model, and held to every other file: shape, class names and numbers, columns, pixels, range."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError, first_line, printable, suggest
from expunge.modalities import strict_json
from expunge.parts import seal

MAX_BYTES = 1 << 28
"""Largest report that a schema is read from: 256 MiB."""

SHOWN = 12
"""Classes that are named in a line."""


@dataclass(frozen=True)
class Schema:
    """What one record is, JSON-able (`asdict`).

    kind      images, table or data (Python objects)
    shape     of one input as the model is fed it
    classes   name of class k at k; empty where targets are numbers that no name stands for
    columns   inputs of a table, in the order in which they are fed; `target` and `id` its other columns
    depth     pixels as the files hold them, as "8-bit RGB"
    feed      how pixels become inputs (`feeding.Feed` as a mapping)
    range     least and largest input of the training data
    """

    kind: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    target: str = ""
    id: str = ""
    depth: str = ""
    feed: Mapping[str, Any] = field(default_factory=dict)
    range: tuple[float, float] = (0.0, 0.0)

    def record(self) -> dict[str, Any]:
        """The JSON-able mapping."""
        return json.loads(json.dumps(asdict(self)))

    def told(self) -> str:
        """One line for people."""
        parts = [f"{self.depth or self.kind}, inputs {' x '.join(map(str, self.shape)) or 'one number'} from {self.range[0]:.4g} to {self.range[1]:.4g}"]
        if self.columns:
            parts.append(f"columns {', '.join(self.columns[:SHOWN])}{' ...' if len(self.columns) > SHOWN else ''} -> {self.target}")
        if self.classes:
            parts.append(f"classes {listed(self.classes)}")
        return printable("; ".join(parts))


def from_record(found: Any, name: str) -> Schema:
    """The schema of a mapping. Raises DataError where it is none."""
    known = {f.name: f for f in fields(Schema)}
    if not isinstance(found, Mapping) or not {"kind", "shape"} <= set(found) <= set(known):
        raise DataError(f"{name} holds no schema of data")
    words, numbers = ("classes", "columns"), ("shape", "range")
    good = (
        all(isinstance(found.get(k, ""), str) for k in ("kind", "target", "id", "depth"))
        and all(isinstance(found.get(k, []), list) and all(isinstance(v, str) for v in found.get(k, [])) for k in words)
        and all(isinstance(found.get(k, []), list) and all(isinstance(v, (int, float)) for v in found.get(k, [])) for k in numbers)
        and len(found.get("range", [0, 0])) == 2
        and isinstance(found.get("feed", {}), Mapping)
    )
    if not good:
        raise DataError(f"the schema in {name} is damaged")
    return Schema(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def read(path: Path) -> Schema:
    """The schema that an earlier run's report.json holds, or a file of its own. Raises DataError, and ReportError for a report that was changed."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        document = strict_json.parsed(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read a schema from {path.name}: {first_line(error)}") from None
    if not isinstance(document, dict) or "data" not in document:
        return from_record(document, path.name)
    data = seal.read(path)["data"]
    return from_record(data.get("schema") if isinstance(data, dict) else None, path.name)


def natural(word: str) -> tuple:
    """Sort key in which 2 stands before 10.

    >>> sorted(["10", "2", "b1", "a10", "a9"], key=natural)
    ['2', '10', 'a9', 'a10', 'b1']
    """
    parts = re.split(r"([0-9]+)", word)
    return tuple((0, len(p.lstrip("0")), p.lstrip("0")) if p.isdigit() and p.isascii() else (1, 0, p) for p in parts if p), word


def ordered(found: Iterable[str], known: Sequence[str] = (), how: str = "") -> tuple[str, ...]:
    """Class names by number.

    known   names that the model brings, by number: these are the numbers, and every name that is found must be one of them, but where all that are found are
            numbers and the model's are none, in which case they are the numbers
    how     "" or natural: 2 before 10; sorted: as strings, as torchvision's ImageFolder numbers folders; or the names themselves, separated by commas
    Raises DataError for a name that has no number.
    """
    names = set(found)
    if how == "sorted":
        return tuple(sorted(names))
    if how == "natural" or (not how and not known):
        return tuple(sorted(names, key=natural))
    if how:
        known = tuple(n.strip() for n in how.split(","))
        if len(set(known)) != len(known):
            raise DataError(f"classes names '{next(n for n in known if known.count(n) > 1)}' twice")
    elif not names <= set(known) and names <= {str(k) for k in range(len(known))}:
        return tuple(str(k) for k in range(len(known)))
    if odd := sorted(names - set(known), key=natural):
        raise DataError(printable(suggest("classes does not name" if how else "no class of the model", odd[0], known[:50])))
    return tuple(known)


def called(k: int, classes: Sequence[str]) -> str:
    """A class by its number, and its name where it has another.

    >>> called(1, ["cat", "dog"]), called(2, ["cat", "dog"])
    ('1 (dog)', '2')
    """
    return f"{k} ({classes[k]})" if k < len(classes) and classes[k] != str(k) else str(k)


def listed(classes: Sequence[str]) -> str:
    """Classes with their numbers.

    >>> listed(["cat", "dog", "2"])
    '0 cat, 1 dog, 2'
    """
    said = [name if name == str(k) else f"{k} {name}" for k, name in enumerate(classes)]
    return ", ".join(said[:SHOWN]) + (f" ... ({len(said)} in all)" if len(said) > SHOWN else "")


def number(word: str, classes: Sequence[str]) -> int:
    """Number of a class by its name or number; `name:1` and `number:1` where a name is another class's number. Raises DataError.

    >>> number("dog", ["cat", "dog"]), number("1", ["cat", "dog"]), number("name:2", ["1", "2"])
    (1, 1, 1)
    """
    kind, _, rest = word.partition(":")
    named = kind in ("name", "number") and word not in classes
    asked = rest if named else word
    by_name = classes.index(asked) if asked in classes and not (named and kind == "number") else None
    counted = asked.isdigit() and asked.isascii() and len(asked) < 10 and int(asked) < len(classes) and not (named and kind == "name")
    by_number = int(asked) if counted else None
    if by_name is not None and by_number is not None and by_name != by_number:
        raise DataError(
            f"class:{asked} is two classes: the one named {asked} has number {by_name}, and number {by_number} is named {classes[by_number]}; "
            f"write class:name:{asked} or class:number:{asked}"
        )
    if by_name is None and by_number is None:
        raise DataError(printable(suggest("no class", asked, [listed([n]).removeprefix("0 ") for n in classes[:50]])))
    return by_name if by_name is not None else by_number  # pyright: ignore[reportReturnType]


def held(mine: Schema, known: Schema, what: str) -> None:
    """Raises DataError where data is of another kind, shape or scale than the schema."""
    if mine.kind != known.kind and "data" not in (mine.kind, known.kind):
        raise DataError(f"{what} is {mine.kind}, the training data is {known.kind}")
    if mine.shape != known.shape:
        raise DataError(f"{what} has inputs of shape {mine.shape}, the training data {known.shape}")
    if mine.depth != known.depth and mine.kind == known.kind:
        raise DataError(f"{what} holds {mine.depth} pixels, the training data {known.depth}")
    low, high = known.range
    width = high - low
    if len(known.shape) > 1 and width > 0 and (mine.range[0] < low - 9 * width or mine.range[1] > high + 9 * width):
        raise DataError(f"{what} has inputs from {mine.range[0]:.4g} to {mine.range[1]:.4g}, the training data from {low:.4g} to {high:.4g}: another scale")
