"""F: what forgetting a temporary task removes, and the record that proves that all else stayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from expunge.core.errors import SplitError
from expunge.core.registry import METHODS
from expunge.guarantees.exact.clpu.parts import Parts
from expunge.guarantees.exact.clpu.state import State


@dataclass(frozen=True)
class Removal:
    """What forgetting a task removes: no network is trained for it.

    already    it was forgotten before: nothing happens
    parts      parts that go, each with the SHA-256 of its file          bytes, weights, records    of them: on disk, of the side network, in the memory
    seen       records the task was learned from
    """

    task: str
    already: bool
    parts: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    weights: int = 0
    records: int = 0
    seen: int = 0

    def __str__(self) -> str:
        if self.already:
            return f"nothing to do: task {self.task} was forgotten before"
        return f"task {self.task}: a side network of {self.weights:,} weights and {self.records} records in memory go ({self.bytes:,} bytes); no training"


@dataclass(frozen=True)
class Forgotten:
    """What a forgetting did. before, after: part -> {"key", "sha256"} of its file."""

    removal: Removal
    before: Mapping[str, Mapping[str, str]]
    after: Mapping[str, Mapping[str, str]]
    removed: int
    assurance: str = "exact"

    @property
    def holds(self) -> bool:
        """All that stood is what it was, in key and bytes, but for what was to go, and that is gone."""
        return dict(self.after) == {n: f for n, f in self.before.items() if n not in self.removal.parts}

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        return str(self.removal) if self.removal.already else f"{self.removal}; {len(self.after)} part(s) equal to the bit"


def plan(parts: Parts, name: str) -> Removal:
    """What `forget` would remove. Raises SplitError for a task that was never learned, or is remembered."""
    if name in parts.state.forgotten:
        return Removal(name, True)
    held = parts.held(name)
    if held.how == "remember":
        raise SplitError(
            f"task {name} is remembered: the main network holds it and nothing can be detached; only tasks learned with how='temporary' are forgotten "
            f"exactly. Way out: an approximate method on module('{name}') ({_approximate()}), or learn all but this task in a new folder"
        )
    keys = {f"network of {name}": held.network, f"memory of {name}": held.memory}
    memory, weights = parts.memory(name), sum(p.numel() for p in parts.model.parameters())
    size = sum(parts.store.path(k).stat().st_size for k in keys.values())
    return Removal(name, False, {n: parts.store.digest(k) for n, k in keys.items()}, size, weights, len(memory), memory.num_seen)


def forget(parts: Parts, name: str) -> Forgotten:
    """Delete side network and memory of a temporary task, and say what stood before and after. Raises SplitError as `plan` does."""
    removal, before = plan(parts, name), parts.digests()
    if removal.already:
        return Forgotten(removal, before, before, 0)
    tasks = {n: entry for n, entry in parts.state.tasks.items() if n != name}
    pending = "" if parts.state.pending == name else parts.state.pending
    removed = parts.commit(State(parts.state.main, tasks, parts.state.forgotten | {name}, pending))
    return Forgotten(removal, before, parts.digests(), removed)


def _approximate() -> str:
    """Names of methods that could be tried on what cannot be detached."""
    fit = [n for n, m in METHODS.items() if m.assurance == "approximate" and "classification" in m.tasks and set(m.needs) == {"forget", "retain"}]
    return f"{', '.join(fit[:4])} and {len(fit) - 4} more"
