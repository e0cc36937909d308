"""Plan and autopilot: what can be done with the parts at hand, and the search for the cheapest patch that passes its gate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from expunge.audits.core import Probe
from expunge.audits.verdict import blind, default_rules, selftest
from expunge.core.errors import ExpungeError, ModelError
from expunge.core.guard import Guard, Meter
from expunge.core.modality import of
from expunge.core.registry import METHODS
from expunge.core.types import Split, Task
from expunge.engine.run import GRADED, preflight, unlearn, unsound
from expunge.planning.outcome import Try, Verdict, baselines, examined, families, patched, remarks, required, trusted

KINDS = {"moe": "a mixture of experts"}
"""What a method that works on one kind of model alone asks for (`Method.twin`), in words."""

STRENGTHS = ("lr", "scale", "alpha")
"""Settings that set how hard a method pushes, in order of preference: the autopilot scales the first that a method has."""


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
    task: Task, split: Split, *, model: nn.Module | None = None, settings: Mapping[str, Mapping[str, Any]] | None = None, retrain_passes: float | None = None,
) -> list[Option]:  # fmt: skip
    """All methods, feasible and cheapest first. Methods are priced as the autopilot runs them.

    model           what is to forget; without it, a method for one kind of model alone (a mixture of experts) counts as not feasible
    settings        method -> settings that are fixed by the user
    retrain_passes  examples forward plus backward that training from scratch takes
    """
    options = []
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
    model: nn.Module, task: Task, split: Split, *, references: Sequence[Any] = (), methods: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None, rules: Mapping[str, str] | None = None, seed: int = 0, folder: Path | str | None = None,
    retrain_passes: float | None = None, scales: Sequence[float] = (), stop: bool = True, slow: bool = True,
    checks: Sequence[str] = (), pool: Any = None, progress: Callable[[str, int, int], None] | None = None, require: str = "",
) -> Verdict:  # fmt: skip
    """The autopilot: feasible methods in order of cost, tuned on validation alone, until one patch passes the gate; every try is kept.

    references      models retrained without the forget set (or records of them, `parts.provenance.Reference`); each is checked before it is believed. From one
                    on they make `verified` possible, three or more make it easier
    require         the grade that passes, supported or verified; empty: the highest that the task's checks can give
    methods         only these; the default is every feasible approximate method (retraining is what they are compared with)
    settings        method -> settings that are fixed by the user. Such a method is run once, as given, but for texts where `lr` is none of them: then the
                    step size is searched for, and what is not named is as the autopilot has it
    scales          multiples of the method's strength to try on validation; those of the modality when none are given, (1.0,) runs defaults
                    only. Without validation there is no tuning
    checks          only these checks and those that the rules read; the default is all that apply
    slow            False leaves out checks and baselines that train, but for those the gate reads
    pool            shadow models (`audits.pool.shadows`), without which per-example attacks are left out
    stop            False: audit every method, choose the cheapest that passes. True also stops after the cheapest method when no check of
                    forgetting passed its self-test, as then nothing can pass; `methods` overrides that
    A run that ends otherwise than `ok` never passes; one that is partial or harmed is audited where no setting of its method did better, to be looked at.
    Raises SplitError and the like for bad input. The model is never changed; the patch is `verdict.chosen.attempt.patch`.
    """
    asked = families(task, rules)
    required(asked, require)
    if broken := unsound(model):
        raise ModelError(f"the model holds values that are not finite, first in {broken}: nothing can be audited against it")
    preflight(model, task, split)
    given = {name: METHODS[name].settings((settings or {}).get(name, {})) for name in {*methods, *(settings or {})}}
    for name in methods:
        METHODS[name].check(task, split, given[name], model)
        METHODS[name].made_for(task, split)
    kept_models, refused = trusted(Probe(model, model, task, split, seed=seed), references)
    p = Probe(model, model, task, split, kept_models, seed, {"retrain_passes": retrain_passes} if retrain_passes else {}, pool=pool)
    rules = dict(rules or default_rules(p))
    trials = tuple(selftest(p, rules))
    order = [o.method for o in plan(task, split, model=model, settings=settings, retrain_passes=retrain_passes) if o.feasible]
    wanted = [m for m in order if (m in methods if methods else METHODS[m].assurance == "approximate")]
    nothing = blind(trials)
    validate, tries, best, kept = closeness(model, task, split), [], None, {}
    scales = scales or of(task).search.scales
    for number, name in enumerate(wanted):
        fixed = dict((settings or {}).get(name, {}))
        runs = tuned(
            name, model, task, split, validate, scales=scales, fixed=fixed, seed=seed, folder=folder, kept=kept, progress=progress,
            label=f"{name} ({number + 1}/{len(wanted)})",
        )  # fmt: skip
        good = next((found for o in GRADED if (found := [t for t in runs if t.attempt.outcome == o])), [])
        if good:
            top = best_of(good)
            seen = examined(p, top.attempt, patched(model, top.attempt), trials, slow, checks, require=require, refused=refused, families=asked)
            runs = [
                replace(seen, score=t.score)
                if t is top
                else replace(t, reasons=("not audited: another setting of the same method did better on validation",))
                if t.attempt.outcome == "ok"
                else t
                for t in runs
            ]
        tries += runs
        passing = [t for t in runs if t.passed]
        if passing and (best is None or passing[0].attempt.meter.passes < best.attempt.meter.passes):
            best = passing[0]
        if stop and (best or (nothing and not methods and any(t.attempt.outcome == "ok" for t in good))):
            break
    reasons = (
        []
        if best
        else ([f"{t.attempt.method}: {told(t)}" for t in tries if t.rows or t.attempt.outcome != "ok"] or ["no feasible method for this task and split"])
    )
    notes = remarks(p, trials, refused)
    if nothing and stop and not methods:
        notes += ("No check of forgetting is usable here, so no method could pass: only the cheapest was run. Retrained references make checks usable.",)
    return Verdict(best is not None, reasons, best, tuple(tries), rules, trials, p, baselines(p, rules, checks, slow=slow), notes, tuple(refused))


def tuned(
    name: str, model: nn.Module, task: Task, split: Split, validate: Callable[[nn.Module], float] | None, *, scales: Sequence[float],
    fixed: Mapping[str, Any] | None = None, seed: int = 0, folder: Path | str | None = None, kept: dict | None = None, label: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Try]:  # fmt: skip
    """One run of a method for every multiple of its strength (one run as given, without validation or with `fixed` settings that `searched` says no to),
    each ended at its best state on validation, graded, not audited. A modality's recipe is followed; a method that refuses a retain loss is run without."""
    runs = []
    ladder = _ladder(name, model, task, split, scales, fixed or {}) if validate is not None and searched(name, task, fixed or {}) else [{}]
    for rung, change in enumerate(ladder):
        where = None if folder is None else Path(folder) / f"{name}-{rung}"
        watch = Guard(validate=validate, every=max(5, len(split.forget) // 64), progress=progress, label=label or name, kept={} if kept is None else kept)
        attempt = unlearn(name, model, task, split, seed=seed, guard=watch, folder=where, **{**(fixed or {}), **change})
        if attempt.outcome == "refused" and "retain" in change:
            own = {k: v for k, v in change.items() if k != "retain"}
            attempt = unlearn(
                name, model, task, split, seed=seed, guard=replace(watch, meter=Meter(), coverage={}, doubts=[]), folder=where, **{**(fixed or {}), **own}
            )
        graded = validate(patched(model, attempt)) if validate and attempt.patch is not None else None
        runs.append(Try(attempt, score=graded))
    return runs


def told(t: Try) -> str:
    """Why a try did not pass: what its run came to, where that was not ok, and what the gate said."""
    ran = () if t.attempt.outcome == "ok" else (f"{t.attempt.outcome.replace('_', ' ')}: {t.attempt.reason}",)
    return "; ".join((*ran, *t.reasons)) or t.attempt.reason


def best_of(tries: Sequence[Try]) -> Try:
    """The try with the best validation score; the first where none has a score."""
    return max(tries, key=lambda t: t.score if t.score is not None else 0.0)


def searched(name: str, task: Task, fixed: Mapping[str, Any]) -> bool:
    """Whether the strength of a method is searched for when the user named these settings: none of them, or, where the modality has a recipe, all but `lr`.
    Step sizes published for language models suit other models; those of records suit most, and what is named may stand for another strength."""
    return not fixed or (of(task).search.tuned(METHODS[name].defaults) and "lr" not in fixed)


def _ladder(name: str, model: nn.Module, task: Task, split: Split, scales: Sequence[float], fixed: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """What is changed from `fixed` and the published settings for each multiple."""
    settings, search = METHODS[name].settings(fixed), of(task).search
    if search.tuned(settings):
        ours = {k: v for k, v in search.recipe(settings, split).items() if k not in fixed}
        return [{**ours, "lr": scale * search.stride(settings, task, model)} for scale in scales]
    strength = next((s for s in STRENGTHS if isinstance(settings.get(s), float)), None)
    return (
        {} if strength is None or scale == 1.0 else {strength: settings[strength] * scale} for scale in (scales if strength else itertools.islice(scales, 1))
    )
