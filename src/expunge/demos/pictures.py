"""`expunge demo-images`: a small diffusion model learns to draw four objects in four styles, forgets one style, keeps the others, and a report proves it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from expunge.bench.run import retrain_passes
from expunge.core.digest import model_digest
from expunge.core.patch import Patch
from expunge.modalities.worlds import cache_folder, world
from expunge.planning import plan

WORLD, SCENARIO = "shapes-small", "style"

METHODS = ("uce", "concept_ablation", "esd")
"""What the autopilot may try here, in order of cost: the first solves for the weights, the others train for some seconds."""

SETTINGS = {"uce": {"tokens": "tail", "preserve": 10.0}, "concept_ablation": {"alpha": 1.0}, "esd": {"alpha": 1.0}}
"""With four styles there is little to tell a style by: UCE maps the tokens after the concept's own too and holds the kept prompts ten times as firmly, and
the trained methods hold them at all, which as published they do not."""


def demo(folder: Path | str = "expunge-demo-images", *, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Train, erase a style, audit, write the report, apply the patch, revert it.

    Writes report.html, report.json and patch.safetensors to `folder`. The model stays in EXPUNGE_CACHE (.cache/expunge), where a second run finds it. While
    a process of its own trains it, this one trains the judge.
    Returns {"document", "before": {domain: share drawn rightly}, "judge": {domain: share}, "reverted", "seconds": {stage: seconds}}.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    cache, w = cache_folder(), world(WORLD)
    task: Any = w.task
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as worker:
        run = worker.submit(trained, cache)
        if progress:
            progress("training the model that draws, and the judge that looks", 0, 1)
        judge = task.judge()
        judged = time.perf_counter()
        run.result()
    split, model = w.split(SCENARIO), w.original(0, cache)
    ready = time.perf_counter()
    verdict = plan.forget(model, task, split, methods=METHODS, settings=SETTINGS, retrain_passes=retrain_passes(w, SCENARIO), slow=False, progress=progress)
    audited = time.perf_counter()
    document = verdict.document(f"Forget how to draw {split.asked}")
    verdict.save(folder, document=document)
    reverted = None
    if verdict.chosen is not None:
        before = model_digest(model)
        undo = Patch.load(Path(folder) / "patch.safetensors").apply(model)
        changed = model_digest(model) != before
        undo.apply(model)
        reverted = changed and model_digest(model) == before
    end = time.perf_counter()
    return {
        "document": document, "before": untouched(document), "judge": {d: float(r.float().mean()) for d, r in judge.right.items()}, "reverted": reverted,
        "seconds": {"judge": judged - start, "model": ready - start, "erase and audit": audited - ready, "report": end - audited, "all": end - start},
    }  # fmt: skip


def untouched(document: dict[str, Any]) -> dict[str, float]:
    """Share of its drawings that the judge names rightly before anything is erased, per domain; empty where nothing was drawn.

    >>> untouched({"pictures": {"retainability": [{"erased": "", "right": {"style": {"plain": [9, 10], "dotted": [10, 10]}}}]}})
    {'style': 0.95}
    """
    row = next((r for r in document.get("pictures", {}).get("retainability", ()) if not r["erased"]), {"right": {}})
    return {d: sum(hits for hits, _ in found.values()) / sum(n for _, n in found.values()) for d, found in row["right"].items()}


def told(result: dict[str, Any], out: str) -> list[str]:
    """Lines that the command line prints after the report: how well the model drew, where the pictures are, what each stage took."""
    lines = [
        f"{domain}: the untouched model drew {share:.3f} of its drawings as asked; the judge is right on {result['judge'][domain]:.3f} of held-out images"
        for domain, share in result["before"].items()
    ]
    lines.append(f"drawings before and after, and heat maps, in {out}/report.html")
    if result["reverted"] is not None:
        lines.append(f"patch applied and reverted: the model is {'bit-identical' if result['reverted'] else 'NOT bit-identical'}")
    return [*lines, ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["seconds"].items())]


def trained(cache: Path) -> None:
    """Train the model into `cache`, on one thread."""
    torch.set_num_threads(1)
    world(WORLD).original(0, cache)
