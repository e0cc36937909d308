"""A stream of requests to learn and to forget, played one after another: what is forgotten, what is kept, what it costs, request by request.

    stream = read("requests.csv")                                            # columns time,kind,what: 3,forget,class:3
    played = play(model, task, train, stream, Course(term="derpp", method="salun"), test=test, folder="stream")
    played.save("report")                                                    # stream.json, stream.csv, stream.html

 learn    the records that `what` selects and that are neither held nor forgotten: trained on alone, with the retention term
 forget   the records that `what` selects and that are held: the method runs (`run.unlearn`), its patch is applied; they leave memory and Fisher sums
          and are never learnt again; then logits of the memory that had seen them are made anew, and `repair` passes over the memory follow

    none      nothing                                   lwf      distillation of the old classes on the new inputs      losses.continual
    ewc       the pull to the weights before            gem, agem    steps that harm no memory                          updates.episodic
    der, derpp    replay with logits                    refresh  the weights stirred before each step of derpp

gem, agem, der, derpp and refresh have a memory (`data.memory`), one part per learn request; none, lwf and ewc keep no record.

Card     continual-retention.
Differs  Records enter the memory at the end of their learn request, with the logits of the model that has learnt them, without augmentation. LwF has no
         warm-up of a new head, since one head has all classes. A Fisher part keeps the weights it was summed at, which knew what was forgotten since:
         `stale` counts such parts and logits. EWC's F is the sum over parts of gamma^age * mean.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge import guard
from expunge.audits.core import score
from expunge.audits.stats import wilson
from expunge.data import selectors
from expunge.data.memory import FisherSum, Memory, checked
from expunge.errors import DataError, ExpungeError, SettingError, SplitError, suggest
from expunge.losses.continual import der, derpp, ewc, lwf
from expunge.losses.distil import targets
from expunge.patch import Hook, file_digest, write
from expunge.registry import METHODS
from expunge.run import model_digest, preflight, unlearn
from expunge.session import scratch
from expunge.training import outputs
from expunge.types import Examples, Paired, Split, Task
from expunge.updates.descend import descend
from expunge.updates.episodic import refreshing, rule

KINDS = ("learn", "forget")
TERMS = ("none", "lwf", "ewc", "gem", "agem", "der", "derpp", "refresh")
REPLAY = ("gem", "agem", "der", "derpp", "refresh")
"""Terms that keep records."""
COLUMNS = ("time", "kind", "what")
MAX_BYTES = 1 << 24
"""Largest file of requests that is read: 16 MiB."""
FORMAT = 1


@dataclass(frozen=True)
class Request:
    """Learn or forget, at a time, what a selector names: `class:3`, `ids:17,42`, `random:0.1@7`; several joined by +, as `class:0+class:1`."""

    time: int
    kind: str
    what: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")
        if self.time < 0:
            raise DataError(f"time must be 0 or more, not {self.time}")


@dataclass(frozen=True)
class Course:
    """How a stream is played.

    term          what retains while learning and in repair, one of TERMS
    method        the registered method that forgets, with its `settings`
    retain        what the method gets as retain part: held (all records held) or memory (those of the memory)
    epochs, lr, momentum, batch_size    of learning, by SGD; clip: largest norm of a gradient
    memory        most records in memory          replay     records of the memory (gem: of each part) per step
    repair        passes over the memory after each forget request; terms without memory have none
    relabel       make logits anew that a model made which had seen what was forgotten
    alpha         weight of lwf's or der's distillation          beta       weight of derpp's replayed loss
    temperature   of lwf                                         strength   lambda of ewc
    gamma         weight of each older Fisher part, per part     weighted   Fisher terms times p_y
    margin, eps   of gem                                         delta      of refresh
    """

    term: str = "none"
    method: str = "salun"
    settings: Mapping[str, Any] = field(default_factory=dict)
    retain: str = "held"
    epochs: float = 10.0
    lr: float = 0.01
    momentum: float = 0.9
    clip: float = math.inf
    batch_size: int = 32
    memory: int = 200
    replay: int = 32
    repair: float = 1.0
    relabel: bool = True
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 2.0
    strength: float = 10.0
    gamma: float = 1.0
    weighted: bool = False
    margin: float = 0.5
    eps: float = 1e-3
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if self.term not in TERMS:
            raise SettingError(suggest("no retention term", self.term, TERMS))
        if self.retain not in ("held", "memory"):
            raise SettingError(f"retain must be held or memory, not '{self.retain}'")
        if self.retain == "memory" and self.term not in REPLAY:
            raise SettingError(f"retain=memory needs a term with a memory ({', '.join(REPLAY)}); {self.term} keeps no record")
        above = ("epochs", "clip", "batch_size", "memory", "replay", "temperature", "eps")
        for name in (*above, "lr", "momentum", "repair", "alpha", "beta", "strength", "gamma", "margin", "delta"):
            value = getattr(self, name)
            if not (value > 0 if name in above else value >= 0) or not (math.isfinite(value) or name == "clip"):
                raise SettingError(f"{name} must be a finite number {'above 0' if name in above else 'of 0 or more'}, not {value}")
        METHODS[self.method].settings(self.settings)


@dataclass(frozen=True)
class Share:
    """Right answers of n, with Wilson's one-sided 95 % bounds; nan between 0 and 1 for n = 0."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Step:
    """One request played.

    records     how many it was about
    forgotten, kept, test    accuracy on the records forgotten so far, on those held now, and on unseen records of classes held now
    parts       number of each learn request so far -> accuracy on what is held of it
    passes      examples forward and backward          memory   records in memory
    stale       logits and Fisher parts that a model made which had seen a forgotten record
    weights     digest of the model after
    """

    number: int
    time: int
    kind: str
    what: str
    records: int
    forgotten: Share
    kept: Share
    test: Share
    parts: Mapping[str, Share]
    passes: int
    seconds: float
    memory: int
    stale: int
    weights: str


