"""The search on validation: how hard each method should push, and which methods are worth an audit. Nothing here is audited.

    search = Course(model, task, split, validate, seed=0)
    field  = halved(search, ["npo", "wga", ...], front=4)       # method -> its runs, the most promising first

Strengths are FACTOR^k of what suits the method, k = 0, -1, 1, ... (`rung`): downwards where a run does harm, upwards where it moves nothing, else both ways,
until the score falls on both sides of the best. Methods are halved by successive rounds: all are run once, the better half goes on with further strengths,
and so on until few are left; these are bracketed to the end and then run longer. The same seed gives the same field, but for a limit of time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.errors import ExpungeError, plain
from expunge.core.guard import Guard, Meter
from expunge.core.modality import of
from expunge.core.registry import METHODS
from expunge.core.types import Split, Task
from expunge.engine.run import GRADED, Attempt, unlearn
from expunge.planning.outcome import Try, patched
from expunge.planning.plants import pause

DOWN, UP = ("harmed", "diverged"), ("no_op",)
"""Outcomes that say in which direction a better strength lies."""

LONG = 2
"""Longer runs of a front-runner."""

LEAST = 1.0
"""Seconds below which no further run is begun within a limit of time."""


@dataclass(frozen=True)
class Course:
    """What all runs of a search share.

    split      what methods are given; `validate` their score, larger is better, or None
    screen     model -> what is taken off its score once a run has ended (`plan.screened`), or None
    fixed      method -> settings of the user
    memory     bytes for the gradients of single examples (`core.guard.Guard`)
    until      time of `time.perf_counter` after which no run begins; one under way ends at its best state
    """

    model: nn.Module
    task: Task
    split: Split
    validate: Callable[[nn.Module], float] | None
    seed: int = 0
    fixed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | str | None = None
    kept: dict = field(default_factory=dict)
    progress: Callable[[str, int, int], None] | None = None
    until: float = math.inf
    screen: Callable[[nn.Module], float] | None = None
    memory: int = 0

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.until - time.perf_counter() < LEAST

    def run(self, name: str, change: Mapping[str, Any], label: str = "", place: str = "0") -> Try:
        """One run with `change` over the fixed settings, ended at its best state on validation, graded, not audited. A method that refuses a retain loss is
        run without."""
        fixed = dict(self.fixed.get(name, {}))
        watch = Guard(
            validate=self.validate, every=pause(self.split), progress=self.progress, label=label or name, kept=self.kept,
            max_seconds=max(LEAST, self.until - time.perf_counter()), memory=self.memory,
        )  # fmt: skip
        where = None if self.folder is None else Path(self.folder) / f"{name}-{place}"
        attempt = self._attempt(name, watch, where, {**fixed, **change})
        if attempt.outcome == "refused" and "retain" in change:
            own = {k: v for k, v in change.items() if k != "retain"}
            again = replace(watch, meter=Meter(), coverage={}, doubts=[])
            attempt = self._attempt(name, again, where, {**fixed, **own})
        if self.validate is None or attempt.patch is None:
            return Try(attempt)
        try:
            after = patched(self.model, attempt)
            return Try(attempt, score=self.validate(after) - (self.screen(after) if self.screen is not None and attempt.outcome == "ok" else 0.0))
        except Exception as error:
            return Try(broke(attempt, "validation", error))

    def _attempt(self, name: str, watch: Guard, where: Path | None, settings: Mapping[str, Any]) -> Attempt:
        """`unlearn`; where the user named none of the settings, a refusal is this run's outcome and does not end the search."""
        try:
            return unlearn(name, self.model, self.task, self.split, seed=self.seed, guard=watch, folder=where, **settings)
        except ExpungeError as error:
            if self.fixed.get(name):
                raise
            return Attempt(name, METHODS[name].settings(settings), self.seed, "refused", plain(error), None)


def broke(attempt: Attempt, what: str, error: Exception) -> Attempt:
    """The attempt as `failed`, because something that reads its result ended in an exception."""
    return replace(attempt, outcome="failed", reason=f"its {what} broke off: {plain(error)}", patch=None)


def searched(name: str, task: Task, fixed: Mapping[str, Any]) -> bool:
    """Whether the strength of a method is searched for when the user named these settings: none of them, or, where the modality has a recipe, all but `lr`.
    Step sizes published for language models suit other models; those of records suit most, and what is named may stand for another strength."""
    return not fixed or (of(task).search.tuned(METHODS[name].defaults) and "lr" not in fixed)


def changed(name: str, model: nn.Module, task: Task, split: Split, fixed: Mapping[str, Any], strength: float = 1.0, long: bool = False) -> dict[str, Any]:
    """What is changed of `fixed` and the published settings at this multiple of a method's strength; at 1, of a method that no recipe is for, nothing."""
    settings, search = METHODS[name].settings(fixed), of(task).search
    own = search.other.get(name, "")
    own = own if own in settings and own not in fixed else ""
    if search.tuned(settings):
        ours = {k: v for k, v in search.recipe(settings, split).items() if k not in fixed}
        step = search.stride(settings, task, model)
        ours = {**ours, "lr": step, own: strength * settings[own]} if own else {**ours, "lr": strength * step}
    else:
        which = own or pushed(name, task, fixed)
        ours = {which: strength * settings[which]} if which and strength != 1.0 else {}
    return {**ours, **({k: v for k, v in search.longer({**settings, **ours}).items() if k not in fixed} if long else {})}


