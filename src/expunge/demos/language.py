"""`expunge demo-llm`: a small language model learns invented authors, forgets two of them, keeps the others, and a report proves it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from expunge.bench.run import retrain_passes
from expunge.core.digest import model_digest
from expunge.core.patch import Patch
from expunge.engine.jobs import map_jobs
from expunge.modalities.language import checkpoints
from expunge.modalities.worlds import world
from expunge.planning import plan
from expunge.planning.outcome import patched

METHODS = ("tnpo",)
"""What the autopilot may try here, at two step sizes."""

REFERENCES = 2
"""Models retrained without the two authors."""


def demo(folder: Path | str = "expunge-demo-llm", *, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Train, ask, forget, ask again, audit, release, load what was released, revert.

    Writes report.html, report.json, patch.safetensors and released/ (a folder that transformers loads) to `folder`. Returns {"document", "talk", "released",
    "same_answers", "reverted", "seconds"}: talk is a list of {"about", "question", "truth", "before", "after"}.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    here, w = Path(folder), world("authors")
    split, models = w.split("forget10"), here / "models"
    what = "training the model, and models without the two authors"
    said = None if progress is None else lambda _, done, total: progress(what, done, total)
    map_jobs(functools.partial(trained, folder=models), range(REFERENCES + 1), workers=2, progress=said)
    model = w.original(0, models)
    references = [w.retrained("forget10", k, models) for k in range(REFERENCES)]
    verdict = plan.forget(model, w.task, split, references=references, methods=METHODS, retrain_passes=retrain_passes(w, "forget10"), progress=progress)
    shown = verdict.chosen or next((t for t in reversed(verdict.tries) if t.attempt.patch is not None), None)
    after = model if shown is None else patched(model, shown.attempt)
    document = verdict.document(f"Forget two authors: {split.asked}")
    verdict.save(here, document=document)
    result: dict[str, Any] = {"document": document, "talk": document["talk"], "released": None, "same_answers": None, "reverted": None}
    if verdict.chosen is not None:
        tokenizer = split.forget.format.tokenizer
        released = checkpoints.release(model, tokenizer, verdict.chosen.attempt.patch, here / "released", form="merged")
        loaded, _ = checkpoints.load(released)
        rows = split.forget.take(range(4))
        result["released"] = str(released)
        sample = w.task.sample
        assert sample is not None
        result["same_answers"] = sample(loaded, rows, new=24) == sample(after, rows, new=24)
        before = model_digest(model)
        Patch.load(here / "patch.safetensors").apply(model).apply(model)
        result["reverted"] = model_digest(model) == before
    return {**result, "seconds": time.perf_counter() - start}


def trained(k: int, folder: Path) -> None:
    """Train the original (k = 0) or the k-th retrained model into `folder`, on one thread."""
    torch.set_num_threads(1)
    w = world("authors")
    if k:
        w.retrained("forget10", k - 1, folder)
    else:
        w.original(0, folder)


def told(result: dict[str, Any], out: str) -> list[str]:
    """What the terminal says after the report: answers before and after, and what was released."""
    lines = [f"\n[{turn['about']}] {turn['question']}\n  before  {turn['before']}\n  after   {turn['after']}" for turn in result["talk"]]
    lines.append(f"\nreport in {out}/report.html and report.json")
    if result["released"]:
        lines.append(f"released model in {result['released']}: loaded without expunge it gives {'the same' if result['same_answers'] else 'OTHER'} answers")
        lines.append(f"patch applied and reverted: the model is {'bit-identical' if result['reverted'] else 'NOT bit-identical'}")
    return [*lines, f"{result['seconds']:.0f} seconds"]
