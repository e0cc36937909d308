"""The audit of the audit: every check on a population of models whose truth is known, and what it could tell.

Gone: models retrained without the forget set. Not gone: untouched originals, and sabotage, models made from an original so that something an
audit may look at reads well while what was learnt is still there. Approximate methods are shown beside them without a truth.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row, audit, gate
from expunge.audits.verdict import UTILITY, default_rules, selftest
from expunge.bench.cells import add, begun
from expunge.bench.sabotage import SABOTAGE, masked
from expunge.core.errors import DataError
from expunge.core.files import write
from expunge.core.registry import CHECKS
from expunge.core.stats import Z, auc, wilson
from expunge.engine.run import unlearn
from expunge.modalities.worlds import World, cache_folder, world
from expunge.parts.reading import outputs
from expunge.planning.outcome import patched

REFERENCES = 3
"""Retrained models that the audits compare with; the population's own are others."""

METHODS = ("fine_tune", "random_label", "salun", "fisher_forgetting", "scrub", "bad_teacher")
"""Approximate methods that are shown beside the population, without a truth."""


def population(
    w: World, scenario: str, cache: Path | None, *, gone: int = 24, originals: int = 9, per_kind: int = 3
) -> Iterator[tuple[str, str, int, nn.Module, nn.Module]]:
    """(truth, kind, seed, original, model): truth is gone, kept or open. At the defaults 24 + 9 + 11 x 3 = 66 models of known truth.

    Beyond SABOTAGE there is `copied`: as masked, but taught the very answers of the retrained models that the audit compares with.
    """
    split, original = w.split(scenario), functools.cache(lambda k: w.original(k, cache))
    for k in range(gone):
        yield "gone", "retrained", k, original(k % originals), w.retrained(scenario, REFERENCES + k, cache)
    for k in range(originals):
        yield "kept", "untouched", k, original(k), original(k)
    for kind, make in SABOTAGE.items():
        for k in range(per_kind):
            yield "kept", kind, k, original(k), make(original(k), w.task, split, 100 + k)
    told = torch.stack([outputs(w.retrained(scenario, k, cache), w.task, split.forget) for k in range(REFERENCES)]).mean(0)
    for k in range(per_kind):
        yield "kept", "copied", k, original(k), masked(original(k), w.task, split, 100 + k, told)
    for name in METHODS:
        attempt = unlearn(name, original(0), w.task, split, seed=0)
        if attempt.patch is not None:
            yield "open", name, 0, original(0), patched(original(0), attempt)


def bench(name: str, scenarios: Sequence[str] = (), out: Path | str = "bench-out", *, progress=None, cache: Path | None = None) -> list[dict[str, Any]]:
    """Audit the population of each scenario; cells in OUT/NAME-power.jsonl are not run again. Writes OUT/NAME-power.md."""
    w, cache = world(name), cache or cache_folder()
    path = Path(out) / f"{name}-power.jsonl"
    done = begun(path, lambda c: (c["scenario"], c["kind"], c["seed"]), lambda c: c["digest"] == w.digest)
    for scenario in scenarios or w.scenarios:
        refs, store, trials = tuple(w.retrained(scenario, k, cache) for k in range(REFERENCES)), {}, {}
        for number, (truth, kind, seed, original, model) in enumerate(population(w, scenario, cache)):
            if progress:
                progress(f"{name} {scenario} {kind} {seed}", number, 66 + len(METHODS))
            if (scenario, kind, seed) in done:
                continue
            probe = Probe(original, model, w.task, w.split(scenario), refs, cache=store)
            if id(original) not in trials:
                trials[id(original)] = selftest(probe, default_rules(probe))
            rows, seconds = [], {}
            for check in CHECKS:
                start = time.process_time()
                rows += [{**asdict(r), "check": check} for r in audit(probe, [check])]
                seconds[check] = time.process_time() - start
            usable = {t.name: t.rule for t in trials[id(original)] if t.usable}
            cell = {
                "world": name,
                "digest": w.digest,
                "scenario": scenario,
                "truth": truth,
                "kind": kind,
                "seed": seed,
                "seconds": seconds,
                "rows": rows,
                "rules": usable,
            }
            done[scenario, kind, seed] = cell
            add(path, cell)
    cells = list(done.values())
    write(path.parent / f"{name}-power.md", markdown(cells), DataError)
    return cells


