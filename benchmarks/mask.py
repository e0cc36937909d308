"""Selecting the top half of 11 M weights: `parts.scopes.saliency.top` against a double argsort. CPU seconds and peak memory above the scores.

Each form runs in a process of its own, so that the peak (VmHWM) is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from expunge.parts.scopes.saliency import top


def scores(n: int) -> dict[str, Tensor]:
    """n scores in 20 tensors of unequal sizes."""
    g = torch.Generator().manual_seed(0)
    sizes = [n * (k + 1) // 210 for k in range(19)]
    return {str(k): torch.randn(size, generator=g).abs() for k, size in enumerate([*sizes, n - sum(sizes)])}


def double_argsort(named: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """Rank of every weight by sorting twice, as the published code does it."""
    flat = torch.cat([-s.reshape(-1) for s in named.values()])
    chosen = flat.argsort().argsort() < int(flat.numel() * keep)
    return {name: part.view_as(s) for (name, s), part in zip(named.items(), chosen.split([s.numel() for s in named.values()]), strict=True)}


FORMS = {"double argsort": double_argsort, "top": lambda named, keep: top(named, keep).masks}


def status(field: str) -> int:
    """A line of the process's status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024


def measure(form: str, n: int, repeats: int) -> dict[str, float]:
    """Best of `repeats` CPU times, the peak above what the scores take, and how many weights were kept."""
    torch.set_num_threads(1)
    named = scores(n)
    FORMS[form](scores(1000), 0.5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before, seconds = status("VmRSS"), []
    for _ in range(repeats):
        start = time.process_time()
        masks = FORMS[form](named, 0.5)
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "extra": status("VmHWM") - before, "kept": sum(int(m.sum()) for m in masks.values())}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1.1 M weights, once")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    n, repeats = (1_100_000, 1) if args.quick else (11_000_000, 3)
    if args.form:
        print(json.dumps(measure(args.form, n, repeats)))
        return
    quick = ["--quick"] if args.quick else []
    found = {
        form: json.loads(subprocess.run([sys.executable, __file__, "--form", form, *quick], capture_output=True, text=True, check=True).stdout)
        for form in FORMS
    }
    base = found["double argsort"]
    print(f"Top half of {n:,} weights, one thread\n")
    print("| form | CPU s | times faster | extra MiB | share of memory | kept |\n|---|---|---|---|---|---|")
    for form, row in found.items():
        faster, share = base["seconds"] / row["seconds"], row["extra"] / max(1, base["extra"])
        print(f"| {form} | {row['seconds']:.3f} | {faster:.1f} | {row['extra']:.0f} | {share:.2f} | {row['kept']:,} |")


if __name__ == "__main__":
    main()
