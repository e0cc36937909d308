"""`expunge demo`: the main job on real data in a minute or two: digits, a class and records with wrong labels, both audited against retraining."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from expunge.audits.grade import GRADES
from expunge.bench.run import PRESETS, retrain_passes
from expunge.core.digest import model_digest
from expunge.core.registry import CHECKS
from expunge.modalities.worlds import world
from expunge.planning import plan
from expunge.planning.outcome import Verdict
from expunge.report import table

SCENARIOS = {"class": "digits", "wrong": "digits-wrong"}
"""Scenario -> its world: one class of ten, and the twentieth part of the records, whose labels are wrong. Both are known by heart or not at all, so that
whether they were forgotten can be measured. (Of records drawn at random with right labels nothing can: a model that never saw them knows them as well.)"""

METHODS = {
    "class": ("scrub", "class_concepts", "random_label", "salun", "bad_teacher", "ssd", "fisher_forgetting", "fine_tune"),
    "wrong": ("scrub", "salun", "bad_teacher", "fisher_forgetting", "fine_tune", "prune_unlearn", "reset_fine_tune"),
}
"""What the demo compares, besides the retrained references."""

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {"class": {"scrub": {"epochs": 6}, "class_concepts": {"epochs": 15.0, "lr": 1e-3}}, "wrong": {}}
"""Where they differ from the defaults: as the autopilot's longer runs have them, since what fewer passes leave is a suppression, or harms."""

BRIEF = ("accuracy", "klom", "divergence", "drop", "membership", "cost")
"""Checks of the seeds after the first."""

COSTLY = ("membership_svc", "literature")
"""What the first seed leaves out: an SVC per feature and model, of use for comparison with papers alone."""


def demo(folder: Path | str = "expunge-demo", *, seeds: int = 3, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Train, forget, audit, gate, patch, apply, revert. Writes one sub-folder per scenario with report.html, report.json and the patch, or the best candidate
    where none passed.

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
    """One scenario: its document, and whether the reverted model is bit-identical (None where no method left a patch). `said` takes progress.

    Wrong labels are forgotten without validation, methods as given: its score asks forgotten records to look like unseen ones, whose labels are right.
    """
    torch.set_num_threads(1)

    def progress(text: str, done: int, total: int) -> None:
        said.put((f"{scenario}: {text}", done, total))

    w, cache, here = world(SCENARIOS[scenario]), folder / "models", folder / scenario
    split, verdicts = w.split(scenario), []
    split = replace(split, validation=None) if scenario == "wrong" else split
    references = [w.retrained(scenario, k, cache, progress) for k in range(3)]
    for seed in range(seeds):
        model = w.original(seed, cache, progress)
        verdicts.append(
            plan.forget(
                model,
                w.task,
                split,
                references=references,
                methods=METHODS[scenario],
                settings={**{name: given for name, given in PRESETS.get(w.name, {}).items() if name in METHODS[scenario]}, **SETTINGS[scenario]},
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
    reverted = _undone(first, here, document)
    merged.save(here, document=document)
    return document, reverted


def _undone(first: Verdict, here: Path, document: dict[str, Any]) -> bool | None:
    """Whether the patch that passed, or that of the best try, kept as a candidate, goes through a file and is undone bit for bit by its inverse."""
    shown = first.shown
    if shown is None or shown.attempt.patch is None:
        return None
    kept = first.keep(here / "candidate") / "candidate.safetensors" if first.chosen is None else shown.attempt.patch.save(here / "patch.safetensors")
    same = _round_trip(first.probe.before, kept)
    document["notes"].append(f"The saved patch was loaded, applied and reverted: the reverted model is {'bit-identical' if same else 'NOT identical'}.")
    return same


def told(result: dict[str, Any], out: str) -> list[str]:
    """What the terminal says after the reports: of each scenario what had to go, what became of the methods, losses before and after, and where to read on."""
    lines = []
    for name, document in result["scenarios"].items():
        tries = [t for t in document["tries"] if t["grade"]]
        grades = Counter(t["grade"] for t in tries)
        counts = ", ".join(f"{grades[grade]} {grade}" for grade in reversed(GRADES) if grades[grade])
        medians = {r["model"]: table.number(r["at"][2]) for r in document["front"]["losses"] if r["records"] == "forget"}
        words = {"before": "before", "after": "after the best try", "retrained": "in models that never saw them"}
        lines += [
            f"{name}: forget {document['asked']} ({document['parts']['forget']} of {document['parts']['forget'] + document['parts']['retain']} records). "
            f"{len({t['method'] for t in tries})} methods, {len(tries)} audited runs: {counts or 'no grade'}.",
            f"  Median loss of what had to go: {', '.join(f'{value} {words[model]}' for model, value in medians.items())}.",
            f"  Report in {out}/{name}/report.html and report.json.",
        ]  # fmt: skip
        if name in result["reverted"]:
            what = "The patch" if document["chosen"] else f"No try passed; the best is kept to be looked at in {out}/{name}/candidate. Its patch"
            lines.append(f"  {what} was saved, applied and reverted: the model is {'bit-identical' if result['reverted'][name] else 'NOT bit-identical'}.")
    return [*lines, f"{result['seconds']:.0f} seconds"]


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
