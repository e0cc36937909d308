"""One guarded run of one method: whatever happens, it ends in one outcome.

ok         weights moved, all finite; only this can be audited to a pass
partial    part of the request was skipped or never seen, or the method's own measurement says that what it leaves does not act
harmed     more than half of what the model was good for is gone, read on validation, else on retain
no_op      weights bit-identical, or moved by rounding alone, or no gradient reached the scope, or no forget batch was seen
diverged   loss, weights or answers left their bounds; rolled back
refused    the method found that it cannot work on this model or split, or the model given holds values that are not finite
failed     an exception that nobody foresaw, or a file that cannot be written: checkpoints that stand are kept, and the same call goes on from them

The reason says why, with figures. Of two that hold, the later in `GRADED` is the outcome, and the reason names both. KeyboardInterrupt and SystemExit pass
through.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.digest import model_digest, whole
from expunge.core.edits import Hook, LowRank
from expunge.core.errors import Diverged, ExpungeError, ScopeError, SplitError, plain, unwritten
from expunge.core.guard import Guard, Meter, quiet, watching
from expunge.core.journal import Journal
from expunge.core.machine import devices
from expunge.core.machine.bounds import affordable, seed_of, size_of
from expunge.core.machine.devices import reseeded
from expunge.core.modality import made, of
from expunge.core.patch import Patch
from expunge.core.registry import METHODS, Method
from expunge.core.types import Split, Task, device_of, held
from expunge.engine.log import told
from expunge.engine.results import Source, edited, released
from expunge.engine.rounding import ULPS, rounded
from expunge.engine.sound import broken, unsound

log = logging.getLogger(__name__)

GRADED = ("ok", "partial", "harmed")
"""Outcomes that leave a patch. That of a `partial` or `harmed` run is there to be looked at: it never passes a gate."""
OUTCOMES = (*GRADED, "no_op", "diverged", "refused", "failed")

LEAST = 0.05
"""A loss of utility below this, of 1, is no harm, however little there was."""


MANY, SAMPLE = 1e6, 32
"""Examples above which a run is first held to `bounds.DAYS`, and examples by which the model's speed is read."""


