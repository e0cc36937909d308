"""What a stream is: the rule by which tasks are learned, the tasks that stand, and how the book tells them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from expunge.core.errors import SettingError

HOW = ("remember", "temporary")
DEFAULTS = {"lr": 0.01, "momentum": 0.0, "weight_decay": 5e-4}
"""Of `build.Training`, where the paper's differ from its own."""


@dataclass(frozen=True)
class Rule:
    """How tasks are learned and remembered.

    epochs        passes over a task's records                     use_pretrain   side networks start from the main network, else from fresh weights
    memory        most records kept of each task                   iterations     steps of a consolidation; 0: as many as learning the task took
    replay        records of the memories per step, shared by the remembered tasks
    alpha, beta   weights of the distance to the old logits, and of the loss on the old labels
    """

    epochs: int = 10
    memory: int = 200
    replay: int = 32
    alpha: float = 0.5
    beta: float = 1.0
    use_pretrain: bool = True
    iterations: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("memory", 1), ("replay", 1), ("iterations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingError(f"{name} must be a whole number of {least} or more, not {value}")
        for name in ("alpha", "beta"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise SettingError(f"{name} must be a finite number of 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Entry:
    """A task that stands: remember or temporary, its classes, the keys of its side network ("" once it is remembered) and memory, the memory's numbers."""

    how: str
    classes: tuple[int, ...]
    network: str
    memory: str
    numbers: Mapping[str, int]


@dataclass(frozen=True)
class State:
    """What is in force: the key of the main network, the tasks that stand (remembered ones in their order), ids of forgotten ones.

    pending    a temporary task whose consolidation began: cut short by a kill, it is finished on loading
    """

    main: str
    tasks: Mapping[str, Entry] = field(default_factory=dict)
    forgotten: frozenset[str] = frozenset()
    pending: str = ""

    def of(self, how: str) -> list[str]:
        """Ids of the tasks that stand that way, in order."""
        return [n for n, entry in self.tasks.items() if entry.how == how]

    def files(self) -> dict[str, str]:
        """Part -> key: `main`, `network of b`, `memory of b`."""
        out = {"main": self.main}
        for name, entry in self.tasks.items():
            out |= {f"network of {name}": entry.network} if entry.network else {}
            out[f"memory of {name}"] = entry.memory
        return out

    def document(self) -> dict[str, Any]:
        """As JSON values for the book; `stated` reads them."""
        tasks = [{"task": n, **asdict(entry)} for n, entry in self.tasks.items()]
        return {"main": self.main, "tasks": tasks, "forgotten": sorted(self.forgotten), "pending": self.pending}


def stated(book: Mapping[str, Any]) -> State:
    """The state that a book tells. Raises KeyError, TypeError, ValueError or AttributeError for the book of something else."""
    tasks = {
        e["task"]: Entry(e["how"], tuple(map(int, e["classes"])), e["network"], e["memory"], {n: int(v) for n, v in e["numbers"].items()})
        for e in book["tasks"]
    }
    return State(book["main"], tasks, frozenset(book["forgotten"]), book["pending"])


def named(task_id: str | int) -> str:
    """The id as text. Raises SettingError for one that could not name a file, and for `main`."""
    name = str(task_id)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name == "main":
        raise SettingError(f"a task id is 1 to 64 letters, digits, '.', '_' or '-', and not main; found '{name[:80]}'")
    return name