@dataclass(frozen=True, eq=False)
class Played:
    """What a stream left: a row per request, the model and the memory after the last one."""

    steps: tuple[Step, ...]
    course: Course
    identity: str
    model: nn.Module
    memory: Memory
    fisher: Mapping[int, FisherSum] = field(default_factory=dict)

    @property
    def lost(self) -> float:
        """Mean over learn requests but the last of (best accuracy on what was held of it, minus that at the end); nan where there are none."""
        last = self.steps[-1].parts
        earlier = [k for k in last if int(k) != max(map(int, last))]
        best = {k: max(s.parts[k].value for s in self.steps if k in s.parts) for k in earlier}
        return sum(best[k] - last[k].value for k in earlier) / len(earlier) if earlier else math.nan

    def document(self) -> dict[str, Any]:
        """JSON-able: rows, course, identity; what is not a number is null."""
        return _plain({"identity": self.identity, "course": asdict(self.course), "lost": self.lost, "steps": [asdict(s) for s in self.steps]})

    def save(self, folder: str | Path) -> Path:
        """Write stream.json, stream.csv and stream.html (with the plot); no weights."""
        folder = Path(folder)
        write(folder / "stream.json", json.dumps(self.document(), indent=1, allow_nan=False))
        rows = [_flat(asdict(s)) for s in self.steps]
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write(folder / "stream.csv", text.getvalue())
        write(folder / "stream.html", _page(self))
        return folder


