"""Playing a stream: request after request, each with its own seed, each learnt or forgotten and then measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.digest import model_digest
from expunge.core.edits import Hook
from expunge.core.errors import ExpungeError, SettingError
from expunge.core.machine.devices import reseeded
from expunge.core.modality import of
from expunge.core.types import Records, Split, Task
from expunge.data.records.memory import FisherSum, Memory
from expunge.engine.run import preflight, unlearn
from expunge.guarantees.streams.course import REPLAY, Course
from expunge.guarantees.streams.played import Played
from expunge.guarantees.streams.requests import Request, schedule
from expunge.guarantees.streams.retention import learn
from expunge.guarantees.streams.rows import Step, shares
from expunge.guarantees.streams.state import State, identify, resume, write_state
from expunge.parts.reading import outputs


def play(
    model: nn.Module, task: Task, train: Records, requests: Sequence[Request], course: Course = Course(), *, test: Records | None = None,
    folder: str | Path | None = None, base: Path | None = None, keep: bool = False, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> Played:  # fmt: skip
    """Play the requests on a copy of `model`, which has learnt none of `train` yet; every request has its own seed.

    folder   where the state after each request goes, so that a killed stream goes on behind its last finished request, bit for bit. It holds records and
             weights; the state before is deleted once the next is safe, since it knows what was forgotten, unless `keep`
    base     folder of files that selectors name (`ids:@file`)

    Raises DataError, SplitError or SettingError for bad input before anything runs, DataError for a folder of another stream, and ExpungeError where the
    method could not forget: the stream stops there, with the state of the request before in the folder.
    """
    if not of(task).labelled:
        raise SettingError(f"streams are played for classification, not for {task.name}")
    rows = schedule(requests, train, base)
    preflight(model, task, Split(train, test=test))
    identity = identify(model, task, train, requests, rows, course, test, seed)
    s = State(copy.deepcopy(model).eval(), Memory(course.memory), torch.full((len(train),), -1))
    where = None if folder is None else Path(folder)
    if where is not None:
        resume(where, identity, s)
    for k in range(len(s.steps), len(requests)):
        if progress:
            progress(f"{requests[k].kind} {requests[k].what}", k, len(requests))
        s.steps.append(_request(s, k, requests[k], rows[k], task, train, test, course, seed + 7919 * (k + 1)))
        if where is not None:
            write_state(where, identity, s, keep)
    return Played(tuple(s.steps), course, identity, s.model, s.memory, s.fisher)


def _request(s: State, k: int, r: Request, rows: Tensor, task: Task, train: Records, test: Records | None, course: Course, seed: int) -> Step:
    watch, data, start = guard.Guard(label=f"request {k}"), train.take(rows), time.perf_counter()
    counted = guard.metered(task, Split(data), watch.meter)
    with guard.watching(watch), reseeded(seed):
        if r.kind == "learn":
            passes = 0
            learn(s, counted, data, train.y[s.part >= 0].unique(), course, course.epochs, seed)
            s.part[rows] = k
            if course.term in REPLAY:
                s.memory = s.memory.add(data, outputs(s.model, counted, data), part=k, generator=torch.Generator().manual_seed(seed))
            if course.term == "ewc":
                s.fisher[k] = FisherSum.of(s.model, counted, data, weighted=course.weighted)
        else:
            passes = _forget(s, rows, r, task, counted, train, course, seed)
    passes += watch.meter.passes
    seconds = time.perf_counter() - start
    stale = int(s.memory.stale.sum()) + len(s.tainted)
    return Step(k, r.time, r.kind, r.what, len(rows), **shares(s.model, s.part, task, train, test), passes=passes, seconds=seconds,
                memory=len(s.memory), stale=stale, weights=model_digest(s.model))  # fmt: skip


def _forget(s: State, rows: Tensor, r: Request, task: Task, counted: Task, train: Records, course: Course, seed: int) -> int:
    data, was = train.take(rows), s.part[rows].clone()
    s.part[rows] = -2
    s.memory = s.memory.without(data.ids)
    kept = (s.part >= 0).nonzero().squeeze(1)
    source = train.take(kept) if course.retain == "held" else s.memory.rows()
    retain = source if len(source) else None
    attempt = unlearn(course.method, s.model, task, Split(data, retain, asked=r.what), seed=seed, **course.settings)
    if attempt.outcome != "ok":
        raise ExpungeError(f"the stream stops: {course.method} could not forget {r.what} at {r.time}: {attempt.outcome}, {attempt.reason}")
    if any(isinstance(e, Hook) for e in attempt.patch.edits):
        raise SettingError(f"{course.method} leaves a guard, not weights: a stream needs a method that changes the weights")
    for t in was.unique().tolist():
        if t in s.fisher:
            less = s.fisher[t].without(s.model, counted, train.take(rows[was == t]), weighted=course.weighted)
            s.fisher[t] = less
            if not less.count:
                del s.fisher[t]
    s.tainted = {t for t in s.fisher if t in s.tainted or t >= int(was.min())}
    attempt.patch.apply(s.model)
    if course.relabel and bool(s.memory.stale.any()):
        which = s.memory.stale.nonzero().squeeze(1)
        s.memory = s.memory.relabelled(s.memory.stale, outputs(s.model, counted, s.memory.rows().take(which)))
    if len(s.memory) and course.repair:
        learn(s, counted, s.memory.rows(), train.y[kept].unique(), course, course.repair, seed + 1)
    return attempt.meter.passes
