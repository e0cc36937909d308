"""Golden patches: the digest of what every method leaves on the small worlds (untrained networks, short runs) and on the toy worlds (trained ones, the
method's `toy` settings).

    python tests/golden.py write       # run all methods, write tests/golden.json
    python tests/golden.py compare     # run all methods, name those whose patch differs; exit code 1 if any does

A refactor must leave every digest as it is. Floating-point sums differ between processors, so digests hold for the kind of machine in the file's
`machine` alone; `test_golden.py` compares there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).with_name("golden.json")


def machine() -> str:
    """What the bits depend on: processor kind, its vector instructions as PyTorch sees them, PyTorch's version."""
    import platform

    import torch

    return f"{platform.machine()} {_processor()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def cases() -> list[tuple[str, str, str]]:
    """(method, task, world): every method on every task it names."""
    from expunge.core.registry import METHODS

    return [(name, task, kind) for kind in ("small", "toy") for name in METHODS for task in METHODS[name].tasks]


def digest(name: str, task_name: str, kind: str) -> str:
    """Digest of the method's patch."""
    from test_laws import quick
    from worlds import small, toy

    from expunge.core.registry import METHODS

    model, task, split = (small if kind == "small" else toy)(task_name, METHODS[name].twin == "moe")
    settings = quick(name) if kind == "small" else METHODS[name].toy
    return METHODS[name](model, task, split, seed=3, **settings).digest


def digests() -> Iterator[tuple[str, str]]:
    """Key of each case and its digest, told on standard error as they come."""
    todo = cases()
    for k, case in enumerate(todo):
        print(f"{k + 1}/{len(todo)} {' '.join(case)}", file=sys.stderr, flush=True)
        yield "/".join(case), digest(*case)


def main(what: str) -> int:
    """Write or compare."""
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("EXPUNGE_TESTS", tempfile.mkdtemp(prefix="expunge-golden-"))
    found = dict(digests())
    if what == "write":
        PATH.write_text(json.dumps({"machine": machine(), "digests": found}, indent=0) + "\n")
        return 0
    kept = json.loads(PATH.read_text())
    other = [key for key in sorted({*found, *kept["digests"]}) if found.get(key) != kept["digests"].get(key)]
    note = "" if kept["machine"] == machine() else f" (pinned on {kept['machine']}, this is {machine()})"
    print(f"{len(found) - len(other)} of {len(kept['digests'])} patches bit-identical{note}", *other, sep="\n")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "compare"))
