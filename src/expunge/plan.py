"""Plan and autopilot: what can be done with the parts at hand, and the search for the cheapest patch that passes its gate."""

from __future__ import annotations

import copy
import datetime
import itertools
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.core import Probe, Row, audit, score
from expunge.audits.verdict import UTILITY, Trial, default_rules, judge, selftest
from expunge.errors import ExpungeError
from expunge.guard import Guard
from expunge.registry import METHODS
from expunge.run import Attempt, preflight, unlearn
from expunge.types import Split, Task

SCALES = (1.0, 3.0, 0.3)
"""Multiples of a method's default strength that the autopilot tries, best on validation first audited."""

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


def plan(task: Task, split: Split, *, retrain_passes: float | None = None) -> list[Option]:
    """All methods, feasible and cheapest first. `retrain_passes`: examples forward plus backward that training from scratch takes."""
    options = []
    for record in METHODS.values():
        try:
            record.check(task, split)
            forward, backward = record.expected(split, record.defaults)
            share = None if not retrain_passes else (forward + backward) / retrain_passes
            options.append(Option(record.name, True, "", record.assurance, forward, backward, share, record.needs))
        except ExpungeError as error:
            options.append(Option(record.name, False, str(error).split(". Methods")[0], record.assurance, 0.0, 0.0, None, record.needs))
    return sorted(options, key=lambda o: (not o.feasible, o.forward + o.backward, o.method))


@dataclass(frozen=True)
class Try:
    """One attempt and its audit. Rows are there only for the outcome `ok`."""

    attempt: Attempt
    rows: tuple[Row, ...] = ()
    reasons: tuple[str, ...] = ()
    score: float | None = None

    @property
    def passed(self) -> bool:
        """The run ended ok, was audited, and no usable rule refused."""
        return self.attempt.outcome == "ok" and bool(self.rows) and not self.reasons


