"""Exact ensembles on frozen features of other data, against one model: accuracy, cost of a deletion, seconds. One thread, CPU.

digits, on features of a small CNN that was trained on MNIST shrunk to 8 x 8; MNIST, on features of one that was trained on scikit-learn's digits drawn
large, shifted and scaled. The one model is the same head (or the same adapters and head) trained on all records at once; components get more epochs, so
that they take about as many steps. S3T's budget is 1: before any deletion, accuracy does not depend on it. Needs EXPUNGE_DATA/vision/mnist.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.stats import wilson
from expunge.guarantees.exact.design import Design, s3t, safe, sisa
from expunge.guarantees.exact.ensemble import fit
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.worlds import world
from expunge.parts import training

WIDTH = 32
HEADS = {"batch_size": 32, "lr": 0.05, "momentum": 0.9, "stacked": True}
ADAPTERS = {"batch_size": 32, "lr": 5e-3, "optimizer": "adamw", "momentum": 0.0, "rank": 8, "aggregate": "logits"}


def small(x: Tensor) -> Tensor:
    """MNIST (N, 1, 28, 28) in [0, 1] -> (N, 1, 8, 8) that look like scikit-learn's digits."""
    return (F.adaptive_avg_pool2d(x[..., 3:25, 3:25], 8) * 1.3).clamp(0, 1)


def large(x: Tensor, rounds: int, seed: int) -> Tensor:
    """Digits (N, 1, 8, 8) in [0, 1] -> (rounds N, 1, 28, 28): drawn at 16 to 22 pixels, somewhere."""
    g, out = torch.Generator().manual_seed(seed), []
    for k in range(rounds * len(x)):
        side = int(torch.randint(16, 23, (), generator=g))
        at = [int(torch.randint(2, 27 - side, (), generator=g)) for _ in range(2)]
        page = torch.zeros(1, 28, 28)
        page[:, at[0] : at[0] + side, at[1] : at[1] + side] = F.interpolate(x[k % len(x)][None], size=(side, side), mode="bilinear")[0]
        out.append((1.6 * page - 0.2).clamp(0, 1))
    return torch.stack(out)


def data(name: str) -> tuple[Examples, Examples, Examples]:
    """(records of other data, records that may go, held-out records) as images in [0, 1]."""
    mnist, digits = world("mnist"), world("digits")

    def whole(w, x: Tensor) -> Tensor:
        return x * 0.3081 + 0.1307 if w is mnist else x.reshape(-1, 1, 8, 8) / x.max()

    def of(w, part) -> Examples:
        return Examples(whole(w, part.x), part.y, part.ids)

    if name == "digits":
        other = of(mnist, mnist.train)
        return Examples(small(other.x), other.y, other.ids), of(digits, digits.train), of(digits, digits.test)
    other = of(digits, digits.train)
    drawn = large(other.x, 4, 0)
    return Examples(drawn, other.y.repeat(4), torch.arange(len(drawn))), of(mnist, mnist.train), of(mnist, mnist.test)


def measure(
    design: Design, model: nn.Module, backbone: nn.Module | None, train: Examples, test: Examples, seed: int, options: dict
) -> tuple[int, float, float]:
    """(right answers, seconds of fit, share of a training that one random deletion costs)."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        e = fit(design, model, classification(), train, folder=Path(folder), backbone=backbone, seed=seed, **options)
        seconds = time.process_time() - start
        share = sum(e.plan([i]).share for i in e.ids[:: max(1, len(e.ids) // 100)]) / len(e.ids[:: max(1, len(e.ids) // 100)])
        return int((e.predict(test.x).argmax(1) == test.y).sum()), seconds, share


def main() -> None:
    """Print one table per data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="digits, one seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("digits",) if args.quick else ("digits", "mnist"):
        other, train, test = data(name)
        model = training.fresh(nets.small_cnn(train.x.shape[-1], width=WIDTH), 0)
        training.train(model, classification(), other, epochs=8, batch_size=64, seed=0, lr=0.05, momentum=0.9, schedule="onecycle")
        with torch.no_grad():
            alone = float((model(test.x).argmax(1) == test.y).float().mean())
        backbone = nn.Sequential(*list(model)[:-1]).requires_grad_(False)
        head, steps = nn.Linear(4 * WIDTH, 10), 5 if name == "mnist" else 15
        designs = {
            "one head": (sisa(shards=1, epochs=20), head, backbone, HEADS),
            "SISA 5 x 1": (sisa(shards=5, epochs=80), head, backbone, HEADS),
            "SISA 5 x 6": (sisa(shards=5, slices=6, epochs=80), head, backbone, HEADS),
            "SAFE 16, cliques of 4": (safe(shards=16, clique=4, epochs=80), head, backbone, HEADS),
            "one set of adapters": (s3t(shards=1, slices=1, budget=1, epochs=steps), model, None, ADAPTERS),
            "S3T 5 x 3": (s3t(shards=5, slices=3, budget=1, epochs=2 * steps), model, None, ADAPTERS),
        }
        print(f"\n{name}: {len(train):,} records, {len(test):,} held out; the backbone alone is right on {alone:.3f}\n")
        heads = ("", "accuracy per seed", "mean", "Wilson 95 %, all seeds", "against one model, points", "a random deletion costs", "CPU s per fit")
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        one = 0.0
        for label, (design, start, front, options) in designs.items():
            found = [measure(design, start, front, train, test, seed, options) for seed in range(1 if args.quick else 3)]
            shares = [f[0] / len(test) for f in found]
            mean = sum(shares) / len(shares)
            one = mean if label.startswith("one") else one
            _, low, high = wilson(sum(f[0] for f in found), len(found) * len(test))
            each, gap = " ".join(f"{s:.3f}" for s in shares), "" if label.startswith("one") else f"{100 * (mean - one):+.1f}"
            print(f"| {label} | {each} | {mean:.3f} | {low:.3f} to {high:.3f} | {gap} | {100 * found[0][2]:.1f} % | {found[0][1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
