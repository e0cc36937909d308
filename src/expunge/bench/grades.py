"""Grades of models of known truth: how often what is gone is verified, or supported, and how often what is not gone is.

Gone: models retrained without the forget set. Not gone: untouched originals, `sabotage.SABOTAGE` (classifiers), and tricks of `adaptive.FAMILIES` at
three strengths, of those that leave at least half to be had (`adaptive.left`). Requests of few records are drawn from the forget set; no retrained model
saw any of it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.attacks.repair import HALF
from expunge.audits.core import Probe
from expunge.audits.grade import GRADES
from expunge.audits.verdict import Trial, default_rules, selftest
from expunge.bench import adaptive
from expunge.bench.cells import add, begun
from expunge.bench.sabotage import SABOTAGE
from expunge.core.errors import DataError
from expunge.core.files import write
from expunge.core.machine.devices import reseeded
from expunge.core.stats import wilson
from expunge.core.types import Split
from expunge.engine.run import Attempt
from expunge.modalities.worlds import World, cache_folder, world
from expunge.planning.outcome import examined, trusted

COUNTS = (3, 1, 0)
"""Retrained models that are compared with."""

KINDS: Mapping[str, Mapping[str, Callable[..., nn.Module]]] = {"classification": SABOTAGE}
"""Task -> sabotage of one strength."""


@dataclass(frozen=True)
class Case:
    """A model of known truth: gone or kept, how it was made, the original it is read beside, and the split that is asked about."""

    truth: str
    kind: str
    seed: int
    original: int
    make: Callable[[], nn.Module]
    split: Split


def population(w: World, scenario: str, cache: Path | None, *, gone: int, originals: int, references: int, tricks: bool = True) -> Iterator[Case]:
    """`gone` retrained models, which are no references, each beside one of the originals; those untouched; sabotage; tricks at three strengths."""
    split, original = w.split(scenario), functools.cache(lambda k: w.original(k, cache))
    for k in range(gone):
        yield Case("gone", "retrained", k, k % originals, lambda k=k: w.retrained(scenario, references + k, cache), split)
    for k in range(originals):
        yield Case("kept", "untouched", k, k, lambda k=k: original(k), split)
    if not tricks:
        return
    for kind, make in KINDS.get(w.task.name, {}).items():
        yield Case("kept", kind, 0, 0, lambda make=make: make(original(0), w.task, split, 100), split)
    told = [w.retrained(scenario, k, cache) for k in range(max(1, references))]
    knowledge = adaptive.left(original(0), w.task, split, told)
    for kind, family in adaptive.FAMILIES.get(w.task.name, {}).items():
        for k, s in enumerate((family.low, math.sqrt(family.low * family.high), family.high)):
            with reseeded(0):
                model = family.make(original(0), w.task, split, 0, s, told)
            if knowledge(model, family)[0] >= HALF:
                yield Case("kept", kind, k, 0, lambda model=model: model, split)


def small(w: World, scenario: str, cache: Path | None, size: int, *, draws: int, originals: int, references: int) -> Iterator[Case]:
    """`draws` requests of that many records of the forget set, each put to a retrained model and to the untouched original."""
    split = w.split(scenario)
    for k in range(draws):
        rows = torch.randperm(len(split.forget), generator=torch.Generator().manual_seed(k))[:size].sort().values
        asked = replace(split, forget=split.forget.take(rows), asked=f"{size} of {split.asked or len(split.forget)}")
        yield Case("gone", f"retrained, {size}", k, k % originals, lambda k=k: w.retrained(scenario, references + k % 10, cache), asked)
        yield Case("kept", f"untouched, {size}", k, k % originals, lambda k=k: w.original(k % originals, cache), asked)


def bench(
    name: str, scenarios: Sequence[str] = (), out: Path | str = "bench-out", *, counts: Sequence[int] = COUNTS, gone: int = 55, originals: int = 9,
    sizes: Sequence[int] = (), draws: int = 20, quick: bool = False, progress: Callable[[str, int, int], None] | None = None, cache: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Grade the population of each scenario with that many retrained models, or, with sizes, requests of so few records.

    Cells in OUT/NAME-grades.jsonl are not run again. Writes OUT/NAME-grades.md.

    quick  without the checks that train, but for those that rules read
    """
    w, cache = world(name), cache or cache_folder()
    path = Path(out) / f"{name}-grades.jsonl"
    done = begun(path, _key, lambda c: c["digest"] == w.digest)
    most = max(counts)
    for scenario in scenarios or w.scenarios:
        told = tuple(w.retrained(scenario, k, cache) for k in range(most))
        cases = (
            (case for size in sizes for case in small(w, scenario, cache, size, draws=draws, originals=originals, references=most))
            if sizes
            else population(w, scenario, cache, gone=gone, originals=originals, references=most)
        )
        made: dict[tuple, tuple[Probe, tuple[Trial, ...]]] = {}
        for number, case in enumerate(cases):
            for count in counts:
                if progress:
                    progress(f"{name} {scenario} {case.kind} {case.seed}, {count} references", number, number + 1)
                head = {"world": name, "digest": w.digest, "scenario": scenario, "references": count, "truth": case.truth, "kind": case.kind, "seed": case.seed}
                if _key(head) in done:
                    continue
                start = time.process_time()
                place = (case.original, count, case.split.asked if not sizes else (case.kind.split()[-1], case.seed))
                if place not in made:
                    made = {k: v for k, v in made.items() if not sizes} | {place: _prepared(w, case, told[:count], cache)}
                p, trials = made[place]
                q = replace(p, cache=dict(p.cache))
                one = examined(q, Attempt("given", {}, 0, "ok", "", None), case.make(), trials, not quick)
                given: Any = one.grade
                cell = {**head, "grade": given.grade, "why": list(given.why)[:4], "quick": quick, "seconds": time.process_time() - start}
                done[_key(cell)] = cell
                add(path, cell)
    cells = list(done.values())
    write(path.parent / f"{name}-grades.md", markdown(cells), DataError)
    return cells