@dataclass(frozen=True, repr=False)
class Verdict:
    """The end of a request: passed or not, why, every try, the self-test, and all that a report needs."""

    passed: bool
    reasons: list[str]
    chosen: Try | None
    tries: tuple[Try, ...]
    rules: Mapping[str, str]
    trials: tuple[Trial, ...]
    probe: Probe
    baselines: Mapping[str, list[Row]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        what = f"passed with {self.chosen.attempt.method}" if self.chosen else "not passed: " + ("; ".join(self.reasons) or "no try")
        return f"Verdict({what}; {len(self.tries)} tries, {len(self.probe.references)} retrained references)"

    def _repr_html_(self) -> str:
        """The report, inside a notebook's cell."""
        from html import escape

        from expunge.report.html import render

        return f'<iframe srcdoc="{escape(render(self.document()))}" width="100%" height="700" style="border:0"></iframe>'

    def save(self, folder: Path | str, title: str = "Unlearning report", key: bytes | None = None) -> dict[str, Any]:
        """Write report.html, report.json and, if a patch was chosen, patch.safetensors (signed with `key`) to a folder; returns the document.

        Raises PatchError when a file cannot be written; none is left half-written.
        """
        from expunge.report import html, table

        folder, document = Path(folder), self.document(title)
        if self.chosen is not None and self.chosen.attempt.patch is not None:
            document["chosen"]["patch"] = self.chosen.attempt.patch.save(folder / "patch.safetensors", key).name
        html.write(document, folder / "report.html")
        table.write(document, folder / "report.json")
        return document

    def document(self, title: str = "Unlearning report", *, pictures: bool = True) -> dict[str, Any]:
        """JSON-able record in the report's schema."""
        from expunge import __version__
        from expunge.report.pictures import pictures as draw

        p, chosen = self.probe, self.chosen
        shown = chosen or next((t for t in reversed(self.tries) if t.attempt.patch is not None and t.attempt.seed == p.seed), None)
        after = None if shown is None else patched(p.before, shown.attempt)
        return {
            "title": title, "asked": p.split.asked or f"{len(p.split.forget)} records", "version": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
            "task": p.task.name, "parts": {n: len(part) for n, part in p.split.parts().items()}, "references": len(p.references),
            "assurance": METHODS[shown.attempt.method].assurance if shown and shown.attempt.method in METHODS else "approximate",
            "verdict": {"passed": self.passed, "reasons": list(self.reasons)},
            "chosen": None if chosen is None else {
                "method": chosen.attempt.method, "settings": dict(chosen.attempt.settings), "seed": chosen.attempt.seed, "cost": self._cost(chosen.attempt),
                **({} if chosen.attempt.patch is None else {"digest": chosen.attempt.patch.digest, "places": chosen.attempt.patch.places}),
            },
            "rules": dict(self.rules), "tries": [self._try(t) for t in self.tries],
            "baselines": {name: [asdict(r) for r in rows] for name, rows in self.baselines.items()},
            "selftest": [asdict(t) for t in self.trials], "notes": list(self.notes),
            "pictures": draw(replace(p, after=after, cache=dict(p.cache)), self.tries) if pictures and after is not None else {},
        }  # fmt: skip

    def _cost(self, attempt: Attempt) -> dict[str, float | None]:
        total = self.probe.cost.get("retrain_passes")
        return {**attempt.cost, "share": None if not total else attempt.meter.passes / total}

    def _try(self, t: Try) -> dict[str, Any]:
        a = t.attempt
        return {
            "method": a.method, "settings": dict(a.settings), "seed": a.seed, "outcome": a.outcome, "reason": a.reason, "passed": t.passed,
            "reasons": list(t.reasons), "cost": self._cost(a), "rows": [asdict(r) for r in t.rows],
        }  # fmt: skip


def patched(model: nn.Module, attempt: Attempt) -> nn.Module:
    """A copy of the model with the attempt's patch applied."""
    twin = copy.deepcopy(model)
    if attempt.patch is not None:
        attempt.patch.apply(twin)
    return twin


def closeness(model: nn.Module, task: Task, split: Split):
    """A validation score for tuning and stopping, larger is better, 0 at best: reads forget and validation only, never test.

    Records: -(2 |AUC(forget loss against validation loss of the same classes) - 1/2|); removed class: -(accuracy on forget). In both, minus
    twice the accuracy lost on validation (regression: the relative rise of its loss).
    """
    if split.validation is None:
        return None
    probe = Probe(model, model, task, split)
    removed = torch.tensor(probe.removed())
    start = score(model, task, split.validation)

    def utility(s) -> float:
        if s.labels is None:
            return -float(s.nll.mean()) / max(float(start.nll.mean()), 1e-12)
        keep = ~torch.isin(s.labels, removed)
        return float(s.correct[keep].float().mean()) if bool(keep.any()) else 0.0

    before = utility(start)

    def validate(now: nn.Module) -> float:
        forget, unseen = score(now, task, split.forget), score(now, task, split.validation)
        remains = float(forget.correct.float().mean()) if len(removed) else 2 * abs(_auc(unseen.nll, forget.nll) - 0.5)
        return -remains - 2 * max(0.0, before - utility(unseen))

    return validate


def _auc(high: torch.Tensor, low: torch.Tensor) -> float:
    """P(high > low) + P(equal) / 2."""
    pooled = torch.cat([high, low])
    order = pooled.unique(return_inverse=True)[1].double()
    counts = torch.bincount(order.long()).double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[order.long()]
    n, m = len(high), len(low)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def audited(
    before: nn.Module, after: nn.Module, task: Task, split: Split, *, references: Sequence[nn.Module] = (), rules: Mapping[str, str] | None = None,
    seed: int = 0, attempt: Attempt | None = None, retrain_passes: float | None = None, slow: bool = True,
) -> Verdict:  # fmt: skip
    """Audit one candidate: self-test of the rules, all rows, verdict."""
    preflight(before, task, split)
    p = Probe(before, after, task, split, tuple(references), seed, {"retrain_passes": retrain_passes} if retrain_passes else {})
    rules = dict(rules or default_rules(p))
    trials = tuple(selftest(p, rules))
    run = attempt or Attempt("given", {}, seed, "ok", "", None)
    one = _audit(p, run, after, trials, slow)
    return Verdict(one.passed, list(one.reasons), one if one.passed else None, (one,), rules, trials, p, baselines(p), _notes(p, trials))


def _audit(p: Probe, attempt: Attempt, after: nn.Module, trials: Sequence[Trial], slow: bool = True, checks: Sequence[str] = ()) -> Try:
    probe = replace(p, after=after, cost={**p.cost, **attempt.cost})
    rows = tuple(audit(probe, checks, slow=slow))
    return Try(attempt, rows, tuple(judge(rows, trials)))


def baselines(p: Probe, checks: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Rows of the untouched original, and of one retrained model read against the others; of all checks or the named ones."""
    out = {"original": audit(replace(p, after=p.before), checks, slow=False)}
    if len(p.references) >= 2:
        out["retrained"] = audit(replace(p, after=p.references[0], references=p.references[1:]), checks, slow=False)
    return out


def _notes(p: Probe, trials: Iterable[Trial]) -> tuple[str, ...]:
    notes = [
        f"{t.name}: unusable here (the model that must fail reads {t.original}, a retrained one {t.retrained or 'none at hand'})"
        for t in trials
        if not t.usable
    ]
    if not p.references:
        notes.append("No retrained reference was at hand: nothing is claimed about closeness to a model that never saw the records.")
    return tuple(notes)


def forget(
    model: nn.Module, task: Task, split: Split, *, references: Sequence[nn.Module] = (), methods: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None, rules: Mapping[str, str] | None = None, seed: int = 0, folder: Path | str | None = None,
    retrain_passes: float | None = None, scales: Sequence[float] = SCALES, stop: bool = True, slow: bool = True,
    checks: Sequence[str] = (), progress: Callable[[str, int, int], None] | None = None,
) -> Verdict:  # fmt: skip
    """The autopilot: feasible methods in order of cost, tuned on validation alone, until one patch passes the gate; every try is kept.

    references      models retrained without the forget set, at least three for the self-test of KLOM
    methods         only these; the default is every feasible approximate method (retraining is what they are compared with)
    settings        method -> settings that are fixed by the user; such a method is run once, as given
    scales          multiples of the method's strength to try on validation; (1.0,) runs defaults only. Without validation there is no tuning
    checks          only these checks; the default is all that apply
    slow            False leaves out checks that train (relearning)
    stop            False: audit every method, choose the cheapest that passes. True also stops after the cheapest method when no check of
                    forgetting passed its self-test, as then nothing can pass; `methods` overrides that
    Raises SplitError and the like for bad input. The model is never changed; the patch is `verdict.chosen.attempt.patch`.
    """
    preflight(model, task, split)
    for name in methods:
        METHODS[name].check(task, split)
    p = Probe(model, model, task, split, tuple(references), seed, {"retrain_passes": retrain_passes} if retrain_passes else {})
    rules = dict(rules or default_rules(p))
    trials = tuple(selftest(p, rules))
    kind = "class" if p.removed() else "records"
    order = [o.method for o in plan(task, split, retrain_passes=retrain_passes) if o.feasible]
    wanted = [
        m for m in order if (m in methods if methods else METHODS[m].assurance == "approximate" and (kind in METHODS[m].forgets or task.name == "regression"))
    ]
    blind = not any(t.usable and not t.name.startswith(UTILITY) for t in trials)
    validate, tries, best = closeness(model, task, split), [], None
    for number, name in enumerate(wanted):
        fixed = dict((settings or {}).get(name, {}))
        ladder = [{}] if fixed or validate is None else list(_ladder(METHODS[name].defaults, scales))
        runs = []
        for rung, change in enumerate(ladder):
            where = None if folder is None else Path(folder) / f"{name}-{rung}"
            watch = Guard(validate=validate, every=max(5, len(split.forget) // 64), progress=progress, label=f"{name} ({number + 1}/{len(wanted)})")
            attempt = unlearn(name, model, task, split, seed=seed, guard=watch, folder=where, **{**fixed, **change})
            graded = validate(patched(model, attempt)) if validate and attempt.outcome == "ok" else None
            runs.append(Try(attempt, score=graded))
        good = [t for t in runs if t.attempt.outcome == "ok"]
        if good:
            top = max(good, key=lambda t: t.score if t.score is not None else 0.0)
            seen = _audit(p, top.attempt, patched(model, top.attempt), trials, slow, checks)
            runs = [
                replace(seen, score=t.score) if t is top else replace(t, reasons=("not audited: another setting of the same method did better on validation",))
                for t in runs
            ]
        tries += runs
        passing = [t for t in runs if t.passed]
        if passing and (best is None or passing[0].attempt.meter.passes < best.attempt.meter.passes):
            best = passing[0]
        if stop and (best or (blind and not methods and good)):
            break
    reasons = (
        []
        if best
        else (
            [f"{t.attempt.method}: {'; '.join(t.reasons) or t.attempt.reason}" for t in tries if t.rows or t.attempt.outcome != "ok"]
            or ["no feasible method for this task and split"]
        )
    )
    notes = _notes(p, trials)
    if blind and stop and not methods:
        notes += ("No check of forgetting is usable here, so no method could pass: only the cheapest was run. Retrained references make checks usable.",)
    return Verdict(best is not None, reasons, best, tuple(tries), rules, trials, p, baselines(p, checks), notes)


def _ladder(defaults: Mapping[str, Any], scales: Sequence[float]) -> Iterable[dict[str, Any]]:
    name = next((s for s in STRENGTHS if isinstance(defaults.get(s), float)), None)
    return ({} if name is None or scale == 1.0 else {name: defaults[name] * scale} for scale in (scales if name else itertools.islice(scales, 1)))
