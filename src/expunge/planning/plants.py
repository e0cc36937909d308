"""Planted controls: plants are dealt to twins, the runs (`planning.twins`) are priced and done, and what they read becomes evidence (`audits.plants.Plants`).

Each twin has plants of its own, no more than the request has records, so that every other model is one that never saw them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from scipy.stats import fisher_exact
from torch import Tensor, nn

from expunge.audits.plants import Plants, View, p_value
from expunge.core.digest import model_digest
from expunge.core.errors import ExpungeError, SettingError, SplitError
from expunge.core.modality import of
from expunge.core.registry import CHECKS, METHODS
from expunge.core.stats import matched
from expunge.core.types import Data, Split, Task, concat, held, measured
from expunge.engine.jobs import map_jobs
from expunge.engine.run import Attempt
from expunge.parts.reading import score
from expunge.planning.twins import BESIDE, FEW, PASSES, Job, Recipe, Run, grown, read

LEAST = 3
"""Plants of a twin from which on what repairs bring back can be read."""

Progress = Callable[[str, int, int], None]


def recipe_of(model: nn.Module, task: Task, split: Split, attempt: Attempt, memory: int = 0) -> tuple[Recipe | None, str]:
    """(the recipe that leaves the attempt's patch, ""), or (None, why there is no twin): its method is run again as the attempt says, to its end and as the
    autopilot does, ended at the best state on validation."""
    if attempt.patch is None or attempt.method not in METHODS:
        return None, "no twin: nothing says which method, settings and seed made the model, so it cannot be run again"
    ways = [Recipe(attempt.method, dict(attempt.settings), attempt.seed, every, memory) for every in (0, pause(split))]
    ended = "refused"
    try:
        for recipe in ways if held(split.validation) else ways[:1]:
            again = recipe.run(model, task, split, recipe.seed)
            if again.patch is not None and again.patch.digest == attempt.patch.digest:
                return recipe, ""
            ended = again.outcome
    except ExpungeError as error:
        return None, f"no twin: {attempt.method} cannot be run here: {error}"
    return None, f"no twin: {attempt.method} with these settings and seed {attempt.seed} leaves another patch here ({ended})"


def pause(split: Split) -> int:
    """Steps between two looks at validation, where a run ends at its best state there."""
    return max(5, len(split.forget) // 64)


def dealt(task: Task, split: Split, twins: int, seed: int) -> tuple[Data, Tensor, Split, str]:
    """(unseen records of forget's kind, the first N of them plants, the twin that each plant is for (N,), the split without plants, where they come from).

    split.plants if it is there, in its order; else from validation, at most half of it, in forget's shares of labels. As many for each twin, at most
    as the request has records, under new ids. Raises SplitError for a request that no plant can stand for, or records that are too few or not unseen.
    """
    if twins < 2:
        raise SettingError(f"planted controls need at least 2 twins, not {twins}: each is read against the others")
    if not CHECKS["plants"].suits(task):
        raise SettingError(f"planted controls are read of {' and '.join(CHECKS['plants'].tasks)} models, not of {of(task).what}")
    if of(task).removed(split):
        raise SplitError(
            "planted controls are for requests of records: a plant of a class that must go would be another class; retrained references are for these"
        )
    split.require("retain")
    pool, kind = _pool(split, seed)
    each = min(len(split.forget), len(pool) // twins)
    if not each:
        raise SplitError(f"{twins} twins need as many plants at least, and {kind} has {len(pool)}: give more unseen records (plants), or take fewer twins")
    ids = torch.cat([part.ids for part in split.parts().values() if held(part)])
    pool = replace(pool, ids=int(ids.max()) + 1 + torch.arange(len(pool)))
    for name in ("forget", "retain", "test"):
        if held(part := getattr(split, name)) and (shared := len(pool) - len(_apart(pool, part))):
            raise SplitError(f"{shared} plant(s) stand in {name}: plants are records that the model never saw and that no check reads")
    left = _apart(split.validation, pool.take(range(each * twins))) if held(split.validation) else []
    rest = split.validation if not held(split.validation) else split.validation.take(left) if left else None
    return pool, torch.arange(twins).repeat_interleave(each), replace(split, validation=rest, plants=None), kind


def _apart(data: Data, other: Data) -> list[int]:
    """Positions of the records whose inputs, whatever their targets, are not among those of the other data."""
    known = {*other.keys, *getattr(other, "inputs", ())}
    return [k for k, names in enumerate(zip(data.keys, getattr(data, "inputs", ()) or data.keys, strict=True)) if not known & set(names)]


def _pool(split: Split, seed: int) -> tuple[Data, str]:
    """Records that plants are taken of, in the order in which they are dealt, and where they come from."""
    if split.plants is not None:
        return split.plants, "given plants"
    if not held(split.validation):
        raise SplitError("planted controls need records that the model never saw: give plants, or validation data of which some are taken")
    labels = [getattr(part, "y", None) for part in (split.forget, split.validation)]
    if why := odd(split, split.validation):
        raise SplitError(why)
    if any(y is None for y in labels):  # texts, which stand beside what they belong to
        return split.validation.take(range(len(split.validation) // 2)), "validation"
    rows, _ = matched(labels[0], labels[1], seed)
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return split.validation.take(order[: len(split.validation) // 2]), "validation"


def follows(retain: Data, data: Data, near: int = 5, most: int = 500) -> tuple[int, int]:
    """(how many of at most `most` records have the label that most of their nearest kept inputs have, of how many); (0, 0) where inputs have names or there is
    no label."""
    if not all(measured(getattr(part, "x", None)) and not part.y.is_floating_point() for part in (retain, data)):
        return 0, 0
    if not isinstance(retain.x, Tensor):
        most = min(most, data.at_once)
    x = (retain.x if isinstance(retain.x, Tensor) else retain.x[: retain.at_once])[:5000].flatten(1).float()
    asked = data.x[:most].flatten(1).float()
    votes = retain.y[torch.cdist(asked, x).topk(min(near, len(x)), largest=False).indices].mode(1).values
    return int((votes == data.y[:most]).sum()), len(asked)


def odd(split: Split, plants: Data) -> str:
    """Why plants are of another kind than the records to forget, where it can be told, or nothing: their labels follow from their inputs more often, or less
    (Fisher's exact test at 0.001), or texts are longer, or shorter, in tokens (Mann and Whitney's U at 0.001)."""
    lengths = [getattr(part, "lengths", None) for part in (split.forget, plants)]
    if all(found is not None for found in lengths) and p_value(*lengths)[0] < 0.001:
        medians = " and ".join(f"{float(found.median()):g}" for found in lengths)
        return f"the plants are of another kind than the records to forget: these hold {medians} tokens in the median; give plants of the same form and words"
    (a, n), (b, m) = (follows(split.retain, part) for part in (split.forget, plants))
    if not n or float(fisher_exact([[a, n - a], [b, m - b]])[1]) > 0.001:
        return ""
    return (
        f"the plants are of another kind than the records to forget: the nearest kept inputs have the label of {a} of {n} of these and of {b} of {m} plants. "
        "Give plants of the same kind; where labels are wrong, `mislabelled` makes them (on the command line --plants wrong)"
    )


def priced(recipe: Recipe, split: Split, twins: int, candidates: int, each: int, seconds: float = 0.0) -> str:
    """What the runs will cost, in words, before they start: the method's own price for a request with its plants, and one pass of planting.

    seconds   that one run of the method took
    """
    method = METHODS[recipe.method]
    forward, backward = method.expected(split, recipe.settings)
    n = len(split.forget)
    larger = (n + each) / n
    some = min(len(split.retain), max(FEW, BESIDE * (n + each))) + n + each
    total = [twins * larger * v + (candidates - 1) * v for v in (forward, backward)]
    took = f", some {seconds * (twins * larger + candidates - 1):.0f} s" if seconds else ""
    return (
        f"{twins} twins and {candidates - 1} further candidates of {recipe.method}: at most {total[0]:,.0f} examples forward and {total[1]:,.0f} backward{took}"
        f", and {some:,} more of both for each pass of planting a twin (at most {PASSES} passes)"
    )


def controls(
    model: nn.Module, after: nn.Module, task: Task, split: Split, recipe: Recipe, *, twins: int = 10, candidates: int = 3, seed: int = 0, workers: int = 1,
    folder: Path | str | None = None, seconds: float = 0.0, progress: Progress | None = None,
) -> Plants:  # fmt: skip
    """The evidence of planted controls for the candidate `after`, which `recipe` made of `model`.

    twins       2 or more; each costs a planting and a run of the method
    candidates  the audited one and further seeds of it, 1 or more
    workers     runs at a time, each in a process of its own where there are several (`engine.jobs`)
    folder      keeps what each run read: a call that was killed goes on where it was. It holds numbers about plants, no weights
    Raises SplitError for a request that plants cannot stand for, SettingError for settings out of range. Runs that fail make the evidence void, and say why.
    """
    if candidates < 1:
        raise SettingError(f"candidates must be 1 or more, not {candidates}")
    pool, taught, rest, kind = dealt(task, split, twins, seed)
    plants = pool.take(range(len(taught)))
    of(task).preflight(model, task, replace(rest, forget=concat(rest.forget, plants)))
    why = [w] if split.plants is not None and (w := odd(split, plants)) else []
    if any(part == "anchor" for part in (*METHODS[recipe.method].needs, *METHODS[recipe.method].asks(recipe.settings))) and _paired(split):
        return Plants(kind=kind, why=(f"{recipe.method} reads an anchor for each record to forget, and plants have none",))
    rest = replace(rest, anchor=None) if _paired(split) else rest
    if recipe.every and rest.validation is None:
        return Plants(kind=kind, why=("the run ended at its best state on validation, and the plants take all of it: give plants, or more validation data",))
    groups = [tuple((taught == t).nonzero().squeeze(1).tolist()) for t in range(twins)]
    if progress:
        progress(priced(recipe, rest, twins, candidates, len(groups[0]), seconds), 0, twins + candidates - 1)
    make = partial(Job, recipe=recipe, model=model, task=task, split=rest, plants=plants, after=after, folder="" if folder is None else str(folder))
    jobs = [make(f"twin-{t}", mine=rows, seed=recipe.seed + 101 + t) for t, rows in enumerate(groups)]
    jobs += [make(f"candidate-{c}", seed=recipe.seed + c) for c in range(1, candidates)]
    told = None if progress is None else lambda _, done, total: progress(f"planted controls of {recipe.method}", done, total)
    runs = map_jobs(grown, jobs, workers=workers, progress=told)
    mine = Run(read("after", after, jobs[0]))
    why += [w for r in runs if (w := r.facts.get("why"))]
    sums = [sum(r.facts.get("cost", (0, 0, 0))[k] for r in runs) for k in range(3)]
    cost = dict(zip(("forward", "backward", "seconds"), sums, strict=True))
    planting = tuple(tuple(r.facts["planting"]) for r in runs[:twins] if "planting" in r.facts)
    if any(not r.tensors for r in runs):
        return Plants(kind=kind, planting=planting, why=tuple(why), cost=cost)
    original = Run(read("before", model, jobs[0]))
    losses = lambda m: (score(m, task, split.forget).nll, score(m, task, pool).nll)  # noqa: E731
    return Plants(
        taught=taught, after=_view("after", [*runs[:twins], mine, *runs[twins:]], losses(after), 1), 
        before=_view("before", [*runs[:twins], original], losses(model), 0),
        forgotten=torch.stack([r.tensors["forgotten"] for r in runs[:twins]]),
        candidate=model_digest(after), kind=kind, planting=planting, why=tuple(why), cost=cost,
        doubts=() if len(groups[0]) >= LEAST else (f"what repairs bring back cannot be read on {len(groups[0])} plant(s) a twin: {LEAST} would do",),
    )  # fmt: skip


def _view(name: str, runs: list[Run], losses: tuple[Tensor, Tensor], side: int) -> View:
    nll, margin, again = (torch.stack([r.tensors[f"{name}.{what}"] for r in runs]) for what in ("nll", "margin", "again"))
    return View(nll, margin, again, *losses, tuple(r.facts["attacked"][side] for r in runs if "attacked" in r.facts))


def _paired(split: Split) -> bool:
    """Whether there is one anchor for each record to forget."""
    return held(split.anchor) and torch.equal(split.anchor.ids, split.forget.ids)
