"""`expunge demo --exact`: fifty people ask for deletion, one after another, and each request is served exactly, by four designs side by side."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.files import write
from expunge.core.machine.devices import reseeded
from expunge.core.modality import of
from expunge.core.stats import wilson
from expunge.core.types import Records
from expunge.guarantees.exact.design import Design, s3t, safe, sisa
from expunge.guarantees.exact.ensemble import fit
from expunge.guarantees.exact.stream import document, plot, serve
from expunge.modalities.classification.task import classification
from expunge.parts import training
from expunge.report.page import page

REQUESTS = 50
PUBLIC, HELD = 400, 397
"""Digits that the frozen backbone is trained on, which nobody asks to delete, and digits to test on; 1,000 are the records that may go."""

DESIGNS: dict[str, Design] = {
    "SISA, 5 x 6": sisa(shards=5, slices=6, epochs=20),
    "S3T, 5 x 6, budget 6": s3t(shards=5, slices=6, budget=6, epochs=6),
    "SAFE, 16 in cliques of 2": safe(shards=16, clique=2, epochs=20),
    "SAFE, 16 isolated": safe(shards=16, graph="isolated", epochs=20),
}

HEADS: dict[str, Any] = {"batch_size": 32, "lr": 0.05, "momentum": 0.9}
ADAPTERS: dict[str, Any] = {"batch_size": 32, "lr": 2e-3, "optimizer": "adamw", "momentum": 0.0, "rank": 8}


def digits() -> tuple[Records, Records, Tensor, Tensor]:
    """(public, private, x, y of held-out digits): scikit-learn's 1,797 digits in [0, 1], (N, 64), by a fixed seed."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    public, held, private = order[:PUBLIC], order[PUBLIC : PUBLIC + HELD], order[PUBLIC + HELD :]
    rows = of(classification()).rows
    return rows(x[public], y[public], public), rows(x[private], y[private], private), x[held], y[held]


def deep(width: int = 64, depth: int = 6, seed: int = 0) -> nn.Sequential:
    """An MLP with `depth` hidden layers, one per adapter block of S3T, and a head."""
    with reseeded(seed):
        layers: list[nn.Module] = []
        for k in range(depth):
            layers += [nn.Linear(64 if k == 0 else width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 10))


def demo(folder: Path | str = "expunge-demo-exact", *, requests: int = REQUESTS, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Train a backbone on public digits, fit each design on private ones, delete `requests` of them one at a time, write report.html, report.json and the
    proofs.

    Returns {"designs": {name: document}, "monolithic": accuracy, "public": accuracy of the backbone alone, "seconds"}.
    """
    began, folder, task = time.perf_counter(), Path(folder), classification()
    torch.set_num_threads(1)
    public, private, x, y = digits()
    model = deep()
    training.train(model, task, public, epochs=60, batch_size=32, seed=0, lr=0.05, momentum=0.9)
    backbone = nn.Sequential(*list(model)[:-1], nn.Identity()).requires_grad_(False)
    order = torch.randperm(len(private), generator=torch.Generator().manual_seed(1))[:requests]
    asked = [[int(i)] for i in private.ids[order]]
    streams, documents = {}, {}
    for name, design in DESIGNS.items():
        start, here = time.perf_counter(), folder / design.name / name.rpartition(" ")[2]
        adapters = design.blocks > 0
        if (here / "book.json").is_file():
            shutil.rmtree(here)
        e = fit(
            design, model if adapters else nn.Linear(64, 10), task, private, folder=here, backbone=None if adapters else backbone, progress=_named(progress,
            name), **(ADAPTERS if adapters else HEADS),
        )  # fmt: skip
        fitted = time.perf_counter() - start
        proofs: list[dict[str, Any]] = []
        streams[name] = serve(e, asked, x, y, told=lambda p, all_of=proofs: all_of.append(p.document()), progress=progress)
        write(here / "proofs.json", json.dumps(proofs))
        documents[name] = {**document(streams[name]), "fit_seconds": fitted, "components": len(design.components), "bytes": streams[name][0].bytes}
    monolithic = _monolithic(nn.Linear(64, 10), backbone, private, x, y)
    alone = wilson(int((model(x).argmax(1) == y).sum()), len(y))
    found = {"designs": documents, "monolithic": monolithic, "public": alone, "requests": requests, "seconds": time.perf_counter() - began}
    write(folder / "report.json", json.dumps(found, indent=1))
    header, rows = table(found)
    lines = [
        f"{requests} records of {len(private):,} asked to go, one after another; {HELD} held-out digits.",
        f"The frozen backbone was trained on {PUBLIC} other digits, which nobody asks to delete.",
        "Every untouched component kept every bit, and no touched one kept its checkpoint: proofs.json of each design lists keys and digests before and after.",
    ]
    write(folder / "report.html", page("Exact deletion, request by request", lines, header, rows, [("Cost, accuracy and members", plot(streams, monolithic))]))
    return found


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what the demo shows."""
    header = ["design", "components", "fit", "cost of all requests", "per request", "accuracy before", "accuracy after", "proofs"]
    rows = [
        [
            name,
            str(d["components"]),
            f"{d['fit_seconds']:.1f} s",
            f"{d['share']:.2f} trainings, {d['seconds']:.1f} s",
            f"{100 * d['share'] / d['requests']:.1f} %",
            _share(d["accuracy"]["before"]),
            _share(d["accuracy"]["after"]),
            "all hold" if d["holds"] else "BROKEN",
        ]
        for name, d in found["designs"].items()
    ]
    rows.append(["one model, retrained each time", "1", "", f"{found['requests']:.2f} trainings", "100 %", _share(found["monolithic"]), "", ""])
    return header, rows


def _share(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def _monolithic(head: nn.Module, backbone: nn.Module, data: Records, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    with torch.no_grad():
        features, held = backbone(data.x), backbone(x)
    model = training.fresh(head, 0)
    training.train(model, classification(), replace(data, x=features), epochs=20, batch_size=32, seed=0, lr=0.05, momentum=0.9)
    return wilson(int((model(held).argmax(1) == y).sum()), len(y))


def _named(progress: Callable[[str, int, int], None] | None, name: str) -> Callable[[str, int, int], None] | None:
    return None if progress is None else lambda _, done, total: progress(f"{name}: fit", done, total)
