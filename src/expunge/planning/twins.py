"""The runs of planted controls: a twin, which is planted, made to forget and read, or one more candidate. Each is a job of its own, kept by its key.

planted model   the original, trained further on its plants, the records to forget and kept ones until it knows the plants as well as it knew these records
twin            what the audited method leaves of the planted model, asked to forget the request and the plants
candidate       what it leaves of the original, asked to forget the request
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.attacks.relearn import relearnt
from expunge.audits.core import Probe, audit
from expunge.audits.plants import ATTACKS
from expunge.core.digest import model_digest
from expunge.core.errors import DataError, Diverged
from expunge.core.files import file_digest, verified, write
from expunge.core.guard import Guard, Meter, metered, watching
from expunge.core.modality import of
from expunge.core.session import scratch
from expunge.core.types import Data, Split, Task, concat, held
from expunge.engine.run import Attempt, unlearn
from expunge.parts.reading import score
from expunge.parts.training import pace
from expunge.parts.updates.descend import descend

PASSES, BATCH = 60, 32
"""Most passes over the data until a planted model knows its plants, and the size of their batches."""

BESIDE, FEW = 10, 200
"""Kept records that are trained on beside, for each plant and record to forget, and at least."""

AGAIN = (4, 16)
"""Steps on the records to forget after which plants are read again."""


@dataclass(frozen=True)
class Recipe:
    """How the candidate came about, so that it can be done again: method, settings, seed, whether the run ended at its best state on validation, looked at
    every so many steps (0: it ran to its end), and the `memory` of its guard."""

    method: str
    settings: Mapping[str, Any]
    seed: int
    every: int = 0
    memory: int = 0

    def run(self, model: nn.Module, task: Task, split: Split, seed: int) -> Attempt:
        """The same with another model, request or seed."""
        validate = of(task).validation(model, task, split) if self.every else None
        return unlearn(self.method, model, task, split, seed=seed, guard=Guard(validate=validate, every=self.every or 20, memory=self.memory), **self.settings)


@dataclass(frozen=True)
class Job:
    """One run: a twin with plants of its own, or, without, a further candidate."""

    label: str
    recipe: Recipe
    model: nn.Module
    task: Task
    split: Split
    plants: Data
    after: nn.Module
    mine: tuple[int, ...] = ()
    seed: int = 0
    folder: str = ""


@dataclass(frozen=True)
class Run:
    """What a job read: tensors by name, and facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def grown(job: Job) -> Run:
    """The run of a job, read from its folder where it stands there."""
    path = Path(job.folder) / f"{job.label}.safetensors" if job.folder else None
    key = _key(job) if path else ""
    if path is not None and path.exists():
        header, tensors = verified(path, "run", DataError, "is no run", "is no run of planted controls", 1 << 32)
        found = json.loads(header["run"])
        if found.pop("key") == key:
            return Run(tensors, found)
    run = _twin(job) if job.mine else _candidate(job)
    run = Run(run.tensors, json.loads(json.dumps(run.facts)))  # as it will be read back
    if path is not None:
        from safetensors.torch import save

        body = json.dumps({**run.facts, "key": key}, sort_keys=True)
        write(path, save(run.tensors, {"run": body, "sha256": file_digest(body, run.tensors)}), DataError)
    return run