def pushed(name: str, task: Task, fixed: Mapping[str, Any]) -> str:
    """The setting by which a method that no recipe is for is made stronger; empty where it has none."""
    settings = METHODS[name].settings(fixed)
    return next((s for s in of(task).search.strengths if isinstance(settings.get(s), float) and settings[s] > 0), "")


def scaled(name: str, task: Task, fixed: Mapping[str, Any]) -> bool:
    """Whether there is a strength to be searched for."""
    return bool(of(task).search.tuned(METHODS[name].settings(fixed)) or of(task).search.other.get(name) or pushed(name, task, fixed))


def worth(t: Try) -> tuple[int, float]:
    """By what tries are compared: an outcome that may be released before others, then the score."""
    ranked = len(GRADED) - GRADED.index(t.attempt.outcome) if t.attempt.outcome in GRADED else 0
    return ranked, t.score if t.score is not None else -math.inf


def best_of(tries: Sequence[Try]) -> Try:
    """The best try on validation; the first of equals, and where none has a score."""
    return max(tries, key=worth)


def rung(tried: Mapping[int, Try]) -> int | None:
    """The next exponent to try beside the best of those tried; None once the score falls on both sides of it, or where no strength could help.

    Of equals the best is the one nearest to 0. Downwards comes first, but where the best moved nothing.
    """
    if not tried:
        return 0
    best = max(sorted(tried, key=lambda k: (abs(k), k)), key=lambda k: worth(tried[k]))
    outcome = tried[best].attempt.outcome
    if outcome in ("refused", "failed"):
        return None
    sides = [best - 1] if outcome in DOWN else [best + 1] if outcome in UP else [best - 1, best + 1]
    return next((k for k in sides if k not in tried), None)


Runs = dict[tuple[int, bool], Try]
"""(exponent, long) -> run of one method."""


def further(search: Course, name: str, runs: Runs, long: bool = False, label: str = "") -> bool:
    """Run the method once more, at the next strength; False where there is none, or no time. A long search starts at the best of the short one."""
    most, factor = of(search.task).search.most, of(search.task).search.factor
    fixed, tried = search.fixed.get(name, {}), {k: t for (k, much), t in runs.items() if much is long}
    if search.over or len(tried) >= most or (tried and not scaled(name, search.task, fixed)):
        return False
    short = {k: t for (k, much), t in runs.items() if not much}
    k = max(sorted(short, key=abs), key=lambda k: worth(short[k])) if long and not tried and short else rung(tried)
    if k is None:
        return False
    change = changed(name, search.model, search.task, search.split, fixed, factor**k, long)
    runs[k, long] = search.run(name, change, label, f"{k}{'-long' if long else ''}")
    return True


def bracketed(search: Course, name: str, label: str = "") -> list[Try]:
    """Runs of one method alone: once as given where there is no validation or nothing to search for, else at as many strengths as it takes, then longer."""
    fixed, runs = search.fixed.get(name, {}), {}
    if search.validate is None or not searched(name, search.task, fixed):
        return [] if search.over else [search.run(name, {}, label)]
    while further(search, name, runs, label=label):
        pass
    if lengthened(search, name):
        further(search, name, runs, True, label)
    return list(runs.values())


def lengthened(search: Course, name: str) -> bool:
    """Whether a longer run of the method is another run."""
    settings = METHODS[name].settings(search.fixed.get(name, {}))
    return any(k not in search.fixed.get(name, {}) for k in of(search.task).search.longer(settings))


def halved(search: Course, names: Sequence[str], front: int) -> dict[str, Runs]:
    """Method -> its runs, of all methods that were begun: each once, and again where that shows that its strength is off; then, round after round, the better
    half at one strength more, until at most `front` are left, which are bracketed and then run longer. The most promising method stands first."""
    runs: dict[str, Runs] = {}
    for number, name in enumerate(names):
        label, mine = f"{name} ({number + 1}/{len(names)})", {}
        further(search, name, mine, label=label)
        if mine and mine[0, False].attempt.outcome in (*DOWN, *UP):
            further(search, name, mine, label=label)
        if mine:
            runs[name] = mine
    left = ranked(runs)
    while len(left) > front:
        left = left[: max(front, math.ceil(len(left) / 2))]
        for name in left:
            further(search, name, runs[name], label=f"{name} ({len(left)} left)")
        left = ranked({name: runs[name] for name in left})
    for name in left:
        while further(search, name, runs[name], label=f"{name} (of the last {len(left)})"):
            pass
    for name in [n for n in left if lengthened(search, n)]:
        for _ in range(LONG):
            further(search, name, runs[name], True, f"{name} (of the last {len(left)}, longer)")
    first = ranked({name: runs[name] for name in left})
    return {name: runs[name] for name in [*first, *(n for n in ranked(runs) if n not in first)]}


def fronted(runs: Runs) -> list[Try]:
    """What is audited of a front-runner: the best of its longer runs and the best of the others, the better first."""
    sides = [[t for (_, long), t in runs.items() if long is side] for side in (True, False)]
    return sorted((best_of(side) for side in sides if side), key=worth, reverse=True)


def ranked(runs: Mapping[str, Runs]) -> list[str]:
    """Methods by their best try; equals as they come, the cheapest first."""
    return sorted(runs, key=lambda name: worth(best_of(list(runs[name].values()))), reverse=True)
