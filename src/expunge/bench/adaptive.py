"""An adversary that adapts: for every trick with one strength, the strength that passes a gate while what was learnt can still be had.

A gate is a callable model -> Heard. `audit_gate` asks the audit, `repaired_gate` asks it with the rules of `audits.attacks.repair.LIMITS` on top; whatever
`passed` means to the audit is what counts. What is left is read by someone who knows the truth: repairs, weights put back, relearning from one half, and the
trick undone where it can be. A cheat passes the gate with at least HALF of the gap between original and retrained models still to be had.

    for cheat in bench("digits", ["class"], references=3): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from expunge.audits.attacks import mend
from expunge.audits.attacks.repair import HALF, LIMITS
from expunge.audits.core import Probe, Row, audit, bounds
from expunge.audits.verdict import checks_for, default_rules, selftest
from expunge.bench import sabotage, sabotage_texts
from expunge.bench.cells import add, begun
from expunge.bench.sabotage import Family
from expunge.core.errors import DataError
from expunge.core.files import write
from expunge.core.machine.devices import reseeded
from expunge.core.stats import wilson
from expunge.engine.run import Attempt
from expunge.modalities.worlds import World, cache_folder, world
from expunge.parts.seal import strict
from expunge.planning.outcome import audited, examined

FAMILIES: Mapping[str, Mapping[str, Family]] = {"classification": sabotage.FAMILIES, "causal_lm": sabotage_texts.FAMILIES}
"""Task -> its tricks."""

HALVES = {"classification": sabotage.HALVES, "causal_lm": sabotage_texts.HALVES}
"""Task -> its tricks in two halves: limits are chosen on the first, tested on the second."""

GRID, BUDGET = 5, 9
"""Strengths that are tried first, and how often a gate may be asked in all."""

LIGHT = 0.1
"""Largest share of the weights that an attacker who holds the original puts back; with more he might as well take the original."""

GONE = 12
"""Retrained models, other than the references, that no gate should refuse."""


@dataclass(frozen=True)
class Heard:
    """What a gate said: passed or not, by how much its rules are missed in all (0 where none is), and in words."""

    passed: bool
    short: float
    said: str = ""


Gate = Callable[[nn.Module], Heard]
Knowledge = Callable[[nn.Module, Family], tuple[float, str]]
Build = Callable[[float], nn.Module]


@dataclass(frozen=True)
class Cheat:
    """The end of a search: strength, whether the gate took it, what is left to be had and by what, the share of weights that were touched, calls of the gate.

    found    the gate passed it and at least HALF is left
    """

    family: str
    strength: float
    passed: bool
    left: float
    by: str
    touched: float
    calls: int
    said: str

    @property
    def found(self) -> bool:
        return self.passed and self.left >= HALF


def search(
    name: str, family: Family, build: Build, gate: Gate, knowledge: Knowledge, touched: Callable[[nn.Module], float] = lambda model: math.nan,
    budget: int = BUDGET, sure: Callable[[nn.Module], bool] = lambda model: True,
) -> Cheat:  # fmt: skip
    """The first strength that passes with enough left; if there is none, the one that came nearest (passed first, then least short).

    sure    a slower form of the gate, asked of what the gate takes and of which enough is left

    GRID strengths apart by one ratio, then the middle of the widest interval beside the nearest one, until `budget` calls are made. Deterministic.

    >>> trick = Family(lambda *a: None, 1.0, 100.0, "")
    >>> c = search("x", trick, lambda s: s, lambda m: Heard(20 <= m <= 24, abs(m - 22)), lambda m, f: (1.0, "all"), budget=12)
    >>> c.found, round(c.strength)
    (True, 24)
    """
    low, high = math.log(family.low), math.log(family.high)
    tried: dict[float, Cheat] = {}
    short: dict[float, float] = {}
    todo = [low + (high - low) * k / (GRID - 1) for k in range(GRID)]
    while len(tried) < budget:
        if not todo:
            places = sorted(tried)
            best = min(places, key=lambda u: (short[u], u))
            k = places.index(best)
            gaps = [(b - a, -a) for a, b in zip(places[max(0, k - 1) : k + 1], places[max(0, k - 1) + 1 : k + 2], strict=False)]
            width, start = max(gaps)
            if width < 1e-3:
                break
            todo = [-start + width / 2]
        u = todo.pop(0)
        model = build(math.exp(u))
        heard = gate(model)
        left, by = knowledge(model, family) if heard.passed else (math.nan, "")
        if heard.passed and left >= HALF and not sure(model):
            heard = replace(heard, passed=False, short=1e-6)
        tried[u] = Cheat(name, math.exp(u), heard.passed, left, by, touched(model), len(tried) + 1, heard.said)
        short[u] = heard.short
        if tried[u].found:
            return tried[u]
    nearest = min(tried, key=lambda u: (not tried[u].passed, short[u], u))
    return replace(tried[nearest], calls=len(tried))


def missed(rows: Sequence[Row], rules: Mapping[str, str]) -> float:
    """Sum over the rules of log(1 + how far the worse end lies outside), at most 10 each, as for a row that is missing."""
    by_name, total = {r.name: r for r in rows}, 0.0
    for name, rule in rules.items():
        low, high = bounds(rule)
        row = by_name.get(name)
        far = math.inf if row is None or math.isnan(row.value) else max(row.high - high, low - row.low, 0.0)
        total += min(10.0, math.log1p(far))
    return total


def audit_gate(
    before: nn.Module, task, split, references: Sequence[nn.Module] = (), more: Mapping[str, str] = {}, seed: int = 0
) -> tuple[Gate, Callable[[nn.Module], bool]]:  # fmt: skip
    """(gate, sure): the verdict of `planning.outcome.audited`, with `more` rules beside the default ones.

    What is at least `supported` has passed: a cheat need not be verified. The gate does the self-test once and measures for each model the rows that rules
    read; `sure` puts a model before `audited` itself.
    """
    p = Probe(before, before, task, split, tuple(references), seed)
    rules = {**default_rules(p), **more}
    trials = tuple(selftest(p, rules))
    usable = {t.name: t.rule for t in trials if t.usable}
    base = dict(p.cache)

    def gate(model: nn.Module) -> Heard:
        one = examined(replace(p, cache=dict(base)), Attempt("given", {}, seed, "ok", "", None), model, trials, False, checks_for(rules), require="supported")
        read = {r.name: r for r in one.rows}
        said = "; ".join(f"{n} {read[n].value:.3g}" for n in usable if n in read)
        return Heard(one.passed, 0.0 if one.passed else max(missed(one.rows, usable), 1e-6), said)

    def sure(model: nn.Module) -> bool:
        return bool(audited(before, model, task, split, references=references, rules=rules, seed=seed, slow=False, require="supported").passed)

    return gate, sure


def repaired_gate(before: nn.Module, task, split, references: Sequence[nn.Module] = (), seed: int = 0) -> tuple[Gate, Callable[[nn.Module], bool]]:
    """The same with the recommended rules on repairs; those that no row answers here are left out."""
    p = Probe(before, before, task, split, tuple(references), seed)
    there = {r.name for r in audit(p, ["repair"]) if not math.isnan(r.value) and not r.indicative}
    return audit_gate(before, task, split, references, {n: rule for n, rule in LIMITS.items() if n in there}, seed)


GATES: dict[str, Callable[..., tuple[Gate, Callable[[nn.Module], bool]]]] = {"default": audit_gate, "with repairs": repaired_gate}
"""Gates that are tried."""


def left(before: nn.Module, task, split, references: Sequence[nn.Module], seed: int = 0) -> Knowledge:
    """What is still to be had, as a share of the gap between the original and retrained models, and by what: the best of the repairs for free, at most LIGHT
    of the weights put back, relearning, a new last layer, and the trick undone."""
    p = Probe(before, before, task, split, tuple(references), seed)
    audit(p, ["repair", "relearning"])
    base = dict(p.cache)

    def knowledge(model: nn.Module, family: Family) -> tuple[float, str]:
        found = {r.name: r for r in audit(replace(p, after=model, cache=dict(base)), ["repair", "relearning"])}
        ways = {"repair.free": found["repair.free"].value} if "repair.free" in found else {}
        if (row := found.get("repair.weights")) is not None and row.value <= LIGHT:
            ways["weights put back"] = HALF
        if (row := found.get("gap_closed.relearning")) is not None:
            ways["relearning"] = 1 - row.value
        if family.undo is not None:
            after, other_task, other = family.undo(model, task, split)
            rows = {r.name: r for r in audit(Probe(before, after, other_task, other, tuple(references), seed), ["repair"])}
            ways["the trick undone"] = rows["repair.free"].value if "repair.free" in rows else math.nan
        ways = {k: v for k, v in ways.items() if not math.isnan(v)}
        best = max(ways, key=lambda k: ways[k], default="")
        return (min(1.0, ways[best]), best) if best else (math.nan, "")

    return knowledge


def share_touched(before: nn.Module, model: nn.Module) -> float:
    """Share of the original's weights that differ."""
    both = mend.changed(before, model)
    return sum(int((a != b).sum()) for a, b in both.values()) / max(1, sum(t.numel() for t in mend.tensors(before).values()))


