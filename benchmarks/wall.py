"""One SGD step over 11.8 M weights with half of them frozen: no wall, the session's wall on raw bits, and `torch.where`. CPU seconds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from expunge.core.session import edit
from expunge.core.types import Scope


def layers(n: int) -> nn.Sequential:
    """12 square layers with about n weights together."""
    side = int((n / 12) ** 0.5)
    return nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(12)])


def timed(step: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of a call, after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return sorted(seconds[2:])[repeats // 2]


def prepared(model: nn.Module) -> torch.optim.SGD:
    """SGD with momentum and decay; every weight has a gradient."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1.2 M weights, few steps")
    n, repeats = (1_200_000, 5) if parser.parse_args().quick else (11_800_000, 15)
    torch.set_num_threads(1)
    model = layers(n)
    g = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(p.shape, generator=g) < 0.5 for name, p in model.named_parameters()}
    base = {name: p.detach().clone() for name, p in model.named_parameters()}

    found = {"SGD step alone": timed(prepared(model).step, repeats)}
    with edit(model, Scope(masks)):
        found["SGD step + wall on raw bits"] = timed(prepared(model).step, repeats)
    stepper = prepared(model)

    def where() -> None:
        stepper.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.where(masks[name], p, base[name]))

    found["SGD step + torch.where"] = timed(where, repeats)
    plain = found["SGD step alone"]
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} float32 weights, half of them frozen, one thread\n")
    print("| step | CPU ms | of a plain step | the wall itself, of a plain step |\n|---|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / plain:.2f} | {(seconds - plain) / plain:.2f} |")


if __name__ == "__main__":
    main()