@dataclass(frozen=True)
class Attempt:
    """What one run did. `patch` is there for the outcomes `ok`, `partial` and `harmed`; only that of an `ok` run may be released."""

    method: str
    settings: Mapping[str, Any]
    seed: int
    outcome: str
    reason: str
    patch: Patch | None
    meter: Meter = field(default_factory=Meter)
    ran: bool = False
    """Whether the method ran here; else method and settings are what a file says of itself."""
    source: Source | None = field(default=None, repr=False, compare=False)
    """The model, task and split of the run; it does not travel between processes."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": None}

    def model(self) -> nn.Module:
        """A copy of the model with the patch in it; the model itself is left alone. Raises ModelError where the run left no patch."""
        return edited(self.source, self.patch)

    @property
    def report(self) -> dict[str, Any]:
        """What the run was and what it came to, as plain values. It is no audit."""
        facts = {"method": self.method, "settings": dict(self.settings), "seed": self.seed, "outcome": self.outcome, "reason": self.reason, "cost": self.cost}
        return {**facts, "patch": None if self.patch is None else {"digest": self.patch.digest, "places": self.patch.places}}

    def release(self, folder: Path | str) -> Path:
        """Write the edited model to a new folder, marked as not audited, which is returned (`engine.results.released`). May raise ModelError."""
        note = f"{self.method} ({self.outcome}) made this. Nobody has audited whether anything is forgotten: expunge.audited, or expunge audit.\n"
        return released(self.source, self.patch, folder, ("NOT-AUDITED.txt", note))

    @property
    def cost(self) -> dict[str, float]:
        """Examples forward and backward, and seconds of wall time; in bytes, where known, memory (the peak on a GPU), resident (that of the process above its
        start, on a CPU) and storage (the patch's tensors)."""
        known = {"memory": self.meter.memory, "resident": self.meter.resident, "storage": self.patch.storage if self.patch else 0}
        return {"forward": self.meter.forward, "backward": self.meter.backward, "seconds": self.meter.seconds, **{n: v for n, v in known.items() if v}}


def unlearn(
    method: str, model: nn.Module, task: Task | str, split: Split, *, seed: int = 0, guard: Guard | None = None, folder: Path | str | None = None,
    checkpoint_every: int = 25, progress: Callable[[str, int, int], None] | None = None, memory: int | str = 0, **settings: Any,
) -> Attempt:  # fmt: skip
    """Run `method` under a guard; the model itself is never changed.

    folder      where checkpoints go: a run killed at any moment and called again with the same folder resumes to the same result, bit for bit; a refused
                run leaves it as it was
    memory      bytes that gradients of single examples may take at once (SSD, Fisher forgetting, influence and others), as 512M or 2G, beside the model and two
                copies of its weights; 0: 1 GiB. How many are held at once can change the last bits of what they are summed to
    settings    the method's own; see METHODS[method].defaults

    Raises SettingError, SplitError or ScopeError for bad input, also for a request of a kind that the method is not made for, and ModelError for a model whose
    weights are quantised, offloaded or not there (`core.digest.whole`), before anything runs. A compiled or parallel model is unlearned as what it wraps.
    """
    task, record = made(task), METHODS[method]
    resolved = record.settings(settings)
    model = whole(model)
    seed_of(seed)
    held_at_once = size_of("memory", memory)
    record.check(task, split)
    record.made_for(task, split)
    if name := unsound(model):
        return Attempt(method, resolved, seed, "refused", f"the model given holds values that are not finite, first in {name}", None)
    preflight(model, task, split)
    if why := broken(model, task, split):
        return Attempt(method, resolved, seed, "refused", f"the model given {why}", None)
    watch = guard or Guard()
    watch.memory = held_at_once or watch.memory
    if (examples := sum(record.expected(split, resolved))) > MANY:
        affordable(method, resolved, examples, pace(model, task, split))
    watch.label, watch.progress = watch.label or method, watch.progress or progress
    if folder is not None:
        identity = [method, resolved, seed, model_digest(model), {n: p.digest for n, p in split.parts().items() if held(p)}]
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        watch.journal = Journal(Path(folder), name, checkpoint_every)
    where = None if watch.journal is None else watch.journal.folder
    there = set() if where is None else _there(where)
    device = device_of(model)
    counted = devices.peak_begun(device)
    resident = 0 if counted else peak(anew=True)
    patch, start = None, time.perf_counter()
    log.debug("%s: begins", method)

    def measured() -> None:
        watch.meter.seconds = time.perf_counter() - start
        if counted:
            watch.meter.memory = devices.peak(device)
        elif resident:
            watch.meter.resident = max(0, peak() - resident)

    try:
        try:
            with watching(watch):
                patch = record(model, task, split, seed=seed, **resolved)
        finally:
            measured()
        outcome, reason = _judge(record, model, task, split, patch, watch)
        if watch.journal is not None:
            watch.journal.clear()
    except Diverged as error:
        outcome, reason = "diverged", f"{error}; rolled back"
        if watch.journal is not None:
            watch.journal.clear()
    except ExpungeError as error:
        outcome, reason = "failed" if unwritten(error) else "refused", str(error)
        if where is not None and outcome == "refused":
            _withdraw(where, there)
    except Exception as error:
        outcome, reason = "failed", plain(error)
    attempt = Attempt(method, resolved, seed, outcome, reason, patch if outcome in GRADED else None, watch.meter, ran=True, source=Source(model, task, split))
    log.info("%s: %s in %.1f s, %d passes, seed %d; %s", method, outcome, watch.meter.seconds, watch.meter.passes, seed, told(resolved))
    return attempt


def pace(model: nn.Module, task: Task, split: Split) -> float:
    """Seconds that one example takes forward, at best: the shorter of two passes over at most SAMPLE forget records."""
    batch, spent = task.batches(split.forget, min(SAMPLE, len(split.forget)))[0], []
    with quiet(model):
        for _ in range(2):
            start = time.perf_counter()
            task.forward(model, batch)
            spent.append(time.perf_counter() - start)
    return min(spent) / len(batch["i"])


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


def _judge(record: Method, model: nn.Module, task: Task, split: Split, patch: Patch, watch: Guard) -> tuple[str, str]:
    """Outcome and reason of a run that ended. Raises Diverged for a patch that holds values that are not finite."""
    named, meter = dict(model.named_parameters()), watch.meter
    for edit in patch.edits:
        for t in () if isinstance(edit, Hook) else (edit.up, edit.down) if isinstance(edit, LowRank) else (edit.values,):
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise Diverged(f"{edit.name} holds values that are not finite; lower lr or set clip")
    if meter.steps and not meter.gradient:
        return "no_op", f"no gradient reached the scope in any step{_cut(model)}"
    if not any(isinstance(edit, Hook) or edit.name in named for edit in patch.edits):
        return "no_op", "weights are bit-identical: nothing was unlearned (is lr 0, or the step lost in rounding?)"
    if "forget" in record.needs and not meter.seen.get("forget"):
        return "no_op", "no forget batch was seen"
    if rounded(model, task, split, patch):
        return "no_op", f"weights moved by rounding alone, at most {ULPS} units in the last place: nothing was unlearned (is lr far too small?)"
    with patch.tried(model):
        if why := broken(model, task, split):
            raise Diverged(f"the model that it leaves {why}; lower lr or set clip")
    found = {"partial": _missed(record, split, watch), "harmed": _harm(model, task, split, patch)}
    outcome = next((o for o in reversed(GRADED) if found.get(o)), "ok")
    return outcome, "; ".join([*found["harmed"], *found["partial"], *([watch.stopped] if watch.stopped else [])])


def _missed(record: Method, split: Split, watch: Guard) -> list[str]:
    """What of the request a run did not work on, as methods report it, else by the forget records that were never drawn; and the method's own doubts."""
    told = [f"worked on {c.seen} of {c.of} {part}{f': {c.way}' if c.way else ''}" for part, c in watch.coverage.items() if c.seen < c.of]
    if "forget" in record.needs and not any(part.startswith("forget ") for part in watch.coverage):
        asked = set(split.forget.ids.tolist() if held(split.forget) else range(len(split.forget)))
        if seen := asked - watch.meter.drawn:
            told.append(f"worked on {len(asked) - len(seen)} of {len(asked)} forget records: raise the budget" if watch.stopped else
                        f"worked on {len(asked) - len(seen)} of {len(asked)} forget records: raise epochs or steps, or ask for fewer at a time")  # fmt: skip
    return told + watch.doubts


def _harm(model: nn.Module, task: Task, split: Split, patch: Patch) -> list[str]:
    """Whether more than half of the modality's `kept` is lost, and LEAST at least; as a sentence with figures, or nothing."""
    with reseeded(), quiet(model):
        before = of(task).kept(model, task, split)
        if before is None or before < LEAST:
            return []
        with patch.tried(model):
            after = of(task).kept(model, task, split)
    if after is None or after >= before / 2 or before - after < LEAST:
        return []
    return [f"{max(0.0, after) / before:.0%} is left of what the model was good for (above chance, of 1: {before:.3f} before, {after:.3f} after); "
            "push less hard: a smaller step, fewer epochs, or a retain loss"]  # fmt: skip


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
