"""Requests to learn and to forget: read from a file, and what records each one is about."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.core.errors import DataError, SplitError
from expunge.core.types import Records
from expunge.modalities.files import selectors

KINDS = ("learn", "forget")
COLUMNS = ("time", "kind", "what")
MAX_BYTES = 1 << 24
"""Largest file of requests that is read: 16 MiB."""


@dataclass(frozen=True)
class Request:
    """Learn or forget, at a time, what a selector names: `class:3`, `ids:17,42`, `random:0.1@7`; several joined by +, as `class:0+class:1`."""

    time: int
    kind: str
    what: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")
        if self.time < 0:
            raise DataError(f"time must be 0 or more, not {self.time}")


def read(path: str | Path) -> tuple[Request, ...]:
    """Requests of a CSV file with the columns time,kind,what, in order of time. `ids:1,2` stands in quotes. Raises DataError naming the line."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name} is no CSV file in UTF-8 ({error})") from None
    if not lines or sorted(c.strip() for c in lines[0]) != sorted(COLUMNS):
        raise DataError(f"{path.name} must begin with the columns {','.join(COLUMNS)}; it has {','.join(lines[0]) if lines else 'nothing'}")
    order = [c.strip() for c in lines[0]]
    found = []
    for number, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        where = f"{path.name}, line {number}"
        if len(line) != len(COLUMNS):
            raise DataError(f'{where}: {len(line)} columns in place of {len(COLUMNS)}; put ids in quotes, as "ids:1,2"')
        row = dict(zip(order, (cell.strip() for cell in line), strict=True))
        try:
            found.append(Request(int(row["time"]), row["kind"], row["what"]))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except ValueError:
            raise DataError(f"{where}: time must be a whole number, not '{row['time']}'") from None
    if not found:
        raise DataError(f"{path.name} holds no request")
    return tuple(sorted(found, key=lambda r: r.time))


def schedule(requests: Sequence[Request], train: Records, base: Path | None = None) -> list[Tensor]:
    """Positions in train of the records that each request is about, in the order played. `base`: folder of files that selectors name.

    Raises DataError when times fall or ids are doubled, and SplitError for a request that matches nothing it could be about.
    """
    if not requests:
        raise DataError("no request to play")
    if len(train.ids.unique()) < len(train):
        raise DataError("ids of the training data must be unique: a record is deleted by its id")
    held, gone, out = torch.zeros(len(train), dtype=torch.bool), torch.zeros(len(train), dtype=torch.bool), []
    for k, r in enumerate(requests):
        where = f"request {k} ({r.kind} {r.what} at {r.time})"
        if k and r.time < requests[k - 1].time:
            raise DataError(f"{where} comes after one at {requests[k - 1].time}: requests must be in order of time")
        try:
            named = [selectors.resolve(s, train, base)[0].ids for s in r.what.split("+")]
        except SplitError as error:
            raise SplitError(f"{where}: {error}") from None
        chosen = torch.isin(train.ids, torch.cat(named))
        chosen = chosen & held if r.kind == "forget" else chosen & ~held & ~gone
        if not bool(chosen.any()):
            raise SplitError(f"{where}: " + ("none of these records is held" if r.kind == "forget" else "all of these records are held or were forgotten"))
        held = held & ~chosen if r.kind == "forget" else held | chosen
        gone = gone | chosen if r.kind == "forget" else gone
        out.append(chosen.nonzero().squeeze(1))
    return out