def values(cells: Sequence[Mapping[str, Any]], row: str) -> Tensor:
    """(N,) the row's value in each cell, nan where it was not measured."""
    found = [next((r["value"] for r in c["rows"] if r["name"] == row), None) for c in cells]
    return torch.tensor([math.nan if v is None else v for v in found], dtype=torch.double)


def strangeness(gone: Tensor, x: Tensor) -> Tensor:
    """(N,) |x - median(gone)| in median absolute deviations of the models that are gone: how unlike a retrained model a value is."""
    centre = gone.median()
    return (x - centre).abs() / (gone - centre).abs().median().clamp(min=1e-9)


def powers(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per row: AUC of telling kept from gone, power at 5 % false alarms with its interval, records needed, cost, and the row it repeats.

    Centre and spread come from one half of the retrained models, the threshold and the rates from the other half.
    """
    gone, kept = ([c for c in cells if c["truth"] == t] for t in ("gone", "kept"))
    names = list(dict.fromkeys(r["name"] for c in cells for r in c["rows"] if not r["name"].startswith(SAME)))
    out, seen = [], {}
    for name in names:
        a, b = values(gone, name), values(kept, name)
        fit, test = a[0::2], a[1::2]
        if torch.isnan(torch.cat([a, b])).any() or len(fit) < 2:
            continue
        s_gone, s_kept = strangeness(fit, test), strangeness(fit, b)
        cut = float(s_gone.sort().values[min(len(s_gone) - 1, math.ceil(0.95 * len(s_gone)) - 1)])
        hits = int((s_kept > cut).sum())
        power, low, high = wilson(hits, len(b))
        missed = sorted({c["kind"] for c, s in zip(kept, s_kept, strict=True) if s <= cut})
        check = next(r["check"] for c in cells for r in c["rows"] if r["name"] == name)
        seconds = sum(c["seconds"].get(check, 0.0) for c in cells) / len(cells)
        seen[name] = torch.cat([s_gone, s_kept])
        area = auc(s_kept, s_gone)
        n = max(r["n"] for c in cells for r in c["rows"] if r["name"] == name)
        out.append(
            {"row": name, "check": check, "auc": area[0], "auc_low": area[1], "power": power, "low": low, "high": high, "seconds": seconds, "missed": missed,
             "needed": needed(n, float(s_kept.median()))}
        )  # fmt: skip
    out.sort(key=lambda r: (-r["power"], -r["auc"], r["seconds"]))
    for k, r in enumerate(out):
        twin = max(out[:k], key=lambda q: _rank_correlation(seen[q["row"]], seen[r["row"]]), default=None)
        r["repeats"] = twin["row"] if twin is not None and _rank_correlation(seen[twin["row"]], seen[r["row"]]) > 0.95 else ""
    return out


def needed(n: int, distance: float) -> float:
    """Records at which the median model that is not gone would lie 2 x 1.645 standard deviations off, 5 % errors on either side.

    n          records behind the row; nan for a row that is one number per model
    distance   of that model, in median absolute deviations of models that are gone at n; their spread is taken to shrink as 1 / sqrt(n)

    >>> needed(100, 1.4826 * 3.29), needed(100, 0.0)
    (100.0, inf)
    """
    if n <= 1:
        return math.nan
    return math.inf if distance <= 0 else float(math.ceil(round(n * (2 * Z * 1.4826 / distance) ** 2, 1)))


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; 0 where one of them is constant."""
    from scipy.stats import spearmanr

    return 0.0 if float(a.std()) == 0 or float(b.std()) == 0 else float(spearmanr(a.numpy(), b.numpy()).statistic)


SAME = ("cost.", "accuracy.class", "klom_before.", "klom_floor.", "kl_floor.", "js_floor.")
"""Rows that are left out of the table: cost, single classes, and what does not depend on the candidate."""

ANSWERS = ("accuracy.", "drop.", "membership.")
"""Rows that only look at what the model answers."""

GATES: dict[str, Callable[[Mapping[str, str]], Mapping[str, str]]] = {
    "default": lambda rules: rules,
    "answers alone": lambda rules: {n: r for n, r in rules.items() if n.startswith(ANSWERS)},
    "without relearning": lambda rules: {n: r for n, r in rules.items() if n != "gap_closed.relearning"},
    "without KLOM": lambda rules: {n: r for n, r in rules.items() if "klom" not in n},
    "strict": lambda rules: {n: STRICT.get(n, r) for n, r in rules.items()},
}
"""Gate -> its rules, made of the default ones."""

STRICT = {"gap_closed.relearning": ">= 0.8", "gap_closed.klom": ">= 0.8", "klom_ratio.forget": "<= 2"}
"""What a strict gate asks for in place of the default rules."""


def accepted(cell: Mapping[str, Any], rules: Mapping[str, str]) -> bool:
    """Whether a gate of these rules takes the model: all hold, and one of them measures forgetting."""
    known = {"value", "low", "high", "name", "n", "note", "indicative", "at"}
    rows = [Row(**{k: v for k, v in r.items() if k in known}) for r in cell["rows"]]
    return not gate(rows, rules) and any(not n.startswith(UTILITY) for n in rules)


def gates(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per gate: shares of gone and of kept models it takes with one-sided 95 % bounds, the kinds it takes wrongly, CPU seconds of its checks."""
    out = []
    for name, of in GATES.items():
        took = {t: [c for c in cells if c["truth"] == t and accepted(c, of(c["rules"]))] for t in ("gone", "kept", "open")}
        count = {t: sum(c["truth"] == t for c in cells) for t in took}
        used = {r["check"] for c in cells for r in c["rows"] if r["name"] in of(c["rules"])}
        seconds = sum(c["seconds"].get(check, 0.0) for c in cells for check in used) / max(1, len(cells))
        passed = Counter(c["kind"] for c in took["kept"])
        out.append({"gate": name, "gone": wilson(len(took["gone"]), count["gone"]), "kept": wilson(len(took["kept"]), count["kept"]), "seconds": seconds,
                    "passes": [f"{k} {n}" for k, n in passed.items()], "open": [c["kind"] for c in took["open"]]})  # fmt: skip
    return out


def _count(n: float) -> str:
    return "-" if math.isnan(n) else "any" if n <= 1 else f"{n:,.0f}" if n <= 100_000 else "more than 100,000"


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """Per scenario the table of checks, strongest first."""
    out = []
    for key in dict.fromkeys((c["world"], c["scenario"]) for c in cells):
        mine = [c for c in cells if (c["world"], c["scenario"]) == key]
        count = {t: sum(c["truth"] == t for c in mine) for t in ("gone", "kept")}
        out.append(f"### {key[0]}, {key[1]}: {count['gone']} models that are gone, {count['kept']} that are not\n")
        out.append("| gate | takes models that are gone | takes models that are not | wrongly taken | methods taken | CPU s |\n|---|---|---|---|---|---|")
        for g in gates(mine):
            shares = [f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in (g["gone"], g["kept"])]
            out.append(
                f"| {g['gate']} | {shares[0]} | {shares[1]} | {', '.join(g['passes']) or 'none'} | {', '.join(g['open']) or 'none'} | {g['seconds']:.2f} |"
            )
        rules = "; ".join(f"{n} {r}" for n, r in mine[0]["rules"].items())
        out.append(f"\nUsable default rules on the first original: {rules}.\n")
        out.append("| row | power at 5 % false alarms | AUC | records needed | CPU s | misses | repeats |\n|---|---|---|---|---|---|---|")
        for r in powers(mine):
            missed = ", ".join(r["missed"]) or "none"
            power = f"{r['power']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
            out.append(f"| {r['row']} | {power} | {r['auc']:.2f} | {_count(r['needed'])} | {r['seconds']:.2f} | {missed} | {r['repeats']} |")
        out.append("")
    return "\n".join(out)
