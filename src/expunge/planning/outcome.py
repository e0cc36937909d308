"""What came of a request: every try with its audit, the verdict over them, and the document that reports show."""

from __future__ import annotations

import copy
import datetime
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.attacks.repair import suppression
from expunge.audits.core import Probe, Row, audit
from expunge.audits.grade import FAMILIES, GRADES, Grade, family, found, grade
from expunge.audits.grade import document as described
from expunge.audits.named import Named, grouped, named
from expunge.audits.plants import EXPECTED, Plants
from expunge.audits.references import Refusal, believed
from expunge.audits.verdict import Trial, checks_for, default_rules, selftest
from expunge.core.digest import model_digest, whole
from expunge.core.errors import GateError, ModelError, PatchError, ReportError, SettingError, SplitError
from expunge.core.files import write
from expunge.core.guard import quiet
from expunge.core.machine.bounds import seed_of, size_of
from expunge.core.modality import Modality, made, of
from expunge.core.patch import Patch
from expunge.core.registry import CHECKS, METHODS
from expunge.core.types import Split, Task, held, spread
from expunge.engine.results import Source, edited, released
from expunge.engine.rounding import alike
from expunge.engine.run import Attempt, preflight, unlearn
from expunge.engine.sound import ALL, broken, unsound
from expunge.parts import seal
from expunge.planning.identity import data, identity
from expunge.planning.plants import Progress, controls, recipe_of
from expunge.report import html, table
from expunge.report import pictures as shown_by
from expunge.report.front import front


def required(families: Iterable[str], asked: str = "") -> str:
    """The grade that passes: what was asked for, else the highest that these families of evidence can give. Raises SettingError for any other word."""
    if asked not in ("", "supported", "verified"):
        raise SettingError(f"require must be supported or verified, not '{asked}'")
    return asked or ("verified" if "closeness" in families else "supported")


def families(task: Task, rules: Mapping[str, str] | None) -> tuple[str, ...]:
    """Families of evidence that are asked for: those of the user's own rules, else all that exist for the task."""
    return of(task).families if not rules else tuple(name for name in FAMILIES if name in {family(rule) for rule in rules})


TRIVIAL = {
    "fine_tune": ("fine_tune", {"epochs": 1.0}), "reset_last": ("fine_tune", {"k": 1, "reset": True, "epochs": 1.0}), "guardrail": ("guardrail", {}),
}  # fmt: skip
"""Baselines: label -> method and settings. fine_tune trains for one pass over retain; reset_last draws the last layer anew and trains it alone; guardrail
leaves all weights and refuses, where it finds whom to refuse. Those of a modality (`Modality.trivial`) stand beside them."""


