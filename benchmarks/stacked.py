"""16 linear heads and 16 small MLPs on shards: one stacked pass (`expunge.engine.stacked`) against one after another. One thread, one run.

The sequential way trains each with `training.train`; a plain loop of torch alone (no wall, no meter) is shown beside it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from expunge.engine import stacked
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts import training

RECIPE = {"batch_size": 64, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}


def one_by_one(models: list[nn.Module], parts: list[Examples], epochs: int) -> None:
    """`training.train`, model after model."""
    for k, (model, part) in enumerate(zip(models, parts, strict=True)):
        training.train(model, classification(), part, seed=k, epochs=epochs, **RECIPE)


def plain(models: list[nn.Module], parts: list[Examples], epochs: int) -> None:
    """A bare loop per model: torch's optimiser and schedule, batches by index."""
    for k, (model, part) in enumerate(zip(models, parts, strict=True)):
        steps, g = -(-len(part) // RECIPE["batch_size"]), torch.Generator().manual_seed(k)
        optimiser = torch.optim.SGD(model.parameters(), RECIPE["lr"], momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RECIPE["lr"], total_steps=epochs * steps, cycle_momentum=False)
        for _ in range(epochs):
            for rows in torch.randperm(len(part), generator=g).chunk(steps):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(part.x[rows]), part.y[rows]).backward()
                optimiser.step()
                schedule.step()


def together(models: list[nn.Module], parts: list[Examples], epochs: int) -> None:
    """All in one stack."""
    stacked.train(models, classification(), parts, seeds=list(range(len(models))), epochs=epochs, **RECIPE)


def shards(features: int, spread: int, k: int) -> list[Examples]:
    """k shards of about 1,200 random records of 10 classes; their lengths differ by up to `spread`."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(features, 10, generator=g)
    lengths = [1200 + (0 if not spread else int(torch.randint(-spread // 2, spread // 2 + 1, (), generator=g))) for _ in range(k)]
    rows = [torch.randn(n, features, generator=g) for n in lengths]
    return [Examples(x, (x @ truth).argmax(1), torch.arange(len(x))) for x in rows]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 epochs")
    parser.add_argument("--models", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = 2 if args.quick else 10
    builds: list[tuple[str, int, int, Callable[[], nn.Module]]] = [
        ("head, 64 features", 64, 0, lambda: nn.Linear(64, 10)),
        ("head, 512 features", 512, 0, lambda: nn.Linear(512, 10)),
        ("head, 64 features, shards of 1,100 to 1,300", 64, 200, lambda: nn.Linear(64, 10)),
        ("head, 512 features, shards of 1,100 to 1,300", 512, 200, lambda: nn.Linear(512, 10)),
        ("MLP 64-64-10", 64, 0, lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))),
        ("MLP 64-64-10, shards of 1,100 to 1,300", 64, 200, lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))),
        ("MLP 64-64-10 with tanh", 64, 0, lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))),
    ]
    print(f"{args.models} models on shards of 1,200 records, batches of {RECIPE['batch_size']}, {epochs} epochs, one thread\n")
    print("| model | one by one, CPU s (wall) | plain loop | stacked | times faster than one by one, CPU (wall) | than the plain loop | largest difference |")
    print("|---|---|---|---|---|---|---|")
    ways = (one_by_one, plain, together)
    for way in ways:  # the first call of everything costs more
        way([nn.Linear(64, 10) for _ in range(2)], shards(64, 0, 2), 1)
    for name, features, spread, build in builds:
        torch.manual_seed(0)
        start, parts = [build() for _ in range(args.models)], shards(features, spread, args.models)
        seconds, ends = [], {}
        for way in ways:
            models = copy.deepcopy(start)
            began = time.process_time(), time.perf_counter()
            way(models, parts, epochs)
            seconds.append((time.process_time() - began[0], time.perf_counter() - began[1]))
            ends[way] = torch.stack([nn.utils.parameters_to_vector(m.parameters()).detach() for m in models])
        end, gap = seconds[-1], float((ends[together] - ends[one_by_one]).abs().max())
        ratios = [tuple(a / b for a, b in zip(s, end, strict=True)) for s in seconds[:2]]
        times = " | ".join(f"{cpu:.2f} ({wall:.2f})" for cpu, wall in seconds)
        print(f"| {name} | {times} | {' | '.join(f'{cpu:.1f} ({wall:.1f})' for cpu, wall in ratios)} | {gap:.0e} |", flush=True)


if __name__ == "__main__":
    main()
