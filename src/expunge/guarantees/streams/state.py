"""What goes from one request to the next, and the file of it that a killed stream goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core.digest import model_digest
from expunge.core.errors import DataError
from expunge.core.files import file_digest, write
from expunge.core.types import Records, Task
from expunge.data.records.memory import FisherSum, Memory, checked
from expunge.guarantees.streams.course import Course
from expunge.guarantees.streams.requests import Request
from expunge.guarantees.streams.rows import Share, Step

FORMAT = 1


@dataclass
class State:
    """What goes from one request to the next."""

    model: nn.Module
    memory: Memory
    part: Tensor
    """(N,) per record of train: number of the request it was learnt at, -1 not yet, -2 forgotten."""
    fisher: dict[int, FisherSum] = field(default_factory=dict)
    tainted: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)


def identify(
    model: nn.Module, task: Task, train: Records, requests: Sequence[Request], rows: Sequence[Tensor], course: Course, test: Records | None, seed: int
) -> str:
    """Digest of all that a stream depends on. rows: positions of each request's records in train."""
    ids = [hashlib.sha256(train.ids[r].numpy().tobytes()).hexdigest() for r in (*rows, torch.arange(len(train)))]
    seen = "" if test is None else test.digest
    doc = [FORMAT, model_digest(model), task.name, train.digest, ids, seen, [asdict(r) for r in requests], asdict(course), seed]
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()


def write_state(folder: Path, identity: str, s: State, keep: bool) -> None:
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


def resume(folder: Path, identity: str, s: State) -> None:
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
