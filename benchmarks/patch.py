"""Patches on disk and in memory: save, load, apply and revert of a half-dense and a full patch, in MB of patched weights per CPU second."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import Replace
from expunge.core.patch import Patch


def clocked(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, CPU seconds and wall seconds (which count the disk) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 M weights instead of 16 M")
    side = 1024 if parser.parse_args().quick else 4096
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(side, side, bias=False)
    original = model.weight.detach().clone()
    weights = 4 * side * side / 1e6
    print(f"{side * side:,} float32 weights ({weights:.0f} MB), one thread\n")
    print("| patch | file MB | step | CPU s | wall s | MB of weights per CPU second |\n|---|---|---|---|---|---|")
    for name, density in (("all", 1.0), ("half", 0.5), ("1 in 200", 0.005)):
        mask = None if density == 1 else torch.rand(side, side, generator=g) < density
        values = torch.randn(side, side, generator=g)
        patch = Patch((Replace("weight", values if mask is None else values[mask], mask),)).stamped(model)
        with tempfile.TemporaryDirectory() as folder:
            path, *save = clocked(lambda: patch.save(Path(folder) / "p", b"key"))  # noqa: B023
            size = path.stat().st_size / 1e6
            loaded, *load = clocked(lambda: Patch.load(path, b"key"))  # noqa: B023
        inverse, *apply = clocked(lambda: loaded.apply(model))  # noqa: B023
        _, *revert = clocked(lambda: inverse.apply(model))  # noqa: B023
        if not torch.equal(model.weight.detach(), original):
            raise SystemExit("revert did not restore the weights")
        for step, (cpu, wall) in {"save": save, "load": load, "apply": apply, "revert": revert}.items():
            print(f"| {name} | {size:.1f} | {step} | {cpu:.3f} | {wall:.3f} | {weights / max(cpu, 1e-6):.0f} |")


if __name__ == "__main__":
    main()
