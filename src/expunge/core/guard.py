"""The guard: one run's meter, budget, checkpoints, validation and progress, reached by every loop through `current()`.

    with guard.watching(Guard(...)) as g: METHODS["salun"](...)

The context variable is the one ambient value of the package: loops and sessions report to whatever guard watches them, so that no
method carries the plumbing. Without one, `current()` is an inert guard: nothing is limited, saved or shown.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from expunge.core.errors import Diverged
from expunge.core.journal import Journal
from expunge.core.types import Batch, Out, Split, Task, held


@dataclass
class Meter:
    """What a run really did: examples forward and backward, which parts of the split it drew, whether a gradient arrived."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    memory: int = 0
    """Bytes on the GPU at the peak; 0 where the model stands on no GPU."""
    resident: int = 0
    """Bytes of this process at the peak above what it held at the start; 0 on a GPU, and where the system does not say (`run.peak`)."""
    steps: int = 0
    gradient: bool = False
    seen: dict[str, int] = field(default_factory=dict)
    drawn: set[int] = field(default_factory=set)
    """Ids of the forget records that were drawn at least once (their positions, where the data are not held in memory)."""
    paused: bool = False

    @property
    def passes(self) -> int:
        """Forward plus backward examples: the currency in which methods are compared with retraining."""
        return self.forward + self.backward

    def add(self, forward: int = 0, backward: int = 0) -> None:
        """Count examples that did not go through `Task.forward` (per-example gradients, input gradients)."""
        self.forward += forward
        self.backward += backward

    def back(self, examples: int) -> None:
        if not self.paused:
            self.backward += examples

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count automatically inside: for code under function transforms, which counts by `add`."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def metered(task: Task, split: Split, meter: Meter) -> Task:
    """The same task, counting into `meter`; nothing else about it changes."""
    names = {id(part): name for name, part in split.parts().items()}
    gone = split.forget.ids if held(split.forget) else None

    def watch(value: Tensor, examples: int) -> None:
        if value.requires_grad:
            value.register_hook(lambda _: meter.back(examples))

    def collate(data, index, generator) -> Batch:
        name = names.get(id(data), "other")
        meter.seen[name] = meter.seen.get(name, 0) + len(index)
        if name == "forget":
            meter.drawn.update((index if gone is None else gone[index]).tolist())
        if name == "other" and gone is not None and held(data):
            mine = data.ids[index]
            mine = mine[torch.isin(mine, gone)]
            meter.seen["forget"] = meter.seen.get("forget", 0) + len(mine)
            meter.drawn.update(mine.tolist())
        return task.collate(data, index, generator)

    def forward(model: nn.Module, batch: Batch) -> Out:
        out = task.forward(model, batch)
        if not meter.paused:
            meter.forward += len(batch["i"])
            for value in (out.logits, out.pred):
                if value is not None:
                    watch(value, len(batch["i"]))
        return out

    def features(model: nn.Module, batch: Batch, layer: str) -> Tensor:
        value = task.features(model, batch, layer)
        if not meter.paused:
            meter.forward += len(batch["i"])
            watch(value, len(batch["i"]))
        return value

    return replace(task, collate=collate, forward=forward, features=features)


@dataclass(frozen=True)
class Coverage:
    """How much of a part a method worked on: `seen` of `of` things called `what`, and the way to more."""

    seen: int
    of: int
    what: str
    way: str = ""

    @property
    def share(self) -> float:
        """Of 1."""
        return self.seen / self.of if self.of else 1.0


ROOM = 1 << 30
"""Bytes for gradients of single examples, where nothing else is said."""


