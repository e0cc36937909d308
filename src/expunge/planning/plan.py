"""Plan and autopilot: what can be done with the parts at hand, and the search for the cheapest patch that passes its gate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from expunge.audits import core
from expunge.audits.core import Probe
from expunge.audits.verdict import Trial, blind, checks_for
from expunge.core.digest import whole
from expunge.core.errors import ExpungeError, ModelError, SettingError
from expunge.core.machine import bounds
from expunge.core.machine.bounds import seed_of
from expunge.core.modality import Opened, Parted, made, of
from expunge.core.registry import METHODS
from expunge.core.types import Split, Task
from expunge.engine.run import GRADED, preflight, unsound
from expunge.planning import advice
from expunge.planning.outcome import Try, Verdict, baselines, examined, families, first, patched, regraded, remarks, required, trusted
from expunge.planning.plants import Recipe, controls, dealt, pause
from expunge.planning.releasing import written
from expunge.planning.search import Course, best_of, bracketed, broke, changed, fronted, halved, searched, worth

log = logging.getLogger(__name__)

KINDS = {"moe": "a mixture of experts"}
"""What a method that works on one kind of model alone asks for (`Method.twin`), in words."""

FRONT = 4
"""Methods that stay in the search to its end, where the autopilot chooses the methods itself: of these the best run and the best longer one are audited."""

WAVE = 4.0
"""Where it does, methods that cost at most so many times what the cheapest costs are tried together, before any that costs more."""


@dataclass(frozen=True)
class Option:
    """One method in a plan: feasible or why not, what it may claim, what it costs in examples and as a share of retraining."""

    method: str
    feasible: bool
    why: str
    assurance: str
    forward: float
    backward: float
    share: float | None
    needs: tuple[str, ...]


def plan(
    task: Task | str, split: Split, *, model: nn.Module | None = None, settings: Mapping[str, Mapping[str, Any]] | None = None,
    retrain_passes: float | None = None,
) -> list[Option]:  # fmt: skip
    """All methods, feasible and cheapest first. Methods are priced as the autopilot runs them.

    model           what is to forget; without it, a method for one kind of model alone (a mixture of experts) counts as not feasible
    settings        method -> settings that are fixed by the user
    retrain_passes  examples forward plus backward that training from scratch takes
    """
    task, options = made(task), []
    for record in METHODS.values():
        try:
            fixed = record.settings((settings or {}).get(record.name, {}))
            record.check(task, split, fixed, model)
            record.made_for(task, split)
            if record.twin and model is None:
                raise ModelError(f"{record.name} works on {KINDS[record.twin]} alone; name the model to see whether it is one")
            named = (settings or {}).get(record.name, {})
            ours = of(task).search.recipe(fixed, split) if "lr" not in named else {}
            forward, backward = record.expected(split, {**fixed, **{k: v for k, v in ours.items() if k not in named}})
            share = None if not retrain_passes else (forward + backward) / retrain_passes
            options.append(Option(record.name, True, "", record.assurance, forward, backward, share, record.needs))
        except ExpungeError as error:
            options.append(Option(record.name, False, str(error).split(". Methods")[0], record.assurance, 0.0, 0.0, None, record.needs))
    return sorted(options, key=lambda o: (not o.feasible, o.forward + o.backward, o.method))


def closeness(model: nn.Module, task: Task, split: Split) -> Callable[[nn.Module], float] | None:
    """The modality's validation score for tuning and stopping, larger is better, 0 at best; it never reads test. None where there is no tuning: methods then
    run once, as given."""
    return of(task).validation(model, task, split)


def forget(
    model: nn.Module | Opened, task: Task | str | None = None, split: Split | None = None, *, references: Sequence[Any] = (), methods: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None, rules: Mapping[str, str] | None = None, seed: int = 0, folder: Path | str | None = None,
    retrain_passes: float | None = None, scales: Sequence[float] = (), stop: bool = True, slow: bool = True,
    checks: Sequence[str] = (), pool: Any = None, progress: Callable[[str, int, int], None] | None = None, require: str = "",
    minutes: float = math.inf, twins: int = 0, workers: int = 1, memory: int | str = 0, ready: Callable[[], Any] | None = None,
) -> Verdict:  # fmt: skip
    """The autopilot: feasible methods, tuned on validation alone, until one patch passes the gate; every try is kept.

    `task` may be a name ("classification") where the modality needs no more than that. What `expunge.opened` read stands for model, task, split and references.

    Where it chooses the methods itself and there is validation, the cheapest go first (WAVE), and of them only those that do best on validation are audited
    (`search.halved`), in that order. Else each method is searched and audited, in order of cost.

    references      models retrained without the forget set (or records of them, `parts.provenance.Reference`); each is checked before it is believed. From one
                    on they make `verified` possible, three or more make it easier
    require         the grade that passes, supported or verified; empty: the highest that the task's checks can give
    methods         only these; the default is every feasible approximate method (retraining is what they are compared with)
    settings        method -> settings that are fixed by the user. Such a method is run once, as given, but for texts where `lr` is none of them: then the
                    step size is searched for, and what is not named is as the autopilot has it
    scales          multiples of the method's strength to try on validation, all of them; (1.0,) runs defaults only. When none are given, strengths are searched
                    for, upwards and downwards (`search.rung`). Without validation there is no tuning
    checks          only these checks and those that the rules read; the default is all that apply
    slow            False leaves out checks and baselines that train, but for those the gate reads
    pool            shadow models (`audits.pool.shadows`), without which per-example attacks are left out
    twins           planted controls of so many twins (`planning.plants`), evidence that needs no references: split.plants, or a part of validation, is taught
                    to copies of the model, which the same method makes forget it again. Made for a try that nothing else refutes, which is then graded again;
                    `workers` at a time
    stop            False: audit every method, choose the cheapest that passes. True also stops after the cheapest method when no check of
                    forgetting passed its self-test, as then nothing can pass; `methods` overrides that
    minutes         wall time after which no run begins, and one under way ends at its best state; what was found by then is audited, one try at least. The only
                    thing here that the seed does not decide
    memory          bytes that gradients of single examples may take at once, as 512M or 2G (`engine.run.unlearn`)
    ready           called when all that was asked was found to be in order, before anything runs (`sanity.checked`, say, whose ModelError ends it)
    A run that ends otherwise than `ok` never passes; one that is partial or harmed is audited where no setting of its method did better, to be looked at.
    Raises SplitError and the like for bad input. The model is never changed; the patch is `verdict.chosen.attempt.patch`.
    """
    writer = None
    if isinstance(model, Opened):
        writer = partial(written, model)
        model, task, split, references = model.model, task or model.task, split or model.split, references or model.references
    if task is None or split is None:
        raise SettingError("name a task and a split, or give what expunge.opened read")
    task = made(task)
    until = time.perf_counter() + 60 * minutes
    seed_of(seed)
    asked = families(task, rules)
    required(asked, require)
    if not minutes > 0:
        raise SettingError(f"minutes must be above 0, not {minutes:g}")
    bounds.number("twins", twins, 0, whole=True)
    bounds.number("workers", workers, 1, whole=True)
    room = bounds.size_of("memory", memory)
    if retrain_passes is not None:
        bounds.number("retrain_passes", retrain_passes, 0)
    model = whole(model)
    if broken := unsound(model):
        raise ModelError(f"the model holds values that are not finite, first in {broken}: nothing can be audited against it")
    preflight(model, task, split)
    given = {name: METHODS[name].settings((settings or {}).get(name, {})) for name in {*methods, *(settings or {})}}
    for name in methods:
        METHODS[name].check(task, split, given[name], model)
        METHODS[name].made_for(task, split)
    order = [o for o in plan(task, split, model=model, settings=settings, retrain_passes=retrain_passes) if o.feasible]
    wanted = [o for o in order if (o.method in methods if methods else METHODS[o.method].assurance == "approximate")]
    if ready is not None:
        ready()
    sizes = ", ".join(f"{len(part)} {name}" for name, part in split.parts().items())
    log.info("%s request: %s, %d references, seed %d", of(task).name, sizes, len(references), seed)
    ours = any(searched(o.method, task, (settings or {}).get(o.method, {})) for o in wanted)
    parted = of(task).search.parts(model, task, split, seed=seed) if ours else Parted(split, split)
    split = parted.audited
    kept_models, refused = trusted(Probe(model, model, task, split, seed=seed), references)
    p = Probe(model, model, task, split, kept_models, seed, {"retrain_passes": retrain_passes} if retrain_passes else {}, pool=pool)
    if twins:
        dealt(task, parted.trained, twins, seed)
    trials = first(p, rules, twins)
    nothing = blind(trials) and not twins
    validate = closeness(model, task, parted.trained)
    screen = screened(p, trials) if of(task).search.screened and split.validation is not None else None
    course = Course(model, task, parted.trained, validate, seed, settings or {}, folder, progress=progress, until=until, screen=screen, memory=room)

    def audit(t: Try) -> Try:
        try:
            return audit_of(t)
        except (ExpungeError, MemoryError, OSError):
            raise
        except Exception as error:
            return Try(broke(t.attempt, "audit", error), score=t.score)

    def audit_of(t: Try) -> Try:
        after = patched(model, t.attempt)
        seen = examined(p, t.attempt, after, trials, slow, checks, require=require, refused=refused, families=asked)
        if twins and seen.grade is not None and seen.grade.grade != "refuted" and t.attempt.outcome == "ok":
            recipe = Recipe(t.attempt.method, t.attempt.settings, t.attempt.seed, 0 if validate is None else pause(split), room)
            e = controls(
                model, after, task, parted.trained, recipe, twins=twins, seed=seed, workers=workers, seconds=t.attempt.meter.seconds, progress=progress,
                folder=None if folder is None else Path(folder) / f"{t.attempt.method}-plants",
            )  # fmt: skip
            seen = regraded(p, rules, seen, after, e, slow, checks, require=require, refused=refused, families=asked)
        log.info("%s: %s, audited: %s", t.attempt.method, "passed" if seen.passed else "did not pass", seen.grade.grade if seen.grade else "no grade")
        return replace(seen, score=t.score)

    if stop and not methods and not scales and not nothing and validate is not None and len(wanted) > 1:
        tries, untried = _chosen(course, wanted, audit)
    else:
        tries, untried = _each(course, wanted, audit, scales, stop, stop and nothing and not methods)
    passing = [t for t in tries if t.passed]
    best = min(passing, key=lambda t: t.attempt.meter.passes) if passing else None
    reasons = (
        []
        if best
        else ([f"{t.attempt.method}: {told(t)}" for t in tries if t.rows or t.attempt.outcome != "ok"] or ["no feasible method for this task and split"])
    )
    planted = best or next((t for t in reversed(tries) if t.plants is not None), None)
    if planted is not None and planted.trials:
        p, trials = replace(p, plants=planted.plants), planted.trials
    rules = {t.name: t.rule for t in trials}
    notes = remarks(p, trials, refused) + parted.notes
    if untried:
        notes += (f"The time was up ({minutes:g} minutes): not tried {', '.join(untried)}.",)
    if not best:
        notes += tuple(advice.explained(tries, general=split.general is not None, retain=split.retain is not None))
    if nothing and stop and not methods:
        notes += ("No check of forgetting is usable here, so no method could pass: only the cheapest was run. Retrained references make checks usable.",)
    log.info("verdict: %s after %d tries", f"{best.attempt.method} passed" if best else "nothing passed", len(tries))
    return Verdict(best is not None, reasons, best, tuple(tries), rules, trials, p, baselines(p, rules, checks, slow=slow), notes, tuple(refused), writer)


def screened(p: Probe, trials: Sequence[Trial]) -> Callable[[nn.Module], float]:
    """Model -> how far it is from passing: the sum over the gate's usable rules, read on validation in place of test, of how far the worse end of the row lies
    beyond the rule, in units of its limit, at most 1. Test is never read."""
    rules = {t.name: t.rule for t in trials if t.usable}
    here = replace(p, split=replace(p.split, test=p.split.validation), cache={})

    def excess(after: nn.Module) -> float:
        rows = {r.name: r for r in core.audit(replace(here, after=after, cache=dict(here.cache)), checks_for(rules), slow=False)}
        return sum(min(1.0, advice.beyond(rows[name], rule)) for name, rule in rules.items() if name in rows)

    return excess


Audit = Callable[[Try], Try]


def _each(course: Course, wanted: Sequence[Option], audit: Audit, scales: Sequence[float], stop: bool, once: bool) -> tuple[list[Try], list[str]]:
    """Each method searched and the best of its tries audited, in order of cost: (tries, methods that the time did not reach). `once` ends it after the first
    that leaves a patch."""
    tries: list[Try] = []
    for number, option in enumerate(wanted):
        name, audited = option.method, any(t.grade is not None for t in tries)
        if course.over and (audited or number):
            return tries, [o.method for o in wanted[number:]]
        label = f"{name} ({number + 1}/{len(wanted)})"
        runs = laddered(course, name, scales, label) if scales else bracketed(course, name, label)
        good = next((found for o in GRADED if (found := [t for t in runs if t.attempt.outcome == o])), [])
        if good:
            top = best_of(good)
            seen = audit(top)
            runs = [seen if t is top else _left(t, "another setting of the same method did better on validation") for t in runs]
        tries += runs
        if (stop and any(t.passed for t in runs)) or (once and any(t.attempt.outcome == "ok" for t in good)):
            break
    return tries, []


def _chosen(course: Course, wanted: Sequence[Option], audit: Audit) -> tuple[list[Try], list[str]]:
    """The search of many methods, wave after wave: (tries, methods that the time did not reach). The best try of each of the front-runners is audited, in the
    order of validation, until one passes."""
    tries: list[Try] = []
    left, began = list(wanted), False
    while left and not (course.over and began):
        limit = WAVE * max(1.0, left[0].forward + left[0].backward)
        wave = [o.method for o in left if o.forward + o.backward <= limit]
        left = [o for o in left if o.method not in wave]
        found = halved(course, wave, FRONT)
        began = True
        front = sorted((t for runs in list(found.values())[:FRONT] for t in fronted(runs)), key=worth, reverse=True)
        seen: dict[int, Try] = {}
        for top in front:
            if top.attempt.outcome not in GRADED or (course.over and any(t.grade is not None for t in [*tries, *seen.values()])):
                continue
            seen[id(top)] = audit(top)
            if seen[id(top)].passed:
                break
        for runs in found.values():
            ours = any(id(t) in seen for t in runs.values())
            why = "another setting of the same method did better on validation" if ours else "other methods did better on validation"
            tries += [seen.get(id(t)) or _left(t, why) for t in runs.values()]
        missed = [name for name in wave if name not in found]
        if any(t.passed for t in tries) or missed:
            return tries, [*missed, *(o.method for o in left)] if missed else []
    return tries, [o.method for o in left]


def _left(t: Try, why: str) -> Try:
    """A try that is not audited, and why."""
    return replace(t, reasons=(f"not audited: {why}",)) if t.attempt.outcome == "ok" else t


def tuned(
    name: str, model: nn.Module, task: Task, split: Split, validate: Callable[[nn.Module], float] | None, *, scales: Sequence[float] = (),
    fixed: Mapping[str, Any] | None = None, seed: int = 0, folder: Path | str | None = None, kept: dict | None = None, label: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Try]:  # fmt: skip
    """Runs of one method, each ended at its best state on validation, graded, not audited: one for every multiple of its strength, or as many as a search
    takes where none are named; one as given, without validation or with `fixed` settings that `searched` says no to."""
    course = Course(model, task, split, validate, seed, {name: fixed or {}}, folder, {} if kept is None else kept, progress)
    return laddered(course, name, scales, label) if scales else bracketed(course, name, label)


def laddered(course: Course, name: str, scales: Sequence[float], label: str = "") -> list[Try]:
    """Runs of one method at these multiples of its strength."""
    fixed = course.fixed.get(name, {})
    if course.validate is None or not searched(name, course.task, fixed):
        return [course.run(name, {}, label)]
    changes = [changed(name, course.model, course.task, course.split, fixed, scale) for scale in scales]
    return [course.run(name, change, label, str(rung)) for rung, change in enumerate(changes) if not rung or change != changes[0]]


def told(t: Try) -> str:
    """Why a try did not pass: what its run came to, where that was not ok, and what the gate said."""
    ran = () if t.attempt.outcome == "ok" else (f"{t.attempt.outcome.replace('_', ' ')}: {t.attempt.reason}",)
    return "; ".join((*ran, *t.reasons)) or t.attempt.reason
