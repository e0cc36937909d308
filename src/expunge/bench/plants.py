"""Planted controls against the truth: methods on requests of some sizes, each read on plants and against models that were really trained without the records.

A cell is one method on one request: its planted controls, and the same figures against retrained models that no user would have. Requests are drawn from the
records that the world's scenario forgets; what is not asked for stays in retain. Cells that stand in the JSON lines file are not run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.core import Probe, audit
from expunge.audits.distance import closed
from expunge.audits.plants import Plants
from expunge.audits.verdict import default_rules, selftest
from expunge.bench.cells import add, begun
from expunge.core.errors import DataError, SettingError
from expunge.core.files import write
from expunge.core.guard import Guard, watching
from expunge.core.machine.devices import reseeded
from expunge.core.types import Split, concat
from expunge.engine.run import Attempt
from expunge.modalities.worlds import World, cache_folder, world
from expunge.parts.reading import Scores, score
from expunge.parts.training import train
from expunge.planning.outcome import examined, patched
from expunge.planning.plants import Recipe, controls

NOTHING = "nothing"
REFERENCES = 3
"""Retrained models that a cell is held against."""

ASKED: dict[str, tuple[tuple[int, int], ...]] = {"digits-wrong": ((50, 5), (20, 10), (10, 10), (5, 10), (3, 10), (1, 10)), "authors-planted": ((20, 4),)}
"""World -> sizes of requests, each with its number of twins."""

CELLS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "digits-wrong": (
        ("retrain", {}), ("fine_tune", {}), ("scrub", {}), ("random_label", {}), ("salun", {}), ("bad_teacher", {}), ("prune_unlearn", {}),
        ("reset_fine_tune", {"epochs": 3.0}), ("reset_fine_tune", {"epochs": 8.0}),
    ),
    "authors-planted": (
        ("grad_diff", {"lr": 1e-3, "epochs": 5.0}), ("npo", {"lr": 5e-4, "epochs": 10.0, "retain": "ce"}),
        ("simnpo", {"lr": 5e-4, "epochs": 10.0, "retain": "ce"}), ("undial", {"lr": 5e-4, "epochs": 10.0, "retain": "ce"}),
    ),
}  # fmt: skip
"""World -> methods and their settings. Doing nothing is read from the planted models of the first."""


HEADINGS = (
    "method", "AUC, plants", "AUC, truth", "p", "gap closed, plants", "truth", "known, plants", "truth", "relearnt", "repaired", "unseen AUC", "p", "utility",
    "by plants", "by references",
)  # fmt: skip


def request(w: World, n: int, draw: int) -> Split:
    """n of the records that the world's first scenario forgets, drawn by seed; the others stay."""
    whole = w.split(w.scenarios[0])
    if n >= len(whole.forget):
        return whole
    order = torch.randperm(len(whole.forget), generator=torch.Generator().manual_seed(1000 + draw))
    gone, rest = order[:n].sort().values, order[n:].sort().values
    return replace(whole, forget=whole.forget.take(gone), retain=concat(whole.retain, whole.forget.take(rest)), asked=f"{n} of {whole.asked}")


def references(w: World, split: Split, draw: int, cache: Path) -> list[nn.Module]:
    """Models trained as the world's originals on what the request keeps."""
    if len(split.forget) == len(w.split(w.scenarios[0]).forget):
        return [w.retrained(w.scenarios[0], 10 * draw + k, cache) for k in range(REFERENCES)]
    found = []
    for k in range(REFERENCES):
        with reseeded(1000 + 10 * draw + k):
            model = w.build()
            with watching(Guard()):
                train(model, w.task, split.retain if w.extra is None else concat(split.retain, w.extra), seed=1000 + 10 * draw + k, **w.recipe)
        found.append(model.eval())
    return found


def truth(e: Plants, losses: torch.Tensor, after: Scores, before: Scores, refs: Sequence[Scores]) -> dict[str, float]:
    """What plants stand for, read on the records to forget themselves: `auc`, the probability that their loss is lower in a model that forgot them (candidate,
    twins: losses (T + 1, n)) than in a retrained one; `margin`, the share of the gap closed; `known`, the probability above retrained models."""
    theirs = torch.stack([r.nll for r in refs])
    lower = (losses[:, None] < theirs[None]).double() + (losses[:, None] == theirs[None]).double() / 2
    margin = closed("margin", after.margin, before.margin, torch.stack([r.margin for r in refs]), 0, "").value
    known = (-after.nll).exp() - torch.stack([(-r.nll).exp() for r in refs]).mean(0)
    return {"auc": float(lower.mean()), "margin": margin, "known": float(known.mean())}