def trivial(task: Task) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those of TRIVIAL that work on the task."""
    return {label: found for label, found in TRIVIAL.items() if METHODS[found[0]].suits(task)}


@dataclass(frozen=True)
class Try:
    """One attempt and its audit. Rows and a grade are there only where it left a patch; one that is `partial` or `harmed` is audited to be looked at, and never
    passes. `require` is the grade that passes."""

    attempt: Attempt
    rows: tuple[Row, ...] = ()
    reasons: tuple[str, ...] = ()
    score: float | None = None
    grade: Grade | None = None
    require: str = "verified"
    trials: tuple[Trial, ...] = ()
    """The rules that it was graded by, each with its self-test."""
    plants: Plants | None = None
    """Its planted controls, where they were made."""

    @property
    def passed(self) -> bool:
        """The run ended ok, was audited, and its evidence reaches the grade that is required."""
        return self.attempt.outcome == "ok" and self.grade is not None and self.grade.reaches(self.require) and not self.reasons


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
    refused: tuple[Refusal, ...] = ()
    """References that were not believed."""
    writer: Callable[[Verdict, Path | str, tuple[str, str] | None], Path] | None = None
    """(verdict, folder, mark) -> the released folder, where the model was read from files (`planning.releasing.written`)."""

    @property
    def given(self) -> bool:
        """Whether the model after was handed in (`audited`): it is what was read, with or without a patch."""
        return self.probe.after is not self.probe.before

    @property
    def grade(self) -> Grade | None:
        """The grade of the try that is shown: the chosen one, else the best that was audited."""
        return None if self.shown is None else self.shown.grade

    @property
    def shown(self) -> Try | None:
        """The chosen try, else the best that was audited: of one grade, that with the least against it. One that was never audited is not shown."""
        mine = [t for t in self.tries if self.given or t.attempt.seed == self.probe.seed]
        best = max(
            (t for t in mine if t.grade is not None), key=lambda t: (t.attempt.outcome == "ok", GRADES.index(t.grade.grade), -len(t.grade.why)), default=None
        )
        return self.chosen or best or (next(reversed(mine), None) if self.given else None)

    @property
    def patch(self) -> Patch | None:
        """The patch of the try that is shown: the one that passed, else that of the best that did not."""
        return None if self.shown is None else self.shown.attempt.patch

    @property
    def report(self) -> dict[str, Any]:
        """The document that `save` writes, as plain values."""
        return self.document()

    def model(self, of: Try | None = None) -> nn.Module:
        """The edited model of the try that is shown, or of another of `tries`, in a copy: the model before is left alone. Raises ModelError where
        it left no patch."""
        one = of or self.shown
        if of is None and self.given:
            return copy.deepcopy(self.probe.after)
        return edited(self._source, None if one is None else one.attempt.patch)

    def release(self, folder: Path | str, *, anyway: bool = False) -> Path:
        """Write the edited model to a new folder that its own library loads, and return it: of a model that `expunge.opened` read as a run releases it
        (`planning.releasing.written`), of one in memory as `engine.results.released` does.

        anyway   also where nothing passed: the best try, with a note in the folder that it did not
        Raises GateError where nothing passed, ModelError where there is nothing to write or the folder cannot be written.
        """
        if not self.passed and not anyway:
            raise GateError(
                f"nothing passed, so nothing is released ({'; '.join(self.reasons) or 'no try'}); release(folder, anyway=True) writes the best try, marked"
            )
        mark = None if self.passed else (NOTE, self._note)
        return released(self._source, self.patch, folder, mark) if self.writer is None else self.writer(self, folder, mark)

    @property
    def _source(self) -> Source:
        return Source(self.probe.before, self.probe.task, self.probe.split)

    @property
    def _note(self) -> str:
        return "This try did not pass its gate. It is kept to be looked at:\n" + "".join(f"- {r}\n" for r in self.reasons)

    @property
    def doubts(self) -> list[str]:
        """A line on the chosen method if it is experimental; when none was chosen, on each that was tried."""
        names = dict.fromkeys(t.attempt.method for t in ([self.chosen] if self.chosen else self.tries))
        return [f"{m} is experimental: {METHODS[m].reason}" for m in names if m in METHODS and not METHODS[m].stable]

    def __repr__(self) -> str:
        what = f"{self.grade.grade} with {self.chosen.attempt.method}" if self.chosen and self.grade else "not passed: " + ("; ".join(self.reasons) or "no try")
        return f"Verdict({what}; {len(self.tries)} tries, {len(self.probe.references)} retrained references)"

    def _repr_html_(self) -> str:
        """The report, inside a notebook's cell."""
        from html import escape

        return f'<iframe srcdoc="{escape(html.render(self.document()))}" width="100%" height="700" style="border:0"></iframe>'

    def save(self, folder: Path | str, title: str = "Unlearning report", key: bytes | None = None, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write report.html, report.json and, if a patch was chosen, patch.safetensors to a folder; returns the document. The JSON is sealed (`parts.seal`);
        with `key` it and the patch are signed.

        document    written instead of `self.document(title)`, with the patch's file name and the seal added
        A patch of another run in the folder is replaced or, where none was chosen, removed.
        Raises PatchError when a file cannot be written (none is left half-written), or where the folder holds `released` of another run.
        """
        folder, document = Path(folder), document or self.document(title)
        patch = None if self.chosen is None else self.chosen.attempt.patch
        if (folder / "released").exists() and (folder / "report.json").exists() and (patch is None or _patch_of(folder) != patch.digest):
            raise PatchError(f"{folder.name} holds what another run released: name another folder, so that no report stands beside it that is not its own")
        if patch is not None:
            document["chosen"]["patch"] = patch.save(folder / PATCH, key).name
        elif (folder / PATCH).is_file():
            (folder / PATCH).unlink()
        document.pop("hmac", None)
        document |= seal.seal(document, key)
        html.write(document, folder / "report.html")
        table.write(document, folder / "report.json")
        return document

    def keep(self, folder: Path | str, key: bytes | None = None) -> Path:
        """Write the patch of the try that is shown though it did not pass, to a folder of its own, with a note that says so. May raise PatchError."""
        shown = self.shown
        patch = shown.attempt.patch
        grade = shown.grade.grade if shown.grade else shown.attempt.outcome
        replace(patch, meta={**patch.meta, "candidate": grade}).save(Path(folder) / "candidate.safetensors", key)
        write(Path(folder) / NOTE, self._note)
        return Path(folder)

    def document(self, title: str = "Unlearning report", *, pictures: bool = True) -> dict[str, Any]:
        """JSON-able record in the report's schema."""
        from expunge import __version__

        p, chosen = self.probe, self.chosen
        shown = self.shown
        after = None if shown is None else p.after if self.given else patched(p.before, shown.attempt)
        read = None if shown is None or shown.attempt.outcome == "diverged" else after
        seen = replace(p, after=p.before if read is None else read, cache=dict(p.cache))
        checks = [] if read is None else self._named(shown, read)
        return {
            "title": title, "asked": p.split.asked or f"{len(p.split.forget)} records", "version": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
            "task": p.task.name, "parts": {n: len(part) for n, part in p.split.parts().items()}, "references": len(p.references),
            **assured(shown), "refused": [asdict(r) for r in self.refused],
            "near": copies(p), "plants": None if shown is None else controlled(shown.plants), "front": {
                **front(seen, self.grade, () if shown is None else shown.rows, checks, self.refused),
                "of": {} if shown is None else {"method": shown.attempt.method, "seed": shown.attempt.seed, "passed": shown.passed},
            },
            "data": data(p.split), "identity": identity(p, self.rules, None if shown is None else shown.attempt.patch, after),
            "verdict": {
                "passed": self.passed, "reasons": list(self.reasons), "require": shown.require if shown else required(of(p.task).families),
                **(described(self.grade) or {}),
            },
            "chosen": None if chosen is None else {
                "method": chosen.attempt.method, "settings": dict(chosen.attempt.settings), "seed": chosen.attempt.seed, "cost": self._cost(chosen.attempt),
                "stable": METHODS[chosen.attempt.method].stable if chosen.attempt.method in METHODS else None,
                **({} if chosen.attempt.patch is None else {"digest": chosen.attempt.patch.digest, "places": chosen.attempt.patch.places}),
            },
            "talk": [] if read is None or not pictures else of(p.task).talk(p, read),
            "sections": grouped(checks) if checks else [],
            "rules": dict(self.rules), "tries": [self._try(t) for t in self.tries],
            "baselines": {name: [asdict(r) for r in rows] for name, rows in self.baselines.items()},
            "selftest": [asdict(t) for t in self.trials], "notes": list(self.notes),
            "pictures": shown_by.pictures(seen, self.tries) if pictures and read is not None else {},
        }  # fmt: skip

    def _named(self, shown: Try, after: nn.Module) -> list[Named]:
        """The named checks of the try that is shown."""
        mine = {label for label, (name, _) in trivial(self.probe.task).items() if METHODS[name].assurance != "suppression"}
        same = {t.attempt.seed for t in self.tries if t.rows and t.attempt.method == shown.attempt.method}
        table = {*self.baselines, *(t.attempt.method for t in self.tries)}
        facts = {
            "seeds": True if len(same) >= 3 else None,
            "baselines": {"original", "retrained", *mine, *self._trained()} <= table,
            "reversible": None if shown.attempt.patch is None else reversible(self.probe.before, shown.attempt),
        }
        return named(replace(self.probe, after=after), shown.rows, facts)

    def _trained(self) -> set[str]:
        """Labels of the modality's own trivial baselines."""
        return set() if of(self.probe.task).trivial is Modality.trivial else {"fine_tune", "reset_last"}

    def _cost(self, attempt: Attempt) -> dict[str, float | None]:
        total = self.probe.cost.get("retrain_passes")
        return {**attempt.cost, "share": None if not total else attempt.meter.passes / total}

    def _try(self, t: Try) -> dict[str, Any]:
        a = t.attempt
        return {
            "method": a.method, "settings": dict(a.settings), "seed": a.seed, "outcome": a.outcome, "reason": a.reason,
            "passed": t.passed, "grade": None if t.grade is None else t.grade.grade,
            "reasons": list(t.reasons), "cost": self._cost(a), "rows": [asdict(r) for r in t.rows],
        }  # fmt: skip


PATCH, NOTE = "patch.safetensors", "NOT-PASSED.txt"


def _patch_of(folder: Path) -> str:
    """Digest of the patch that the report in a folder names; empty where it is no report, or names none."""
    try:
        return str(seal.read(folder / "report.json").get("chosen", {}).get("digest", ""))
    except (ReportError, AttributeError):
        return ""


def controlled(e: Plants | None) -> dict[str, Any] | None:
    """Planted controls in a document: how many of each, where the plants come from, how well each set was learnt, what they cost, and why they are void."""
    if e is None:
        return None
    sizes = {"twins": e.twins, "plants": len(e.taught), "candidates": len(e.after.nll) - e.twins}
    learnt = [{"passes": passes, "loss": loss, "goal": goal} for passes, loss, goal in e.planting]
    return {**sizes, "kind": e.kind, "planting": learnt, "cost": dict(e.cost), "void": list(e.why)}


COMPARED = 1 << 31
"""Most pairs of records to forget and kept ones that are compared; beyond, some of those to forget are left out, evenly."""
LISTED = 1000
"""Most near copies that a document lists."""


def copies(p: Probe) -> dict[str, Any] | None:
    """Kept records that are near copies of one to forget: how many, and (forget id, kept id, likeness) of the first; how many records were compared. None where
    the modality cannot tell."""
    forget, retain = p.split.forget, p.split.retain
    if not (held(forget) and held(retain)):
        return None
    rows = spread(len(forget), max(1, COMPARED // len(retain)))
    some = forget if len(rows) == len(forget) else forget.take(rows)
    found = p.once(("near",), p.before, lambda: of(p.task).near(replace(p.split, forget=some)))
    if found is None:
        return None
    return {"n": len(found), "pairs": [list(pair) for pair in found[:LISTED]], "compared": {"forget": len(rows), "retain": len(retain)}}


def assured(shown: Try | None) -> dict[str, str]:
    """`assurance`: a suppression where the evidence shows one (`shown`), else what a method that ran here can claim. What a file says of itself is `claimed`
    alone, unless it says less."""
    if shown is not None and (why := suppression(shown.rows)):
        return {"assurance": "suppression", "shown": why}
    if shown is None or shown.attempt.method not in METHODS:
        return {"assurance": "approximate"}
    says = METHODS[shown.attempt.method].assurance
    return {"assurance": says} if shown.attempt.ran or says in ("approximate", "suppression") else {"assurance": "approximate", "claimed": says}


def patched(model: nn.Module, attempt: Attempt) -> nn.Module:
    """A copy of the model with the attempt's patch applied."""
    twin = copy.deepcopy(model)
    if attempt.patch is not None:
        attempt.patch.apply(twin)
    return twin


def reversible(model: nn.Module, attempt: Attempt) -> bool:
    """Whether applying the attempt's patch and then its inverse restores every bit."""
    twin = copy.deepcopy(model)
    attempt.patch.apply(twin).apply(twin)
    return model_digest(twin) == model_digest(model)


def fitting(after: nn.Module, task: Task, split: Split) -> None:
    """Raises ModelError, or what the modality says, for a model after that cannot take the data."""
    of(task).fits(after, split, "the model after")
    try:
        with quiet(after):
            of(task).preflight(after, task, split)
    except SplitError as error:
        raise ModelError(f"the model after does not fit the data that the model before takes: {error}") from None


def audited(
    before: nn.Module, after: nn.Module, task: Task | str, split: Split, *, references: Sequence[Any] = (), rules: Mapping[str, str] | None = None,
    seed: int = 0, attempt: Attempt | None = None, retrain_passes: float | None = None, slow: bool = True, pool: Any = None, forgotten: Any = None,
    require: str = "", twins: int = 0, workers: int = 1, folder: Path | str | None = None, progress: Progress | None = None, memory: int | str = 0,
) -> Verdict:  # fmt: skip
    """Audit one candidate: self-test of the rules, all rows, verdict, named checks.

    references models that never saw the forget set, or records of them (`parts.provenance.Reference`); each is checked before it is believed
    attempt    how it came about, if it was a run of `unlearn` or a loaded patch
    require    the grade that passes, supported or verified; empty: the highest that the task's checks can give
    pool       shadow models (`audits.pool.shadows`), without which per-example attacks are left out
    forgotten  the same after the method made them forget (`audits.pool.forgotten`), for U-LiRA
    slow       False leaves out checks and baselines that train, but for those the gate reads
    twins      planted controls of so many twins (`planning.plants`): evidence without references. The attempt's method is run again, and must leave the same
               patch; `workers` at a time, what they read kept in `folder`. They are made where nothing else refutes the candidate
    memory     bytes that gradients of single examples may take at once when it is run again, as they were when the patch was made (`engine.run.unlearn`)
    """
    before, after, task = whole(before), whole(after), made(task)
    seed_of(seed)
    room = size_of("memory", memory)
    if name := unsound(before):
        raise ModelError(f"the model before holds values that are not finite, first in {name}: nothing can be audited against it")
    preflight(before, task, split)
    if why := broken(before, task, split, ALL):
        raise ModelError(f"the model before {why}: nothing can be audited against it")
    attempt = attempt or Attempt("given", {}, seed, "ok", "", None)
    if why := unsound(after):
        return unreadable(Probe(before, after, task, split, seed=seed), attempt, f"holds values that are not finite, first in {why}", rules, require)
    fitting(after, task, split)
    if why := broken(after, task, split, ALL):
        return unreadable(Probe(before, after, task, split, seed=seed), attempt, why, rules, require)
    if attempt.outcome == "ok" and (same := alike(before, after, task, split)):
        attempt = replace(attempt, outcome="no_op", reason=f"the model after {same}: nothing was unlearned")
    kept, refused = trusted(Probe(before, after, task, split, seed=seed), references)
    p = Probe(before, after, task, split, kept, seed, {"retrain_passes": retrain_passes} if retrain_passes else {}, pool=pool, forgotten=forgotten)
    asked = families(task, rules)
    own, trials = rules, first(p, rules, twins)
    one = examined(p, attempt, after, trials, slow, require=require, refused=refused, families=asked)
    if twins and attempt.outcome == "ok" and one.grade is not None and one.grade.grade != "refuted":
        recipe, why = recipe_of(before, task, split, attempt, room)
        e = Plants(why=(why,)) if recipe is None else controls(
            before, after, task, split, recipe, twins=twins, seed=seed, workers=workers, folder=folder, seconds=attempt.meter.seconds, progress=progress,
        )  # fmt: skip
        one = regraded(p, own, one, after, e, slow, require=require, refused=refused, families=asked)
    q = replace(p, plants=one.plants)
    rules = {t.name: t.rule for t in one.trials}
    lines = baselines(q, rules, slow=slow)
    reasons = list(one.reasons) if attempt.outcome == "ok" else [ended(attempt), *one.reasons]
    notes = remarks(q, one.trials, refused)
    return Verdict(one.passed, reasons, one if one.passed else None, (one,), rules, one.trials, q, lines, notes, tuple(refused))


def ended(attempt: Attempt) -> str:
    """What an attempt that is not ok came to, and why."""
    return f"{attempt.outcome.replace('_', ' ')}: {attempt.reason}"


def unreadable(p: Probe, attempt: Attempt, why: str, rules: Mapping[str, str] | None, require: str) -> Verdict:
    """The verdict on a candidate that cannot be read (`engine.sound.broken`): diverged, and refuted without a measurement."""
    gone = replace(attempt, outcome="diverged", reason=f"the model after {why}: it answers nothing that can be audited")
    one = Try(gone, grade=Grade("refuted", why=(gone.reason,)), require=required(families(p.task, rules), require))
    return Verdict(False, [ended(gone)], None, (one,), dict(rules or {}), (), p)


def first(p: Probe, rules: Mapping[str, str] | None, twins: int) -> tuple[Trial, ...]:
    """The rules that a candidate is graded by before its planted controls are made, or where none are, each with its self-test: the user's own, else those of
    the default gate that do not read plants."""
    found = rules or default_rules(replace(p, plants=EXPECTED) if twins else p)
    return tuple(selftest(p, {n: r for n, r in found.items() if not (twins and n.startswith("plants."))}))


def regraded(
    p: Probe, rules: Mapping[str, str] | None, one: Try, after: nn.Module, e: Plants, slow: bool = True, checks: Sequence[str] = (), *, require: str = "",
    refused: Sequence[Refusal] = (), families: Sequence[str] = FAMILIES,
) -> Try:  # fmt: skip
    """The try with its planted controls, graded again by all rules; where they are void, by the rules that do without, and the reason is named."""
    q = replace(p, plants=e)
    trials = tuple(selftest(q, dict(rules or default_rules(q if e.there else p))))
    return examined(q, one.attempt, after, trials, slow, checks, require=require, refused=refused, families=families)


def trusted(p: Probe, references: Sequence[Any]) -> tuple[tuple[nn.Module, ...], list[Refusal]]:
    """(models of the references that are believed, those that are not). Raises SplitError for a believed one that cannot take the data."""
    kept, refused = believed(p, references)
    for r in kept:
        of(p.task).fits(r.model, p.split, r.name)
    return tuple(r.model for r in kept), refused


def examined(
    p: Probe, attempt: Attempt, after: nn.Module, trials: Sequence[Trial], slow: bool = True, checks: Sequence[str] = (), *, require: str = "",
    refused: Sequence[Refusal] = (), families: Sequence[str] = FAMILIES,
) -> Try:  # fmt: skip
    """The attempt with all rows (or those of the named checks, and in any case those that the rules read), its grade, and the reasons if that is not enough."""
    q = replace(p, after=after, cost={**p.cost, **attempt.cost})
    rows = tuple(_rows(q, [t.name for t in trials], slow, checks))
    doubts = [f"{r.name} was not believed: {r.why}" for r in [*refused, *believed(q, p.references)[1]]]
    compared = [f"{len(p.references)} references"] if p.references and not any("the candidate" in d for d in doubts) else []
    if p.plants is not None:
        compared += [p.plants.told] if any(r.name == "plants.auc" for r in rows) else []
        doubts += [*(f"planted controls are void: {why}" for why in p.plants.why), *p.plants.doubts]
    comparison = "; ".join(compared)
    require = required(families, require)
    given = grade(found(rows, trials), named(q, rows), families=families, comparison=comparison, doubts=doubts)
    if attempt.outcome == "no_op" and given.reaches("supported"):
        given = Grade("inconclusive", given.findings, (attempt.reason,))
    reasons = () if given.reaches(require) else tuple(f"{given.grade}: {why}" for why in given.why)
    return Try(attempt, rows, reasons, grade=given, require=require, trials=tuple(trials), plants=p.plants)


def _rows(p: Probe, rules: Iterable[str], slow: bool, checks: Sequence[str] = ()) -> list[Row]:
    first = [c for c in CHECKS if (c in checks if checks else slow or not CHECKS[c].slow)]
    return audit(p, [*first, *(c for c in checks_for(rules) if c not in first)])


def baselines(p: Probe, rules: Iterable[str], checks: Sequence[str] = (), *, slow: bool = False) -> dict[str, list[Row]]:
    """Rows of the untouched original, of one retrained model read against the others, and, if slow, of what TRIVIAL makes."""
    models = {"original": replace(p, after=p.before)}
    if slow and p.split.retain is not None:
        for label, (name, settings) in trivial(p.task).items():
            attempt = unlearn(name, p.before, p.task, p.split, seed=p.seed, **settings)
            if attempt.outcome == "ok":
                models[label] = replace(p, after=patched(p.before, attempt), cost={**p.cost, **attempt.cost})
        models |= {label: replace(p, after=made) for label, made in of(p.task).trivial(p.before, p.task, p.split, p.seed).items()}
    if len(p.references) >= 2:
        models["retrained"] = replace(p, after=p.references[0], references=p.references[1:], spread=p.references)
    return {label: _rows(q, rules, False, checks) for label, q in models.items()}


def remarks(p: Probe, trials: Iterable[Trial], refused: Sequence[Refusal] = ()) -> tuple[str, ...]:
    """Sentences for a report: rules that could not be used, references that were not believed, and what is not claimed without any."""
    said = [
        f"{t.name}: unusable here (the model that must fail reads {t.original}, a retrained one {t.retrained or 'none at hand'})"
        for t in trials
        if not t.usable
    ]
    said += [f"{r.name} was not believed: {r.why}" for r in refused]
    if p.plants is not None:
        said += [f"Planted controls are void: {why}" for why in p.plants.why]
    if p.plants is not None and p.plants.there:
        said.append(f"Planted controls: {p.plants.told}, of {p.plants.kind}; closeness is that of plants to models that never saw them.")
    elif not p.references:
        said.append("No retrained reference was at hand: nothing is claimed about closeness to a model that never saw the records.")
    return tuple(said)