def _key(job: Job) -> str:
    """Names what the run depends on."""
    parts = {name: part.digest for name, part in job.split.parts().items() if held(part)}
    r = job.recipe
    facts = [
        r.method,
        dict(r.settings),
        r.seed,
        r.every,
        *([r.memory] if r.memory else []),
        model_digest(job.model),
        model_digest(job.after),
        parts,
        job.plants.digest,
        job.mine,
        job.seed,
        PASSES,
        BATCH,
        BESIDE,
        FEW,
        AGAIN,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _candidate(job: Job) -> Run:
    attempt = job.recipe.run(job.model, job.task, job.split, job.seed)
    return Run(read("after", _after(job.model, attempt), job), _facts(job, attempt))


def _twin(job: Job) -> Run:
    mine = job.plants.take(job.mine)
    try:
        model, planting, meter = planted(job.model, job.task, job.split, mine, job.seed)
    except Diverged as error:
        return Run({}, {"why": f"planting {job.label}: {error}"})
    asked = replace(job.split, forget=concat(job.split.forget, mine))
    attempt = job.recipe.run(model, job.task, asked, job.seed)
    after = _after(model, attempt)
    facts = _facts(job, attempt) | {"planting": planting}
    facts["cost"] = [facts["cost"][0] + meter.forward, facts["cost"][1] + meter.backward, facts["cost"][2] + meter.seconds]
    if planting[1] > planting[2]:
        facts["why"] = (
            f"{job.label} is not matched: after {planting[0]} passes the loss of its plants is {planting[1]:.3g}, "
            f"that of the records to forget {planting[2]:.3g}"
        )
    tensors = {**read("before", model, job), **read("after", after, job), "forgotten": score(after, job.task, job.split.forget).nll}
    facts["attacked"] = [attacked(job, mine, model, one, other) for one, other in ((model, job.model), (after, job.after))]
    return Run(tensors, facts)


def _after(model: nn.Module, attempt: Attempt) -> nn.Module:
    """A copy with the attempt's patch in it."""
    twin = copy.deepcopy(model)
    if attempt.patch is not None:
        attempt.patch.apply(twin)
    return twin


def _facts(job: Job, attempt: Attempt) -> dict[str, Any]:
    m = attempt.meter
    why = "" if attempt.outcome == "ok" else f"{job.label} of {attempt.method} ended {attempt.outcome.replace('_', ' ')}: {attempt.reason}"
    return {"cost": [m.forward, m.backward, m.seconds], "why": why}


def read(name: str, model: nn.Module, job: Job) -> dict[str, Tensor]:
    """What a model says of all plants: loss, margin, and loss after each of AGAIN steps on the records to forget."""
    s = score(model, job.task, job.plants)
    again = [score(m, job.task, job.plants).nll for m in relearnt(job.task, model, job.split.forget, AGAIN, job.recipe.seed)]
    return {f"{name}.nll": s.nll, f"{name}.margin": s.margin, f"{name}.again": torch.stack(again)}


def attacked(job: Job, mine: Data, planted: nn.Module, model: nn.Module, unseen: nn.Module) -> dict[str, tuple[float, float]]:
    """Rows of ATTACKS on plants, of a model whose original is the planted one, with one that never saw them for a retrained model. Of what is there all is
    back."""
    if model is planted:
        return {"repair.free.none": (1.0, 1.0), **_rows(Probe(planted, planted, job.task, Split(mine), (unseen,)), ["memorised"])}
    return _rows(Probe(planted, model, job.task, replace(job.split, forget=mine, validation=None, general=None), (unseen,), job.seed), list(ATTACKS))


def _rows(p: Probe, checks: list[str]) -> dict[str, tuple[float, float]]:
    taken = tuple(ATTACKS.values())
    return {r.name: (r.value, (r.high - r.low) / 2) for r in audit(p, checks) if r.name.startswith(taken) and math.isfinite(r.value)}


def planted(model: nn.Module, task: Task, split: Split, plants: Data, seed: int) -> tuple[nn.Module, tuple[int, float, float], Meter]:
    """(the planted model, (passes, mean loss of the plants, loss to be reached), cost). A copy is trained as attackers train (`training.pace`) on plants,
    forget and some of retain, at least once, until the mean loss of the plants is at most that of forget under the original, or PASSES times. May raise
    Diverged."""
    goal = float(score(model, task, split.forget).nll.mean())
    some = min(len(split.retain), max(FEW, BESIDE * (len(plants) + len(split.forget))))
    beside = split.retain.take(torch.randperm(len(split.retain), generator=torch.Generator().manual_seed(seed))[:some])
    twin = copy.deepcopy(model).requires_grad_(True)
    s = scratch(twin)
    s.train()
    data = concat(plants, split.forget, beside)
    batches = task.batches(data, BATCH, epochs=PASSES, seed=seed)
    seen: list[float] = []

    def known(step: int) -> bool:
        if (step + 1) % batches.per_epoch:
            return False
        with watch.meter.pause():
            seen.append(float(score(twin, task, plants).nll.mean()))
        return seen[-1] <= goal

    watch = Guard()
    with watching(watch):
        counted = metered(task, Split(data), watch.meter)
        descend(s, lambda b: counted.forward(twin, b).mean.mean(), batches, until=known, **pace(task, twin))
    twin.eval()
    return twin, (len(seen), seen[-1], goal), watch.meter
