"""One guarded run of one method: whatever happens, it ends in one outcome.

ok         weights moved, all finite; only this can be audited to a pass
no_op      weights bit-identical, or no gradient reached the scope, or no forget batch was seen
diverged   loss or weights left their bounds; rolled back
refused    the method found that it cannot work on this model or split
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.digest import model_digest
from expunge.core.edits import Hook
from expunge.core.errors import Diverged, ExpungeError, ScopeError, SplitError
from expunge.core.guard import Guard, Meter, quiet, watching
from expunge.core.journal import Journal
from expunge.core.modality import of
from expunge.core.patch import Patch
from expunge.core.registry import METHODS, Method
from expunge.core.types import Split, Task, device_of, held

OUTCOMES = ("ok", "no_op", "diverged", "refused")


@dataclass(frozen=True)
class Attempt:
    """What one run did. `patch` is there for the outcome `ok` alone."""

    method: str
    settings: Mapping[str, Any]
    seed: int
    outcome: str
    reason: str
    patch: Patch | None
    meter: Meter = field(default_factory=Meter)

    @property
    def cost(self) -> dict[str, float]:
        """Examples forward and backward, and seconds of wall time; in bytes, where known, memory (the peak on a GPU), resident (that of the process above its
        start, on a CPU) and storage (the patch's tensors)."""
        known = {"memory": self.meter.memory, "resident": self.meter.resident, "storage": self.patch.storage if self.patch else 0}
        return {"forward": self.meter.forward, "backward": self.meter.backward, "seconds": self.meter.seconds, **{n: v for n, v in known.items() if v}}


def unlearn(
    method: str, model: nn.Module, task: Task, split: Split, *, seed: int = 0, guard: Guard | None = None, folder: Path | str | None = None,
    checkpoint_every: int = 25, progress: Callable[[str, int, int], None] | None = None, **settings: Any,
) -> Attempt:  # fmt: skip
    """Run `method` under a guard; the model itself is never changed.

    folder      where checkpoints go: a run killed at any moment and called again with the same folder resumes to the same result, bit for bit; a refused
                run leaves it as it was
    settings    the method's own; see METHODS[method].defaults

    Raises SettingError, SplitError or ScopeError for bad input, before anything runs.
    """
    record: Method = METHODS[method]
    resolved = record.settings(settings)
    record.check(task, split)
    preflight(model, task, split)
    watch = guard or Guard()
    watch.label, watch.progress = watch.label or method, watch.progress or progress
    if folder is not None:
        identity = [method, resolved, seed, model_digest(model), {n: p.digest for n, p in split.parts().items() if held(p)}]
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        watch.journal = Journal(Path(folder), name, checkpoint_every)
    where = None if watch.journal is None else watch.journal.folder
    there = set() if where is None else _there(where)
    device = device_of(model)
    resident = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        resident = peak(anew=True)
    start = time.perf_counter()
    try:
        with watching(watch):
            patch = record(model, task, split, seed=seed, **resolved)
        outcome, reason = _judge(record, model, patch, watch)
    except Diverged as error:
        patch, outcome, reason = None, "diverged", f"{error}; rolled back"
    except ExpungeError as error:
        patch, outcome, reason = None, "refused", str(error)
    watch.meter.seconds = time.perf_counter() - start
    if device.type == "cuda":
        watch.meter.memory = torch.cuda.max_memory_allocated(device)
    elif resident:
        watch.meter.resident = max(0, peak() - resident)
    if where is not None and outcome == "refused":
        _withdraw(where, there)
    elif watch.journal is not None:
        watch.journal.clear()
    return Attempt(method, resolved, seed, outcome, reason, patch if outcome == "ok" else None, watch.meter)


def peak(anew: bool = False, process: Path = Path("/proc/self")) -> int:
    """Most bytes of memory that this process has held, as Linux keeps it (VmHWM); 0 elsewhere, and where it cannot be read or, for `anew`, begun again.

    anew   begin again first, from what the process holds now (proc(5): 5 written to clear_refs); what others read of it, ru_maxrss too, begins again as well
    """
    try:
        if anew:
            (process / "clear_refs").write_text("5")
        line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def _there(folder: Path) -> set[Path]:
    """The folder's checkpoints, and which of it and its parents are there."""
    return {place for place in (folder, *folder.parents) if place.exists()} | set(folder.glob("*.safetensors"))


def _withdraw(folder: Path, there: set[Path]) -> None:
    """Take away what a run has written to the folder since `there`; what stood there before, which may be another run's, stays."""
    for path in set(folder.glob("*.safetensors")) - there:
        path.unlink(missing_ok=True)
    for place in (folder, *folder.parents):
        if place in there or not place.is_dir() or any(place.iterdir()):
            break
        place.rmdir()


def _judge(record: Method, model: nn.Module, patch: Patch, watch: Guard) -> tuple[str, str]:
    named, meter = dict(model.named_parameters()), watch.meter
    if meter.steps and not meter.gradient:
        return "no_op", f"no gradient reached the scope in any step{_cut(model)}"
    if not any(isinstance(edit, Hook) or edit.name in named for edit in patch.edits):
        return "no_op", "weights are bit-identical: nothing was unlearned (is lr 0, or the step lost in rounding?)"
    if "forget" in record.needs and not meter.seen.get("forget"):
        return "no_op", "no forget batch was seen"
    return "ok", watch.stopped


def _cut(model: nn.Module) -> str:
    """Why no gradient arrived, where the model shows it."""
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return (
            ": the model has gradient checkpointing on in the form that needs a gradient at its inputs; call model.gradient_checkpointing_disable() "
            "and set checkpointing=true, or call model.enable_input_require_grads()"
        )
    return ""


def preflight(model: nn.Module, task: Task, split: Split) -> None:
    """Raises SplitError or ScopeError for leaks, empty parts, labels or inputs the model cannot take, or a model without trainable weights."""
    split.check()
    if not any(p.requires_grad and p.is_floating_point() for p in model.parameters()):
        raise ScopeError("the model has no trainable weight: no parameter requires a gradient")
    with quiet(model):
        for name, part in split.parts().items():
            if why := getattr(part, "fault", ""):
                raise SplitError(f"{name} {why}")
        of(task).preflight(model, task, split)