def bench(
    name: str, scenarios: Sequence[str] = (), out: Path | str = "bench-out", *, references: int = 3, gates: Iterable[str] = tuple(GATES),
    progress: Callable[[str, int, int], None] | None = None, cache: Path | None = None, budget: int = BUDGET, gone: int = GONE,
) -> list[dict[str, Any]]:  # fmt: skip
    """Search every family against every gate, with that many references and (for more than none) with none, and try `gone` retrained models on the same gates.

    Cells in OUT/NAME-adaptive.jsonl are not run again. Writes OUT/NAME-adaptive.md.
    """
    w, cache = world(name), cache or cache_folder()
    path = Path(out) / f"{name}-adaptive.jsonl"
    done = begun(path, _key, lambda c: c["digest"] == w.digest)
    families = FAMILIES[w.task.name]
    for scenario in scenarios or w.scenarios:
        original, split = w.original(0, cache), w.split(scenario)
        told = tuple(w.retrained(scenario, k, cache) for k in range(max(1, references)))
        knowledge = left(original, w.task, split, told)
        for count in dict.fromkeys((references, 0)):
            for label in gates:
                gate, n = GATES[label](original, w.task, split, told[:count]), len(families) + gone
                head = {"world": name, "digest": w.digest, "scenario": scenario, "references": count, "gate": label}
                for number, (kind, run) in enumerate(_cells(w, scenario, families, original, told, told[:count], *gate, knowledge, cache, budget, gone)):
                    if progress:
                        progress(f"{name} {scenario}, {count} references, gate {label}: {kind}", number, n)
                    cell = {**head, "kind": kind}
                    if _key(cell) in done:
                        continue
                    cell = strict({**cell, **run()})
                    done[_key(cell)] = cell
                    add(path, cell)
    cells = list(done.values())
    write(path.parent / f"{name}-adaptive.md", markdown(cells), DataError)
    return cells