def bench(
    name: str, out: Path | str = "bench-out", *, draws: Sequence[int] = (0,), sizes: Sequence[int] = (), methods: Sequence[str] = (), cache: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the cells that are not in OUT/NAME-plants.jsonl yet; returns all cells and writes OUT/NAME-plants.md.

    draws    requests of each size, and originals: draw k asks the original of seed k
    sizes    of requests; those of ASKED when none is named
    methods  only these
    """
    if name not in CELLS:
        raise SettingError(f"planted controls are held against the truth on {' and '.join(CELLS)}, not on {name}")
    w, cache = world(name), cache or cache_folder()
    path = Path(out) / f"{name}-plants.jsonl"
    done = begun(path, lambda c: (c["draw"], c["size"], c["label"]), lambda c: True)
    asked = [(n, t) for n, t in ASKED[name] if not sizes or n in sizes]
    todo = [(d, n, t, m, s) for d in draws for n, t in asked for m, s in CELLS[name] if (not methods or m in methods) and (d, n, told(m, s)) not in done]
    there: dict[tuple[int, int], list[nn.Module]] = {}
    for number, (draw, n, twins, method, settings) in enumerate(todo):
        if progress:
            progress(f"{name}, {n} records, {method}, draw {draw}", number, len(todo))
        split, original = request(w, n, draw), w.original(draw, cache)
        if (draw, n) not in there:
            there = {(draw, n): references(w, split, draw, cache)}
        made = cell(w, split, original, there[draw, n], method, settings, twins, draw)
        for c in made:
            if (draw, n, c["label"]) not in done:
                done[draw, n, c["label"]] = {"world": name, "draw": draw, **c}
                add(path, done[draw, n, c["label"]])
    cells = list(done.values())
    write(path.parent / f"{name}-plants.md", markdown(cells), DataError)
    return cells


def told(method: str, settings: Mapping[str, Any]) -> str:
    """A method and its settings as a label."""
    return " ".join([method, *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items())])


def cell(
    w: World, split: Split, original: nn.Module, refs: Sequence[nn.Module], method: str, settings: Mapping[str, Any], twins: int, draw: int
) -> list[dict[str, Any]]:
    """The cell of a method, and that of doing nothing."""
    start = time.process_time()
    recipe = Recipe(method, dict(settings), draw)
    attempt = recipe.run(original, w.task, split, draw)
    after = patched(original, attempt)
    ran = time.process_time() - start
    e = controls(original, after, w.task, split, recipe, twins=twins, seed=draw)
    spent = time.process_time() - start - ran
    p = Probe(original, after, w.task, split, seed=draw)
    mine, before, *theirs = (score(m, w.task, split.forget) for m in (after, original, *refs))
    out = []
    for label, model, found, run in ((told(method, settings), after, mine, attempt), (NOTHING, original, before, Attempt(NOTHING, {}, draw, "ok", "", None))):
        losses = torch.cat([e.forgotten, found.nll[None]]) if label != NOTHING and e.there else found.nll[None]
        by_plants, by_references = replace(p, after=model, plants=e), replace(p, after=model, references=tuple(refs))
        out.append({
            "size": len(split.forget), "label": label, "outcome": run.outcome, "twins": e.twins, "void": list(e.why), "cpu_seconds": [ran, spent],
            "rows": [asdict(r) for r in audit(by_plants, ["plants"])], "truth": truth(e, losses, found, before, theirs),
            "lost": [_good(m, w, split) for m in (original, model)],
            "grades": {"plants": _grade(by_plants, run, model), "references": _grade(by_references, run, model)}, "planting": e.planting,
        })  # fmt: skip
    return out


def _good(model: nn.Module, w: World, split: Split) -> float:
    """Accuracy on test, of texts the probability per token on retain."""
    s = score(model, w.task, split.test)
    return float(s.correct.float().mean()) if s.labels is not None else float((-score(model, w.task, split.retain).nll).exp().mean())


def _grade(p: Probe, run: Attempt, after: nn.Module) -> list[str]:
    """The default gate's grade and why."""
    trials = tuple(selftest(p, default_rules(p)))
    one = examined(p, run, after, trials, False)
    return [] if one.grade is None else [one.grade.grade, *one.grade.why]


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """Per world and size one table: each figure of plants beside the same of the truth, means over draws."""
    out = []
    for where, size in dict.fromkeys((c["world"], c["size"]) for c in cells):
        mine = [c for c in cells if (c["world"], c["size"]) == (where, size)]
        draws = len({c["draw"] for c in mine})
        out.append(f"### {where}: requests of {size}, {mine[0]['twins']} twins, {draws} draw{'s' if draws > 1 else ''}\n")
        out += [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        for label in dict.fromkeys(c["label"] for c in mine):
            some = [c for c in mine if c["label"] == label]
            row = lambda name, some=some: _mean([next((r["value"] for r in c["rows"] if r["name"] == f"plants.{name}"), math.nan) for c in some])  # noqa: E731
            true = lambda name, some=some: _mean([c["truth"][name] for c in some])  # noqa: E731
            grades = [", ".join(sorted({c["grades"][by][0] for c in some if c["grades"][by]})) for by in ("plants", "references")]
            kept = f"{_mean([c['lost'][0] for c in some])} to {_mean([c['lost'][1] for c in some])}"
            told_of = [("auc", row), ("auc", true), ("p", row), ("margin", row), ("margin", true), ("known", row), ("known", true)]
            told_of += [(name, row) for name in ("relearn", "repair", "unseen", "unseen.p")]
            figures = [*(read(name) for name, read in told_of), kept]
            out.append(f"| {' | '.join([label, *figures, *grades])} |")
        out.append("")
    return "\n".join(out)


def _mean(values: Sequence[float]) -> str:
    there = [v for v in values if not math.isnan(v)]
    return "-" if not there else f"{sum(there) / len(there):.2f}"
