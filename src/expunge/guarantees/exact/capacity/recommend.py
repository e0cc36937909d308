"""From the volumes of deletion requests to settings of exact deletion: a grid of designs, simulated, and the cheapest that keep the limits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from expunge.core.errors import SettingError
from expunge.guarantees.exact.capacity.simulator import Measured, served, spend
from expunge.guarantees.exact.capacity.systems import Stream, System
from expunge.guarantees.exact.capacity.volumes import STRETCHES, Volumes

MOST = 3000
"""Most requests that are simulated per design."""
KNOWN = 20_000
"""Most records for which designs that know the prior are tried: splitting by it takes time."""
SHARDS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Option:
    """One setting. Costs in sample passes: per_request (simulated), per_month at the log's volume, setup (first training), total of the horizon.

    share: per request, of a full training. storage: checkpoints at most. served: requests without any retraining until full retraining.
    kept: share of slices that vote. least: fewest records behind a model that votes.
    """

    design: System
    per_request: Measured
    share: float
    per_month: float
    setup: int
    total: float
    storage: int
    served: Measured
    kept: float
    least: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Settings, cheapest first. refused: limit -> number of settings that break it.

    retrain: sample passes over the horizon of full retraining after each batch.
    """

    volumes: Volumes
    stream: Stream
    months: float
    options: tuple[Option, ...]
    refused: dict[str, int]
    retrain: float
    notes: tuple[str, ...]