def _prepared(w: World, case: Case, references: Sequence[nn.Module], cache: Path | None) -> tuple[Probe, tuple[Trial, ...]]:
    original = w.original(case.original, cache)
    kept, _ = trusted(Probe(original, original, w.task, case.split), references)
    p = Probe(original, original, w.task, case.split, kept)
    return p, tuple(selftest(p, default_rules(p)))


def _key(cell: Mapping[str, Any]) -> tuple:
    return tuple(cell[k] for k in ("scenario", "references", "truth", "kind", "seed"))


def reached(cells: Sequence[Mapping[str, Any]], grade: str) -> tuple[float, float, float]:
    """Share of the cells with at least that grade, with one-sided 95 % bounds.

    >>> [round(v, 3) for v in reached([{"grade": "verified"}, {"grade": "refuted"}], "supported")]
    [0.5, 0.121, 0.879]
    """
    return wilson(sum(GRADES.index(c["grade"]) >= GRADES.index(grade) for c in cells), len(cells))


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """Per scenario a table of grades by truth (by kind, for requests of few records) and number of retrained models, then what was wrongly taken."""
    out = []
    for key in dict.fromkeys((c["world"], c["scenario"]) for c in cells):
        mine = [c for c in cells if (c["world"], c["scenario"]) == key]
        out.append(f"### {key[0]}, {key[1]}\n")
        out.append(f"| models | references | n | {' | '.join(GRADES)} | at least supported | verified |\n{'|---' * 9}|")
        groups = [(lambda c, kind=kind: c["kind"] == kind, kind) for kind in dict.fromkeys(c["kind"] for c in mine) if ", " in kind]
        for t, label in (("gone", "gone"), ("kept", "not gone")):
            groups.append((lambda c, t=t: c["truth"] == t and ", " not in c["kind"], label))
        for chosen, label in groups:
            for count in sorted({c["references"] for c in mine}, reverse=True):
                some = [c for c in mine if chosen(c) and c["references"] == count]
                if some:
                    shares = " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*reached(some, g)) for g in ("supported", "verified"))
                    by = " | ".join(str(sum(c["grade"] == g for c in some)) for g in GRADES)
                    out.append(f"| {label} | {count} | {len(some)} | {by} | {shares} |")
        wrong = [c for c in mine if c["truth"] == "kept" and GRADES.index(c["grade"]) >= GRADES.index("supported")]
        said = "; ".join(f"{c['kind']} {c['seed']} ({c['grade']}, {c['references']} references)" for c in wrong)
        out.append(f"\nNot gone, and at least supported: {said or 'none'}.\n")
        wrong = [c for c in mine if c["truth"] == "gone" and c["grade"] == "refuted"]
        said = "; ".join(f"{c['kind']} {c['seed']}, {c['references']} references: {c['why'][0]}" for c in wrong)
        out.append(f"Gone, and refuted: {said or 'none'}.\n")
    return "\n".join(out)
