"""64 shadow models at digits scale: one stacked pass (`expunge.engine.stacked`) against one after another. CPU seconds, one thread, one run.

The obvious way trains each with `training.train`; a plain loop of torch alone (no wall, no meter) is the published code's way.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from expunge.audits import pool
from expunge.core.types import Task
from expunge.engine import stacked
from expunge.modalities import nets
from expunge.modalities.examples import Examples
from expunge.modalities.worlds import world
from expunge.parts import training

RECIPE = {"epochs": 20, "batch_size": 50, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}


def one_by_one(models: list[nn.Module], task: Task, parts: list[Examples]) -> None:
    """`training.train`, model after model."""
    for k, (model, part) in enumerate(zip(models, parts, strict=True)):
        training.train(model, task, part, seed=k, **RECIPE)


def plain(models: list[nn.Module], task: Task, parts: list[Examples]) -> None:
    """A bare loop per model: torch's optimiser and schedule, batches by index."""
    for k, (model, part) in enumerate(zip(models, parts, strict=True)):
        model.train()
        steps = -(-len(part) // RECIPE["batch_size"])
        optimiser = torch.optim.SGD(model.parameters(), RECIPE["lr"], momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RECIPE["lr"], total_steps=RECIPE["epochs"] * steps, cycle_momentum=False)
        g = torch.Generator().manual_seed(k)
        for _ in range(RECIPE["epochs"]):
            for rows in torch.randperm(len(part), generator=g).chunk(steps):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(part.x[rows]), part.y[rows]).backward()
                optimiser.step()
                schedule.step()


def together(models: list[nn.Module], task: Task, parts: list[Examples]) -> None:
    """All in one stack."""
    stacked.train(models, task, parts, seeds=list(range(len(models))), **RECIPE)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 models")
    parser.add_argument("--models", type=int, default=64)
    args = parser.parse_args()
    k = 8 if args.quick else args.models
    torch.set_num_threads(1)
    w = world("digits")
    inside = pool.halves(len(w.train), k, seed=0)
    parts = [w.train.take(row.nonzero().squeeze(1)) for row in inside]
    builds: dict[str, Callable[[], nn.Module]] = {
        "MLP of 64 units": lambda: nn.Sequential(nn.Flatten(), *nets.mlp(64, 10, 64)),
        "the world's CNN": w.build,
    }
    print(f"{k} shadow models on {len(parts[0])} digits each, {RECIPE['epochs']} epochs, one thread\n")
    print("| network | way | CPU s | times faster than one by one | than the plain loop | largest difference of a logit |\n|---|---|---|---|---|---|")
    for name, build in builds.items():
        torch.manual_seed(0)
        start = [build() for _ in range(k)]
        seconds, ends = {}, {}
        for way in (one_by_one, plain, together):
            models = copy.deepcopy(start)
            began = time.process_time()
            way(models, w.task, parts)
            seconds[way.__name__] = time.process_time() - began
            ends[way.__name__] = stacked.logits(models, w.task, w.test)
        for way, label in (("one_by_one", "one by one"), ("plain", "plain loop"), ("together", "stacked")):
            gap = "" if way == "plain" else f"{float((ends[way] - ends['one_by_one']).abs().max()):.1e}"
            ratios = [f"{seconds[other] / seconds[way]:.1f}" for other in ("one_by_one", "plain")]
            print(f"| {name} | {label} | {seconds[way]:.1f} | {ratios[0]} | {ratios[1]} | {gap} |", flush=True)


if __name__ == "__main__":
    main()
