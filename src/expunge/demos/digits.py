"""`expunge demo`: the main job on real data in two minutes: digits, a class and 10 % of the records, all audited against retraining."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from expunge.bench.run import retrain_passes
from expunge.core.digest import model_digest
from expunge.core.registry import CHECKS
from expunge.modalities.worlds import SCENARIOS, world
from expunge.planning import plan
from expunge.planning.outcome import Verdict

METHODS = ("scrub", "negrad_plus", "random_label", "salun", "bad_teacher", "ssd", "fisher_forgetting", "fine_tune")
"""What the demo compares, besides the retrained reference."""

BRIEF = ("accuracy", "klom", "divergence", "drop", "membership", "cost")
"""Checks of the seeds after the first."""

COSTLY = ("membership_svc", "literature")
"""What the first seed leaves out: an SVC per feature and model, of use for comparison with papers alone."""


def demo(folder: Path | str = "expunge-demo", *, seeds: int = 3, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Train, forget, audit, gate, patch, apply, revert. Writes one sub-folder per scenario with report.html, report.json and the patch.

    Each scenario runs in a process of its own on one thread. Returns {"scenarios": {name: document}, "reverted": {name: bool}, "seconds": float}.
    """
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(SCENARIOS), mp_context=context) as workers:
        said = manager.Queue()
        runs = {name: workers.submit(run, name, Path(folder), seeds, said) for name in SCENARIOS}
        while not all(r.done() for r in runs.values()):
            try:
                news = said.get(timeout=0.2)
            except queue.Empty:
                continue
            if progress:
                progress(*news)
        done = {name: r.result() for name, r in runs.items()}
    documents = {name: document for name, (document, _) in done.items()}
    reverted = {name: same for name, (_, same) in done.items() if same is not None}
    return {"scenarios": documents, "reverted": reverted, "seconds": time.perf_counter() - start}


def run(scenario: str, folder: Path, seeds: int, said: Any) -> tuple[dict[str, Any], bool | None]:
    """One scenario: its document, and whether the reverted model is bit-identical (None without a patch). `said` takes progress."""
    torch.set_num_threads(1)

    def progress(text: str, done: int, total: int) -> None:
        said.put((f"{scenario}: {text}", done, total))

    w, cache, here = world("digits"), folder / "models", folder / scenario
    split, verdicts, reverted = w.split(scenario), [], None
    references = [w.retrained(scenario, k, cache, progress) for k in range(3)]
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
                checks=BRIEF if seed else [c for c in CHECKS if c not in COSTLY],
                progress=progress,
            )
        )
    first = verdicts[0]
    merged = replace(first, tries=tuple(t for v in verdicts for t in v.tries))
    document = merged.document(f"Digits: forget {split.asked}")
    document["gates"] = {f"seed {s}": asdict_verdict(v) for s, v in enumerate(verdicts)}
    if first.chosen is not None and first.chosen.attempt.patch is not None:
        reverted = _round_trip(first.probe.before, first.chosen.attempt.patch.save(here / "patch.safetensors"))
        document["notes"].append(f"The saved patch was loaded, applied and reverted: the reverted model is {'bit-identical' if reverted else 'NOT identical'}.")
    merged.save(here, document=document)
    return document, reverted


def asdict_verdict(v: Verdict) -> dict[str, Any]:
    """Passed, chosen method and reasons of one seed, with its self-test."""
    return {"passed": v.passed, "chosen": v.chosen and v.chosen.attempt.method, "reasons": v.reasons, "selftest": [asdict(t) for t in v.trials]}


def _round_trip(model, path: Path) -> bool:
    from expunge.core.patch import Patch

    before = model_digest(model)
    undo = Patch.load(path).apply(model)
    changed = model_digest(model) != before
    undo.apply(model)
    return changed and model_digest(model) == before