@dataclass
class Guard:
    """Limits and services of one run. All fields have inert defaults.

    max_loss     a larger absolute loss, or one that is not finite, ends the run as `diverged`
    max_seconds, max_passes, max_steps     budgets: training stops early at the best state so far, which is still `ok`
    validate     model -> score, larger is better, read on the validation part only; called every `every` steps
    patience     stop after so many evaluations without a better score (0: never)
    progress     called as progress(text, done, total)
    journal      checkpoints of the run (journal.Journal), or None
    memory       bytes that gradients of single examples may take at once; 0: ROOM, and as many as a method asks for
    """

    max_loss: float = 1e4
    max_seconds: float = math.inf
    max_passes: float = math.inf
    max_steps: float = math.inf
    validate: Callable[[nn.Module], float] | None = None
    every: int = 20
    patience: int = 0
    progress: Callable[[str, int, int], None] | None = None
    journal: Journal | None = None
    memory: int = 0

    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Reference values by digest (`remember.recall`); share one between guards and their runs share the values."""
    meter: Meter = field(default_factory=Meter)
    label: str = ""
    coverage: dict[str, Coverage] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best: tuple[float, dict[str, Tensor]] | None = None
    stopped: str = ""
    phase: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def room(self) -> int:
        """Bytes for the gradients of single examples that are held at once."""
        return self.memory or ROOM

    def covered(self, part: str, *, seen: int, of: int, what: str = "records", way: str = "") -> None:
        """A method says how much of a part of the request it worked on, where the records that it drew do not tell: less than all, and the run is `partial`.

        what   what is counted ("prompts", "records taken out"); of two reports on one part under one word, the smaller share stands
        way    what the user can do about it
        """
        mine, key = Coverage(seen, of, what, way), f"{part} {what}"
        if key not in self.coverage or mine.share < self.coverage[key].share:
            self.coverage[key] = mine

    def doubt(self, why: str) -> None:
        """A method's own measurement says that what it leaves does not act, as with a gate that stays shut: the run is `partial`, for that reason."""
        if why not in self.doubts:
            self.doubts.append(why)

    def check_loss(self, value: float, step: int, lr: float) -> None:
        """Raises Diverged before a step is taken with a loss that is not finite or beyond `max_loss`."""
        if not math.isfinite(value) or abs(value) > self.max_loss:
            what = f"{value:.4g}" if math.isfinite(value) else str(value)
            limit = "" if not math.isfinite(value) else f", beyond the limit {self.max_loss:g}"
            raise Diverged(f"loss is {what} at step {step}{limit}; lower lr (now {lr:g}) or set clip")

    def tick(self, session, done: int, total: int) -> bool:
        """After each step: progress, validation, budgets. True means stop training now."""
        self.meter.steps += 1
        if self.progress:
            self.progress(self.label, done, total)
        if self.validate and session.judged and self.meter.steps % self.every == 0:
            self.evaluate(session)
        spent = time.perf_counter() - self.started
        for over, why in (
            (spent > self.max_seconds, "seconds"),
            (self.meter.passes > self.max_passes, "passes"),
            (self.meter.steps >= self.max_steps, "steps"),
        ):
            if over and not self.stopped:
                self.stopped = f"budget of {why} reached"
        return bool(self.stopped)

    def evaluate(self, session) -> None:
        """Score the model on the validation part and keep the weights if they are the best so far."""
        if self.validate is None:
            return
        with self.meter.pause(), quiet(session.model):
            score = float(self.validate(session.model))
        self.scores.append(score)
        if self.best is None or score > self.best[0]:
            self.best = (score, {n: t.detach().clone() for n, t in session.tensors().items()})
        rank = max(range(len(self.scores)), key=self.scores.__getitem__)
        if self.patience and len(self.scores) - 1 - rank >= self.patience:
            self.stopped = f"no better validation score for {self.patience} evaluations"

    def settle(self, session) -> None:
        """At the end of a session: put back the best weights seen, if validation says that they beat the last ones."""
        if self.validate is None or not session.judged:
            return
        self.evaluate(session)
        score, kept = self.best or (-math.inf, {})
        if self.scores[-1] < score:
            tensors = session.tensors()
            with torch.no_grad():
                for name, value in kept.items():
                    tensors[name].copy_(value)
        self.best = None


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no gradients inside; every submodule's mode is put back after."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


_ACTIVE: ContextVar[Guard | None] = ContextVar("expunge_guard", default=None)


def current() -> Guard:
    """The guard that watches this code, or an inert one."""
    return _ACTIVE.get() or Guard()


@contextlib.contextmanager
def watching(guard: Guard) -> Iterator[Guard]:
    """Loops and sessions inside report to `guard`."""
    token = _ACTIVE.set(guard)
    try:
        yield guard
    finally:
        _ACTIVE.reset(token)
