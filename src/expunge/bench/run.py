"""The benchmark: worlds x scenarios x methods x seeds -> JSON lines, one per cell, and a Markdown table.

A cell starts from the original of its seed and is read against all retrained models of its scenario. Cells that stand in the JSON lines
file already are not run again, so a long benchmark can be stopped and goes on.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.core import Probe, audit
from expunge.bench.cells import add, begun
from expunge.bench.table import NOTHING, markdown
from expunge.core.errors import DataError, SettingError
from expunge.core.files import write
from expunge.core.modality import of
from expunge.core.registry import CHECKS, METHODS
from expunge.core.types import Split, Task
from expunge.engine.run import GRADED, Attempt, unlearn
from expunge.modalities.worlds import World, cache_folder, world
from expunge.planning.outcome import TRIVIAL, patched
from expunge.planning.plan import closeness, tuned

SUFFIX = ":published"
"""Language worlds: `NAME:published` runs the method as published, all its steps, but for lr, which is what suits the model's width; NAME alone runs it
as the autopilot does (`language.autopilot.RECIPE`), ended where validation says."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "esd+retain": ("esd", {"alpha": 1.0}),
    "esd+anchor": ("esd", {"alpha": 1.0, "base": "anchor"}),
    "concept_ablation+retain": ("concept_ablation", {"alpha": 1.0}),
    "advunlearn+xattn": ("advunlearn", {"part": "xattn"}),
    "slug+xattn": ("slug", {"part": "xattn"}),
    "sfd+control": ("sfd", {"instead": "itself"}),
    "adapt_then_unlearn+control": ("adapt_then_unlearn", {"repulsion": "none"}),
    "reset_last": TRIVIAL["reset_last"],
}
"""Label of a table -> method and settings: variants that are read beside a method's defaults, and the baselines."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"gradient_ascent": {"lr": 0.03, "momentum": 0.9}},
    "digits-wrong": {"reset_fine_tune": {"epochs": 7.4}},
    "shapes": {"trce": {"lr": 3e-4}},
    "mnist-wrong": {"reset_fine_tune": {"epochs": 3.72, "batch_size": 64}},
    "cifar10": {
        "scrub": {"lr": 0.01},
        "ssd": {"alpha": 6.0},
        "negrad_plus": {"lr": 0.02},
        "prune_unlearn": {"rate": 0.8, "epochs": 2.5},
        "l1_sparse": {"alpha": 1e-4, "epochs": 2.5, "lr": 0.05},
        "influence": {"scale": 1.5},
        "boundary_shrink": {"lr": 3e-4},
        "boundary_expand": {"lr": 2e-4},
    },
}
"""world -> method -> settings that differ from the method's defaults there, chosen on seed 0; in the worlds with wrong labels only the budget, a
quarter of retraining's steps."""


def retrain_passes(w: World, scenario: str) -> float:
    """Examples forward plus backward that retraining takes in this world."""
    return 2.0 * w.recipe["epochs"] * (len(w.split(scenario).retain) + (0 if w.extra is None else len(w.extra)))


def cells(w: World, methods: Sequence[str], scenarios: Sequence[str], seeds: Iterable[int]) -> Iterable[tuple[str, str, int]]:
    """(scenario, method, seed) in an order that finishes the first seed of everything first."""
    for seed in seeds:
        for scenario in scenarios:
            for name in methods:
                if name == NOTHING or feasible(w, scenario, resolve(name)[0]):
                    yield scenario, name, seed


def seed_numbers(text: str) -> Sequence[int]:
    """`3` -> 0, 1, 2; `1..2` -> 1, 2, so that several processes can share a benchmark. Raises SettingError for anything else.

    >>> list(seed_numbers("3")), list(seed_numbers("1..2"))
    ([0, 1, 2], [1, 2])
    """
    first, dots, last = text.partition("..")
    if not first.isdigit() or (dots and not last.isdigit()):
        raise SettingError(f"seeds must be a number such as 3, or a range such as 1..2, not '{text}'")
    return range(int(first), int(last) + 1) if dots else range(int(first))