def read(path: str | Path) -> tuple[Request, ...]:
    """Requests of a CSV file with the columns time,kind,what, in order of time. `ids:1,2` stands in quotes. Raises DataError naming the line."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name} is no CSV file in UTF-8 ({error})") from None
    if not lines or sorted(c.strip() for c in lines[0]) != sorted(COLUMNS):
        raise DataError(f"{path.name} must begin with the columns {','.join(COLUMNS)}; it has {','.join(lines[0]) if lines else 'nothing'}")
    order = [c.strip() for c in lines[0]]
    found = []
    for number, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        where = f"{path.name}, line {number}"
        if len(line) != len(COLUMNS):
            raise DataError(f'{where}: {len(line)} columns in place of {len(COLUMNS)}; put ids in quotes, as "ids:1,2"')
        row = dict(zip(order, (cell.strip() for cell in line), strict=True))
        try:
            found.append(Request(int(row["time"]), row["kind"], row["what"]))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except ValueError:
            raise DataError(f"{where}: time must be a whole number, not '{row['time']}'") from None
    if not found:
        raise DataError(f"{path.name} holds no request")
    return tuple(sorted(found, key=lambda r: r.time))


def schedule(requests: Sequence[Request], train: Examples, base: Path | None = None) -> list[Tensor]:
    """Positions in train of the records that each request is about, in the order played. `base`: folder of files that selectors name.

    Raises DataError when times fall or ids are doubled, and SplitError for a request that matches nothing it could be about.
    """
    if not requests:
        raise DataError("no request to play")
    if len(train.ids.unique()) < len(train):
        raise DataError("ids of the training data must be unique: a record is deleted by its id")
    held, gone, out = torch.zeros(len(train), dtype=torch.bool), torch.zeros(len(train), dtype=torch.bool), []
    for k, r in enumerate(requests):
        where = f"request {k} ({r.kind} {r.what} at {r.time})"
        if k and r.time < requests[k - 1].time:
            raise DataError(f"{where} comes after one at {requests[k - 1].time}: requests must be in order of time")
        try:
            named = [selectors.resolve(s, train, base)[0].ids for s in r.what.split("+")]
        except SplitError as error:
            raise SplitError(f"{where}: {error}") from None
        chosen = torch.isin(train.ids, torch.cat(named))
        chosen = chosen & held if r.kind == "forget" else chosen & ~held & ~gone
        if not bool(chosen.any()):
            raise SplitError(f"{where}: " + ("none of these records is held" if r.kind == "forget" else "all of these records are held or were forgotten"))
        held = held & ~chosen if r.kind == "forget" else held | chosen
        gone = gone | chosen if r.kind == "forget" else gone
        out.append(chosen.nonzero().squeeze(1))
    return out


@dataclass
class _State:
    """What goes from one request to the next."""

    model: nn.Module
    memory: Memory
    part: Tensor
    """(N,) per record of train: number of the request it was learnt at, -1 not yet, -2 forgotten."""
    fisher: dict[int, FisherSum] = field(default_factory=dict)
    tainted: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)


def play(
    model: nn.Module, task: Task, train: Examples, requests: Sequence[Request], course: Course = Course(), *, test: Examples | None = None,
    folder: str | Path | None = None, base: Path | None = None, keep: bool = False, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> Played:  # fmt: skip
    """Play the requests on a copy of `model`, which has learnt none of `train` yet; every request has its own seed.

    folder   where the state after each request goes, so that a killed stream goes on behind its last finished request, bit for bit. It holds records and
             weights; the state before is deleted once the next is safe, since it knows what was forgotten, unless `keep`
    base     folder of files that selectors name (`ids:@file`)

    Raises DataError, SplitError or SettingError for bad input before anything runs, DataError for a folder of another stream, and ExpungeError where the
    method could not forget: the stream stops there, with the state of the request before in the folder.
    """
    if task.name != "classification":
        raise SettingError(f"streams are played for classification, not for {task.name}")
    rows = schedule(requests, train, base)
    preflight(model, task, Split(train, test=test))
    identity = _identity(model, task, train, requests, rows, course, test, seed)
    s = _State(copy.deepcopy(model).eval(), Memory(course.memory), torch.full((len(train),), -1))
    where = None if folder is None else Path(folder)
    if where is not None:
        _resume(where, identity, s)
    for k in range(len(s.steps), len(requests)):
        if progress:
            progress(f"{requests[k].kind} {requests[k].what}", k, len(requests))
        s.steps.append(_request(s, k, requests[k], rows[k], task, train, test, course, seed + 7919 * (k + 1)))
        if where is not None:
            _keep(where, identity, s, keep)
    return Played(tuple(s.steps), course, identity, s.model, s.memory, s.fisher)


def _request(s: _State, k: int, r: Request, rows: Tensor, task: Task, train: Examples, test: Examples | None, course: Course, seed: int) -> Step:
    watch, data, start = guard.Guard(label=f"request {k}"), train.take(rows), time.perf_counter()
    counted = guard.metered(task, Split(data), watch.meter)
    with guard.watching(watch), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if r.kind == "learn":
            passes = 0
            _train(s, counted, data, train.y[s.part >= 0].unique(), course, course.epochs, seed)
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
    return Step(k, r.time, r.kind, r.what, len(rows), **_shares(s, task, train, test), passes=passes, seconds=seconds,
                memory=len(s.memory), stale=stale, weights=model_digest(s.model))  # fmt: skip


def _forget(s: _State, rows: Tensor, r: Request, task: Task, counted: Task, train: Examples, course: Course, seed: int) -> int:
    data, was = train.take(rows), s.part[rows].clone()
    s.part[rows] = -2
    s.memory = s.memory.without(data.ids)
    kept = (s.part >= 0).nonzero().squeeze(1)
    source = train.take(kept) if course.retain == "held" else s.memory.rows()
    retain = source if len(source) else None
    attempt = unlearn(course.method, s.model, task, Split(data, retain, asked=r.what), seed=seed, **course.settings)
    if attempt.patch is None:
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
        _train(s, counted, s.memory.rows(), train.y[kept].unique(), course, course.repair, seed + 1)
    return attempt.meter.passes


def _train(s: _State, task: Task, rows: Examples, old: Tensor, course: Course, epochs: float, seed: int) -> None:
    """Train the model on `rows` with the retention term, whose reference is the model as it is now; `old` are the classes it holds."""
    model, memory, term = s.model, s.memory, course.term
    session = scratch(model)
    session.train()
    new = task.batches(rows, course.batch_size, epochs=epochs, seed=seed)

    def replayed(data: Examples, stream: int):
        """As many batches of the memory as there are of the new records."""
        return task.batches(data, course.replay, epochs=len(new) / -(-len(data) // course.replay), seed=seed + stream)

    def ce(batch) -> Tensor:
        return task.forward(model, batch).mean.mean()

    loss: Callable[[Any], Any] = lambda batch: ce(batch[0])  # noqa: E731
    streams, bend = [new], None
    if term == "lwf" and len(old):
        teacher = targets(copy.deepcopy(model), task, rows)

        def distilled(batch) -> Tensor:
            out = task.forward(model, batch[0])
            return (out.mean + course.alpha * lwf(out, teacher(batch[0]), temperature=course.temperature, classes=old)).mean()

        loss = distilled
    elif term == "ewc" and s.fisher:
        anchor, F = {n: p.detach().clone() for n, p in session.params.items()}, _pooled(s.fisher, course.gamma)
        loss = lambda batch: ce(batch[0]) + ewc(session.params, anchor, F, strength=course.strength)  # noqa: E731
    elif term in ("gem", "agem") and len(memory):
        parts = memory.part.unique().tolist() if term == "gem" else [None]
        streams += [replayed(memory.rows(part), 2 + k) for k, part in enumerate(parts)]
        bend = rule(term, **({"margin": course.margin, "eps": course.eps} if term == "gem" else {}))
        loss = lambda batch: tuple(ce(b) for b in batch)  # noqa: E731
    elif term in ("der", "derpp", "refresh"):
        draws = 1 if term == "der" else 2
        streams += [replayed(memory.rows(), 2 + k) for k in range(draws)] if len(memory) else []
        stir = refreshing(session, ce, delta=course.delta, generator=torch.Generator().manual_seed(seed + 1)) if term == "refresh" else None

        def replay(batch) -> Tensor:
            if stir is not None:
                stir(batch[0])
            total = ce(batch[0])
            if len(batch) == 1:
                return total
            out, z = task.forward(model, batch[1]), memory.logits[batch[1]["i"]]
            if draws == 1:
                return total + course.alpha * der(out, z).mean()
            return total + derpp(out, z, task.forward(model, batch[2]), alpha=course.alpha, beta=course.beta).mean()

        loss = replay
    descend(session, loss, Paired(*streams), lr=course.lr, momentum=course.momentum, clip=course.clip, combine=bend)
    model.eval()


def _pooled(parts: Mapping[int, FisherSum], gamma: float) -> dict[str, Tensor]:
    """sum over parts of gamma^(newer parts) * total / count, by name of the weight."""
    each = [(gamma ** (len(parts) - 1 - k), parts[t]) for k, t in enumerate(sorted(parts))]
    return {n: torch.stack([w * p.total[n] / p.count for w, p in each]).sum(0) for n in each[0][1].total}


def _shares(s: _State, task: Task, train: Examples, test: Examples | None) -> dict[str, Any]:
    right = score(s.model, task, train).correct
    labels = train.y[s.part >= 0].unique()
    unseen = None if test is None else test.take(torch.isin(test.y, labels).nonzero().squeeze(1))
    hits = score(s.model, task, unseen).correct if unseen is not None and len(unseen) else torch.zeros(0, dtype=torch.bool)
    return {
        "forgotten": _share(right[s.part == -2]), "kept": _share(right[s.part >= 0]), "test": _share(hits),
        "parts": {str(k): _share(right[s.part == k]) for k in s.part[s.part >= 0].unique().tolist()},
    }  # fmt: skip


def _share(right: Tensor) -> Share:
    return Share(*wilson(int(right.sum()), len(right)), len(right))


def _identity(model: nn.Module, task: Task, train: Examples, requests, rows: Sequence[Tensor], course: Course, test: Examples | None, seed: int) -> str:
    ids = [hashlib.sha256(train.ids[r].numpy().tobytes()).hexdigest() for r in (*rows, torch.arange(len(train)))]
    seen = "" if test is None else test.digest
    doc = [FORMAT, model_digest(model), task.name, train.digest, ids, seen, [asdict(r) for r in requests], asdict(course), seed]
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()


def _keep(folder: Path, identity: str, s: _State, keep: bool) -> None:
    """Write the state after the last step, whole or not at all, and delete those before."""
    from safetensors.torch import save

    mine, doc = s.memory.packed()
    tensors = {f"net.{n}": t for n, t in {**dict(s.model.named_parameters()), **dict(s.model.named_buffers())}.items()}
    tensors |= {f"memory.{n}": t for n, t in mine.items()} | {"part": s.part}
    for k, f in s.fisher.items():
        tensors |= {f"fisher.{k}.total.{n}": t for n, t in f.total.items()} | {f"fisher.{k}.state.{n}": t for n, t in f.state.items()}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    counts = {str(k): f.count for k, f in s.fisher.items()}
    body = json.dumps({"identity": identity, "steps": [asdict(x) for x in s.steps], "memory": doc, "fisher": counts, "tainted": sorted(s.tainted)})
    last = write(folder / f"state-{len(s.steps) - 1:04d}.safetensors", save(tensors, {"stream": body, "sha256": file_digest(body, tensors)}))
    for old in folder.glob("state-[0-9][0-9][0-9][0-9].safetensors"):
        if not keep and old != last:
            old.unlink(missing_ok=True)


def _resume(folder: Path, identity: str, s: _State) -> None:
    """Load the newest state of the folder into `s`, if there is one. Raises DataError for a damaged file and for that of another stream."""
    found = sorted(folder.glob("state-[0-9][0-9][0-9][0-9].safetensors"))
    if not found:
        return
    doc, tensors = checked(found[-1], "stream")
    if doc.get("identity") != identity:
        raise DataError(f"{found[-1].name} is of another stream (other model, data, requests, course or seed); use an empty folder")
    with torch.no_grad():
        for name, t in {**dict(s.model.named_parameters()), **dict(s.model.named_buffers())}.items():
            t.copy_(tensors[f"net.{name}"])
    s.memory = Memory.unpacked({n.removeprefix("memory."): t for n, t in tensors.items() if n.startswith("memory.")}, doc["memory"])
    s.part, s.tainted = tensors["part"], set(doc["tainted"])
    for k, count in doc["fisher"].items():
        pick = {w: {n.split(".", 3)[3]: t for n, t in tensors.items() if n.startswith(f"fisher.{k}.{w}.")} for w in ("total", "state")}
        s.fisher[int(k)] = FisherSum(pick["total"], int(count), pick["state"])
    for row in doc["steps"]:
        shares = {n: Share(**row[n]) for n in ("forgotten", "kept", "test")}
        s.steps.append(Step(**{**row, **shares, "parts": {k: Share(**v) for k, v in row["parts"].items()}}))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(step: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV: shares as four columns, parts left out."""
    out: dict[str, Any] = {}
    for f in fields(Step):
        value = step[f.name]
        if f.name in ("forgotten", "kept", "test"):
            out |= {f.name if n == "value" else f"{f.name}.{n}": v for n, v in _plain(value).items()}
        elif f.name != "parts":
            out[f.name] = value
    return out


