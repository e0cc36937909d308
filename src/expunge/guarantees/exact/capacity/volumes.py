"""A log of deletion requests: how many come, how often together, and for which records.

The log is a CSV file with a header: `time` (ISO date, date and time, or a number of days), and `id` (one record each) or `count` (requests
in that line), and where a request covers several records `records` (per request). Requests with the same time are served together.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from expunge.core.errors import DataError
from expunge.core.stats import Z

MAX_BYTES, MAX_ROWS, MAX_ASKED = 64 << 20, 1_000_000, 10_000_000
"""Largest log: 64 MiB, a million lines; most records asked for in it."""
MONTH = 365.25 / 12
STRETCHES = 10
"""Stretches of record numbers whose shares of requests are compared."""


@dataclass(frozen=True)
class Volumes:
    """What a log says. Bounds are one-sided 95 %, of a compound Poisson process.

    asked: records asked for. repeated: lines whose id was there before, not counted. days: length observed. per_month with low and high.
    batches: records asked for together, in turn. burst: variance over mean of requests in equal windows (1 for a Poisson process).
    ids: record numbers, where all ids are such numbers; with 50 or more of them top, p and shares: top is the share of requests in the
    fifth of record numbers that is asked for most, p a chi-square test against equal shares, shares those per stretch, empty unless p < 0.01.
    """

    asked: int
    repeated: int
    days: float
    per_month: float
    low: float
    high: float
    batches: tuple[int, ...]
    burst: float
    ids: tuple[int, ...] = ()
    top: float = math.nan
    p: float = math.nan
    shares: tuple[float, ...] = ()


def read(path: str | Path, records: int) -> Volumes:
    """The volumes of a log about `records` records. Raises DataError that names the line."""
    path = Path(path)
    lines = list(_lines(path))
    if not lines:
        raise DataError(f"{path.name}: no requests below the header")
    together: Counter[float] = Counter()
    names: dict[str, float] = {}
    repeated = 0
    for time, name, size in lines:
        if name and name in names:
            repeated += 1
            continue
        if name:
            names[name] = time
        together[time] += size
    batches = [together[t] for t in sorted(together)]
    asked, k = sum(batches), len(batches)
    if k < 2:
        raise DataError(f"{path.name}: all requests have the same time; volumes per month need two times at least")
    if asked >= records:
        raise DataError(f"{path.name}: {asked} records are asked for, but there are only {records}")
    times = sorted(together)
    days = (times[-1] - times[0]) * k / (k - 1)
    spread = Z * math.sqrt(sum(g * g for g in batches))
    per = MONTH / days
    windows = min(100, max(2, math.ceil(days)))
    counts = np.bincount([min(windows - 1, int((t - times[0]) / (times[-1] - times[0]) * windows)) for t in times], batches, windows)
    numbers = [int(n) for n in names if n.isdecimal() and len(n) < 16]
    known = len(numbers) == len(names) == asked and max(numbers) < records
    found = Volumes(
        asked, repeated, days, asked * per, max(0.0, asked - spread) * per, (asked + spread) * per, tuple(batches), float(counts.var(ddof=1) / counts.mean())
    )
    return replace(found, ids=tuple(numbers), **_skew(numbers, records)) if known and len(set(numbers)) == len(numbers) else found


def _skew(numbers: Sequence[int], records: int) -> dict[str, float | tuple[float, ...]]:
    """top, p and shares of record numbers; nothing for fewer than 5 per stretch."""
    if len(numbers) < 5 * STRETCHES or records < STRETCHES:
        return {}
    from scipy.special import chdtrc

    counts = np.bincount(np.array(numbers) * STRETCHES // records, minlength=STRETCHES)
    size = np.bincount(np.arange(records) * STRETCHES // records, minlength=STRETCHES)
    due = size * (len(numbers) / records)
    p = float(chdtrc(STRETCHES - 1, ((counts - due) ** 2 / due).sum()))  # chi-square test
    shares = (counts + 0.5) / (len(numbers) + 0.5 * STRETCHES)
    return {"top": float(np.sort(counts)[-STRETCHES // 5 :].sum() / len(numbers)), "p": p, "shares": tuple(shares.tolist()) if p < 0.01 else ()}


def _lines(path: Path) -> Iterator[tuple[float, str, int]]:
    """Days, id (or none) and records asked for, per line."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path.name} has {size} bytes, more than {MAX_BYTES}")
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = csv.reader(f, strict=True)
            header = [h.strip().lower() for h in next(rows, [])]
            _header(path.name, header)
            total, kind, start = 0, "", 0
            for number, row in enumerate(rows, start=1):
                at = f"{path.name} line {rows.line_num}"
                if not any(cell.strip() for cell in row):
                    continue
                if number > MAX_ROWS:
                    raise DataError(f"{at}: more than {MAX_ROWS} lines; sum them up with a column count")
                if len(row) != len(header):
                    raise DataError(f"{at}: {len(row)} fields, but the header has {len(header)}")
                cells = dict(zip(header, (c.strip() for c in row), strict=True))
                time, mine = _time(cells["time"], at)
                if kind and mine != kind:
                    raise DataError(f"{at}: time is a {mine}, but a {kind} in line {start}")
                kind, start = kind or mine, start or rows.line_num
                if "id" in cells and not cells["id"]:
                    raise DataError(f"{at}: id is empty")
                total += (size := _whole(cells, "count", at) * _whole(cells, "records", at))
                if total > MAX_ASKED:
                    raise DataError(f"{at}: more than {MAX_ASKED} records asked for")
                yield time, cells.get("id", ""), size
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path.name} as CSV: {error}") from None


def _header(name: str, header: list[str]) -> None:
    """DataError unless the columns are time, id or count, and perhaps records."""
    if "time" not in header or ("id" in header) == ("count" in header):
        raise DataError(f"{name} line 1: write the columns time and either id or count, not: {', '.join(header) or 'nothing'}")
    if bad := [h for h in header if h not in ("time", "id", "count", "records")] or [h for h, k in Counter(header).items() if k > 1]:
        raise DataError(f"{name} line 1: unknown or repeated column '{bad[0]}'; there are: time, id, count, records")


def _time(text: str, at: str) -> tuple[float, str]:
    """Days and how the time was written."""
    try:
        if math.isfinite(value := float(text)) and abs(value) < 1e9 and not (len(text) == 8 and text.isdecimal()):
            return value, "number"
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"{at}: time '{text[:40]}' is neither an ISO date nor a number of days") from None
    zone = moment.tzinfo is not None
    return (moment if zone else moment.replace(tzinfo=UTC)).timestamp() / 86400, "date with time zone" if zone else "date"


def _whole(cells: dict[str, str], name: str, at: str) -> int:
    text = cells.get(name, "1")
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < 1:
        raise DataError(f"{at}: {name} '{text[:40]}' is not a whole number from 1 to 999999999")
    return int(text)