def bench(
    name: str, methods: Sequence[str] | str = "all", seeds: int | Sequence[int] = 3, scenarios: Sequence[str] = (), out: Path | str = "bench-out",
    *, references: int | None = None, slow: bool = False, cache: Path | None = None, progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the cells that are not in OUT/NAME.jsonl yet; returns all cells and writes OUT/NAME.md.

    scenarios   those of the world when none is named
    methods    names, labels of VARIANTS, and "all" for every method that suits the world
    seeds    how many, from 0 on, or which; the seed decides the original that is unlearned, too
    references    retrained models that a cell is read against: as many as the modality's table reads, 3 with `slow`
    Every method runs with the defaults of its signature, overlaid by PRESETS for the world; nothing is tuned per seed. The baselines (doing
    nothing, fine-tuning on retain, a last layer drawn anew, retraining) stand in every table, whatever was asked for.
    """
    w, cache = world(name), cache or cache_folder()
    scenarios = scenarios or w.scenarios
    if references is None:
        references = 3 if slow else of(w.task).bench[1]
    named = [methods] if isinstance(methods, str) else methods
    asked = [m for name in named for m in (METHODS if name == "all" else [name]) if METHODS[resolve(m)[0]]]
    chosen = list(dict.fromkeys([NOTHING, "fine_tune", "reset_last", "retrain", *asked]))
    path = Path(out) / f"{name}.jsonl"
    key = f"{w.digest}/{references}/{slow}"
    done = begun(path, lambda c: (c["scenario"], c["method"], c["seed"]), lambda c: c["world_key"] == key and c["settings"] == settings(w, c["method"]))
    todo = [c for c in cells(w, chosen, scenarios, range(seeds) if isinstance(seeds, int) else seeds) if c not in done]
    originals = functools.cache(lambda seed: w.original(seed, cache))
    retrained = functools.cache(lambda scenario, k: w.retrained(scenario, k, cache))
    scores: dict[str, dict] = {scenario: {} for scenario in scenarios}
    for number, (scenario, method, seed) in enumerate(todo):
        if progress:
            progress(f"{name} {scenario} {method} seed {seed}", number, len(todo))
        refs = tuple(retrained(scenario, k) for k in range(references))
        further = retrained(scenario, references + seed) if method == "retrain" else None
        cell = {
            "world_key": key,
            **run_cell(w, scenario, method, seed, originals(seed), refs, scores[scenario], slow, further),
        }
        done[scenario, method, seed] = cell
        add(path, cell)
    result = list(done.values())
    write(path.parent / f"{name}.md", markdown(result), DataError)
    return result


def settings(w: World, method: str) -> dict[str, Any]:
    """What a method runs with in this world: its defaults, overlaid by PRESETS. Cells that were run with other settings are run again. In a language
    world it is run as the autopilot runs it, or as published (SUFFIX)."""
    if method == NOTHING:
        return {}
    name, changes = resolve(method)
    told = of(w.task).search.told
    if told and method != "retrain" and "lr" in METHODS[name].defaults:
        changes = {**changes, "lr": "width"} if method.endswith(SUFFIX) else {"recipe": dict(told)}
    return dict(w.recipe) if method == "retrain" else {**METHODS[name].defaults, **changes, **PRESETS.get(w.name, {}).get(method, {})}


def resolve(label: str) -> tuple[str, dict[str, Any]]:
    """Method and settings behind a label of the table: one of VARIANTS, or a method at its defaults (with SUFFIX too)."""
    return VARIANTS.get(label) or (label.removesuffix(SUFFIX), {})


def feasible(w: World, scenario: str, name: str) -> bool:
    """Whether the method works on the world's task, is made for this kind of request and has the parts it needs."""
    record, split = METHODS[name], w.split(scenario)
    have = set(split.parts())
    if record.twin and not w.name.endswith(f"-{record.twin}"):
        return False
    return name == "retrain" or (record.suits(w.task) and set(record.needs) <= have and bool(set(of(w.task).kinds(split)) & set(record.forgets)))


def run_cell(
    w: World, scenario: str, method: str, seed: int, original: nn.Module, refs: tuple[nn.Module, ...], scores: dict, slow: bool = False,
    further: nn.Module | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One method on one seed of one scenario, audited.

    scores    the scenario's store of what originals and references answered (`Probe.cache`), filled here and shared by its cells
    further   the candidate of method retrain: one more retrained model, which is none of the references
    """
    split = w.split(scenario)
    start, cpu = time.perf_counter(), time.process_time()
    if method == NOTHING:
        attempt, after = Attempt(NOTHING, {}, seed, "no_op", "left as it is", None), original
    elif further is not None:
        after, n = further, retrain_passes(w, scenario) / 2
        attempt = Attempt("retrain", settings(w, method), seed, "ok", "", None)
        attempt.meter.forward = attempt.meter.backward = int(n)
    elif "recipe" in settings(w, method):
        attempt = searched(resolve(method)[0], w.task, split, original, seed)
        after = patched(original, attempt)
    else:
        asked = settings(w, method)
        if asked.get("lr") == "width":
            asked["lr"] = of(w.task).search.stride(asked, w.task, original)
        attempt = unlearn(resolve(method)[0], original, w.task, split, seed=seed, **asked)
        after = patched(original, attempt)
    ran, cpu = time.perf_counter() - start, 0.0 if method == NOTHING else time.process_time() - cpu
    cost = {**attempt.cost, "retrain_passes": retrain_passes(w, scenario)}
    audited = attempt.outcome in GRADED or method == NOTHING
    brief = () if slow else of(w.task).bench[0]
    names = [n for n in brief if n in CHECKS]
    rows = audit(Probe(original, after, w.task, split, refs, seed, cost, scores), names, slow=slow) if audited else []
    if after is not original:
        for key in [k for k, (_, model) in scores.items() if model is after]:
            del scores[key]
    return {
        "world": w.name, "scenario": scenario, "method": method, "seed": seed, "settings": settings(w, method), "outcome": attempt.outcome,
        "lr": attempt.settings.get("lr"), "reason": attempt.reason, "seconds": ran, "cpu_seconds": None if further is not None else cpu,
        "share": attempt.meter.passes / retrain_passes(w, scenario), "references": len(refs),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}", "date": time.strftime("%Y-%m-%d"),
        "rows": [asdict(r) for r in rows],
    }  # fmt: skip


def searched(method: str, task: Task, split: Split, original: nn.Module, seed: int) -> Attempt:
    """The method as the autopilot runs it, at the one step size that suits the model's width, ended at the step that validation likes best."""
    return tuned(method, original, task, split, closeness(original, task, replace(split, general=None)), scales=(1.0,), seed=seed)[0].attempt
