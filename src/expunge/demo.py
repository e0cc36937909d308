"""`expunge demo`: the main job on real data in two minutes: digits, a class and 10 % of the records, all audited against retraining."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from expunge import plan
from expunge.bench.run import retrain_passes
from expunge.bench.worlds import SCENARIOS, world
from expunge.report import html, table
from expunge.run import model_digest

METHODS = ("scrub", "negrad_plus", "random_label", "salun", "bad_teacher", "ssd", "fisher_forgetting", "fine_tune")
"""What the demo compares, besides the retrained reference."""

BRIEF = ("accuracy", "klom", "divergence", "drop", "membership", "cost")
"""Checks of the seeds after the first, which gets all of them."""


def demo(folder: Path | str = "expunge-demo", *, seeds: int = 3, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Train, forget, audit, gate, patch, apply, revert. Writes one sub-folder per scenario with report.html, report.json and the patch.

    Returns {"scenarios": {name: document}, "reverted": {name: bool}, "seconds": float}.
    """
    start, folder, w = time.perf_counter(), Path(folder), world("digits")
    cache = folder / "models"
    documents, reverted = {}, {}
    for scenario in SCENARIOS:
        split = w.split(scenario)
        references = [w.retrained(scenario, k, cache, progress) for k in range(3)]
        verdicts = []
        for seed in range(seeds):
            model = w.original(seed, cache, progress)
            verdicts.append(
                plan.forget(
                    model,
                    w.task,
                    split,
                    references=references,
                    methods=METHODS,
                    seed=seed,
                    retrain_passes=retrain_passes(w, scenario),
                    scales=(1.0,),
                    stop=False,
                    slow=seed == 0,
                    checks=BRIEF if seed else (),
                    progress=progress,
                )
            )
        first = verdicts[0]
        merged = replace(first, tries=tuple(t for v in verdicts for t in v.tries))
        document = merged.document(f"Digits: forget {split.asked}")
        here = folder / scenario
        if first.chosen is not None and first.chosen.attempt.patch is not None:
            path = first.chosen.attempt.patch.save(here / "patch.safetensors")
            document["chosen"]["patch"] = path.name
            reverted[scenario] = _round_trip(first.probe.before, path)
            document["notes"].append(
                f"The saved patch was loaded, applied and reverted: the reverted model is {'bit-identical' if reverted[scenario] else 'NOT identical'}."
            )
        document["gates"] = {f"seed {s}": asdict_verdict(v) for s, v in enumerate(verdicts)}
        html.write(document, here / "report.html")
        table.write(document, here / "report.json")
        documents[scenario] = document
    return {"scenarios": documents, "reverted": reverted, "seconds": time.perf_counter() - start}


def asdict_verdict(v: plan.Verdict) -> dict[str, Any]:
    """Passed, chosen method and reasons of one seed, with its self-test."""
    return {"passed": v.passed, "chosen": v.chosen and v.chosen.attempt.method, "reasons": v.reasons, "selftest": [asdict(t) for t in v.trials]}


def _round_trip(model, path: Path) -> bool:
    from expunge.patch import Patch

    before = model_digest(model)
    undo = Patch.load(path).apply(model)
    changed = model_digest(model) != before
    undo.apply(model)
    return changed and model_digest(model) == before