def plot(played: Played) -> str:
    """SVG text: accuracy with its bounds after each request, and passes per request."""
    from expunge.report.plots import COLOURS, LINES, render

    lines = {"kept": "after", "test": "before", "forgotten": "retrained"}
    at = range(len(played.steps))

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        handles = []
        for name, style in lines.items():
            shares = [(k, getattr(s, name)) for k, s in zip(at, played.steps, strict=True) if getattr(s, name).n]
            where = [k for k, _ in shares]
            handles += axes[0].plot(where, [x.value for _, x in shares], color=COLOURS[style], linestyle=LINES[style], marker="o", markersize=3, label=name)
            axes[0].fill_between(where, [x.low for _, x in shares], [x.high for _, x in shares], color=COLOURS[style], alpha=0.15, linewidth=0)
        axes[0].set(ylim=(-0.02, 1.02), ylabel="accuracy", title="what is kept and what is forgotten")
        axes[1].bar(list(at), [s.passes for s in played.steps], color=[COLOURS["after" if s.kind == "learn" else "retrained"] for s in played.steps])
        axes[1].set(ylabel="examples forward and backward", title="cost")
        for axis in axes:
            axis.set_xticks(list(at))
            axis.set_xlabel("request")
        figure.legend(handles, list(lines), loc="outside upper right", ncols=3, fontsize=8)

    return render(9, 3.1, 2, paint)


def _page(played: Played) -> str:
    """A page of its own with the rows and the plot."""
    from expunge.report.page import page

    cell = lambda x: "none" if not x.n else f"{x.value:.3f} ({x.low:.3f} to {x.high:.3f}, n = {x.n})"  # noqa: E731
    heads = ("request", "time", "what", "records", "forgotten", "kept", "test", "passes", "seconds", "memory", "stale")
    lines = [
        (s.number, s.time, f"{s.kind} {s.what}", s.records, cell(s.forgotten), cell(s.kept), cell(s.test), s.passes, f"{s.seconds:.2f}", s.memory, s.stale)
        for s in played.steps
    ]  # fmt: skip
    title = f"A stream of {len(played.steps)} requests: {played.course.method}, retention {played.course.term}"
    return page(title, ["Accuracies with one-sided 95 % Wilson bounds."], heads, lines, [("Accuracy and cost", plot(played))])