def grid(records: int, least: int, epochs: int, shares: tuple[float, ...] = ()) -> list[System]:
    """Designs whose every model has seen `least` records: the largest numbers of shards that allow it: four for sisa, two for s3t and safe.

    With `shares` (a prior in stretches) also the same designs with places by that prior, for up to KNOWN records."""
    found: list[System] = []
    for slices in (1, 3, 6):
        fit = [s for s in SHARDS if records // s >= max(least, slices)][-4:]
        found += [System("sisa", records, s, slices, epochs=epochs) for s in fit]
    for slices in (3, 6):
        for floor in range(1, slices + 1):
            fit = [s for s in SHARDS if records * floor // (s * slices) >= max(least, 1)][-2:] if floor in (1, slices // 2, slices) else []
            found += [System("s3t", records, s, slices, b, floor, epochs=epochs) for s in fit for b in (1, slices // 2, slices)]
    for clique in (2, 4):
        fit = [s for s in SHARDS if s % clique == 0 and clique * (records // s) >= max(least, 1) and records >= s][-2:]
        found += [System("safe", records, s, epochs=epochs, graph="cliques", clique=clique) for s in fit]
    found = list(dict.fromkeys(found))
    if shares and records <= KNOWN:
        found += [replace(d, placing="aware", prior=shares, choice="matching" if d.kind == "s3t" else "cyclic") for d in found if d.kind != "safe"]
    return found


def recommend(
    volumes: Volumes, records: int, *, least: int = 200, storage: int | None = None, passes: float | None = None, epochs: int = 20, months: float = 12.0,
    runs: int = 100, seed: int = 0, designs: Sequence[System] | None = None,
) -> Plan:  # fmt: skip
    """Rank `designs` (default: `grid`) by sample passes over `months` at the log's volume, first training included.

    least: records every voting model must have been trained on (accuracy is not measured here). storage: most checkpoints.
    passes: most sample passes over the horizon. Raises SettingError for a number out of range, or a log that asks for more than half of
    the records within the horizon.
    """
    if (
        records < 1
        or least < 1
        or epochs < 1
        or runs < 2
        or not 0 < months <= 1200
        or (storage is not None and storage < 1)
        or (passes is not None and passes <= 0)
    ):
        raise SettingError("records, least, epochs and storage must be 1 or more, runs 2 or more, passes above 0, months in 0..1200")
    expected = max(1, round(volumes.per_month * months))
    if expected > records // 2:
        raise SettingError(
            f"{expected} of {records} records are expected to be asked for in {months:g} months, more than half; take a shorter horizon (--months)"
        )
    stream = Stream("uniform", shares=volumes.shares, batches=volumes.batches[:MOST])
    notes = _notes(volumes, records)
    options, refused, full = [], Counter[str](), epochs * records
    for design in grid(records, least, epochs, volumes.shares) if designs is None else designs:
        if broken := _broken(design, least, storage, passes):
            refused[broken] += 1
            continue
        cycle = (
            math.ceil(3 * design.shards * design.slices * sum(1 / k for k in range(1, min(design.budget, design.slices) + 1))) if design.kind == "s3t" else 0
        )
        requests = min(expected, MOST, max(300, cycle))
        spent = spend(design, stream, requests, runs=runs, seed=seed)
        per_month = spent.cost.mean * volumes.per_month
        total = design.setup + per_month * months
        if passes is not None and total > passes:
            refused[f"more than {passes:g} sample passes in {months:g} months"] += 1
            continue
        reasons = [f"{100 * spent.share.mean:.3g} % of a full training per request", f"every voting model has seen {design.least:,} records or more"]
        if design.kind == "s3t":
            reasons.append(
                f"trains nothing until fewer than {design.floor} of {design.slices} slices are left; {100 * spent.kept:.0f} % of slices vote on average"
            )
        if design.placing == "aware":
            reasons.append("places records by the log's skew; a requester who knows that rule can undo the gain")
        if requests < min(expected, cycle):
            reasons.append(f"cost of the first {requests} requests only; later ones cost more")
        options.append(
            Option(
                design, spent.cost, spent.share.mean, per_month, design.setup, total, design.checkpoints, _lasting(design, volumes, runs, seed), spent.kept,
                design.least, tuple(reasons),
            )
        )  # fmt: skip
    options.sort(key=lambda o: (o.total, o.storage, o.design.name))
    return Plan(volumes, stream, months, tuple(options), dict(refused), full * (1 + expected * len(volumes.batches) / volumes.asked), notes)


def _broken(design: System, least: int, storage: int | None, passes: float | None) -> str:
    """The first limit that a design breaks without any request."""
    if design.least < least:
        return f"a model with fewer than {least} records"
    if storage is not None and design.checkpoints > storage:
        return f"more than {storage} checkpoints"
    return f"first training takes more than {passes:g} sample passes" if passes is not None and design.setup > passes else ""


def _lasting(design: System, volumes: Volumes, runs: int, seed: int) -> Measured:
    """`served`, with at most 100 records per place where places are random: more make no difference of more than a few percent."""
    if design.placing == "random":
        design = replace(design, records=min(design.records, 100 * design.shards * design.slices))
    runs = max(20, min(runs, 8_000_000 // design.records))
    return served(design, Stream("uniform", shares=volumes.shares), runs=runs, seed=seed).all


def _notes(volumes: Volumes, records: int) -> tuple[str, ...]:
    """What the log shows about time and skew."""
    together = max(volumes.batches)
    found = [
        f"{volumes.asked} records asked for in {volumes.days:.1f} days: {volumes.per_month:.1f} per month ({volumes.low:.1f} to {volumes.high:.1f})",
        f"arrive in {len(volumes.batches)} batches of up to {together}; variance over mean per window {volumes.burst:.2g}"
        + (", bursty" if volumes.burst > 2 else ""),
    ]
    if volumes.shares:
        more = "" if records <= KNOWN else f"; designs that know it are tried up to {KNOWN} records only"
        found.append(f"skewed: the most asked-for fifth of records has {100 * volumes.top:.0f} % of requests (p = {volumes.p:.1g}){more}")
    elif not math.isnan(volumes.p):
        found.append(f"no skew found over record numbers (p = {volumes.p:.2g}, n = {volumes.asked})")
    else:
        found.append(f"skew not measured: it needs {5 * STRETCHES} ids or more, all record numbers 0..{records - 1}")
    if volumes.repeated:
        found.append(f"{volumes.repeated} lines ask for an id again and are not counted")
    return tuple(found)