def _key(cell: Mapping[str, Any]) -> tuple:
    return tuple(cell[k] for k in ("scenario", "references", "gate", "kind"))


def _cells(
    w: World, scenario: str, families, original, told, references, gate, sure, knowledge, cache, budget, gone
) -> Iterable[tuple[str, Callable[[], dict[str, Any]]]]:  # fmt: skip
    split = w.split(scenario)

    def repairs(model: nn.Module) -> dict[str, list[float]]:
        rows = audit(Probe(original, model, w.task, split, references), ["repair"])
        return {r.name: [r.value, r.low, r.high] for r in rows}

    for name, family in families.items():

        def run(name: str = name, family: Family = family) -> dict[str, Any]:
            def build(s: float) -> nn.Module:
                with reseeded(0):
                    return family.make(original, w.task, split, 0, s, told)

            cheat = search(name, family, build, gate, knowledge, lambda m: share_touched(original, m), budget, sure)
            return {"truth": "kept", "found": cheat.found, **asdict(cheat), "repairs": repairs(build(cheat.strength))}

        yield name, run
    for k in range(gone):

        def fair(k: int = k) -> dict[str, Any]:
            model = w.retrained(scenario, len(told) + k, cache)
            heard = gate(model)
            return {"truth": "gone", "passed": heard.passed, "said": heard.said, "repairs": repairs(model)}

        yield f"retrained {k + 1}", fair


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """Per scenario and number of references: how many families pass each gate, how many retrained models it refuses; then the cheats."""
    out = []
    for key in dict.fromkeys((c["world"], c["scenario"], c["references"]) for c in cells):
        mine = [c for c in cells if (c["world"], c["scenario"], c["references"]) == key]
        out.append(f"### {key[0]}, {key[1]}, {key[2]} retrained models\n")
        out.append("| gate | families that pass with at least half left | retrained models refused | which pass |\n|---|---|---|---|")
        for label in dict.fromkeys(c["gate"] for c in mine):
            kept, gone = ([c for c in mine if c["gate"] == label and c["truth"] == t] for t in ("kept", "gone"))
            passed, refused = [c for c in kept if c["found"]], sum(not c["passed"] for c in gone)
            rate = "{:.2f} ({:.2f} to {:.2f}, n = {})".format(*wilson(refused, len(gone)), len(gone)) if gone else "-"
            out.append(f"| {label} | {len(passed)} of {len(kept)} | {rate} | {', '.join(c['kind'] for c in passed) or 'none'} |")
        out.append("\n| family | gate | strength | left, by | weights touched | calls | what the gate read |\n|---|---|---|---|---|---|---|")
        for c in sorted((c for c in mine if c["truth"] == "kept" and c["found"]), key=lambda c: (c["gate"], c["touched"])):
            said = c["said"].replace("|", "/")
            out.append(f"| {c['kind']} | {c['gate']} | {c['strength']:.3g} | {c['left']:.2f}, {c['by']} | {c['touched']:.2%} | {c['calls']} | {said} |")
        out.append("")
    return "\n".join(out)
