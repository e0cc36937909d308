"""The parts of a stream in force, main network, side networks and memories: named by key, read and written over one store."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SplitError, StoreError, suggest
from expunge.core.types import Task
from expunge.data.records.memory import Memory
from expunge.guarantees.exact.adapters import load as fill
from expunge.guarantees.exact.build import Training
from expunge.guarantees.exact.clpu.state import Entry, Rule, State
from expunge.guarantees.exact.store import VERSION, Store


@dataclass(eq=False, repr=False)
class Parts:
    """An open stream: its store, what it is trained with, the state in force and the networks read so far.

    model     the architecture, in eval mode; its weights are not used
    config    what the book says of rule, training, seed, model and start; it is in every key
    """

    store: Store
    model: nn.Module
    task: Task
    rule: Rule
    training: Training
    config: Mapping[str, Any]
    state: State
    nets: dict[str, nn.Module] = field(default_factory=dict)

    def commit(self, state: State) -> int:
        """Put a state in force; returns how many files that it does not name were removed."""
        self.store.write_book({"config": dict(self.config), **state.document()})
        self.state = state
        keys = set(state.files().values())
        self.nets = {k: net for k, net in self.nets.items() if k in keys}
        return self.store.keep(keys)

    def key(self, kind: str, name: str, parent: str, *facts: Any) -> str:
        """The name of a part, made of all that it depends on."""
        return hashlib.sha256(json.dumps([VERSION, "clpu", kind, name, parent, facts, self.config], sort_keys=True).encode()).hexdigest()

    def get(self, part: str, key: str) -> dict[str, Tensor]:
        """The tensors of a part. Raises StoreError with its name where it is missing, damaged or changed."""
        if not self.store.has(key):
            raise StoreError(f"{part}: checkpoint {key[:12]} is missing from {self.store.folder.name}, and what it was learned from is not kept here")
        try:
            return self.store.get(key)
        except StoreError as error:
            raise StoreError(f"{part}: {error}") from None

    def put(self, key: str, model: nn.Module, name: str, parent: str) -> None:
        """Write the network that learning or consolidating a task made."""
        self.store.put(key, tensors(model), part=f"network after {name}", parent=parent)

    def net(self, key: str) -> nn.Module:
        """The network of a key in force, in eval mode; not to be written to."""
        if key not in self.nets:
            part = next(n for n, k in self.state.files().items() if k == key)
            net = copy.deepcopy(self.model)
            fill(net, self.get(part, key))
            self.nets[key] = net.eval()
        return self.nets[key]

    def memory(self, name: str) -> Memory:
        """The memory of a task that stands."""
        entry = self.state.tasks[name]
        return Memory.unpacked(self.get(f"memory of {name}", entry.memory), entry.numbers)

    def memories(self) -> dict[str, tuple[Memory, Tensor]]:
        """Memory and classes of every remembered task: what is replayed. Temporary tasks never are."""
        return {n: (self.memory(n), torch.tensor(self.state.tasks[n].classes)) for n in self.state.of("remember")}

    def past(self) -> list[list[str]]:
        """Id and memory's key of every remembered task: what a key says of the replay."""
        return [[n, self.state.tasks[n].memory] for n in self.state.of("remember")]

    def held(self, name: str) -> Entry:
        """A task that stands. Raises SplitError for one that was forgotten or never learned."""
        if name in self.state.forgotten:
            raise SplitError(f"task {name} was forgotten: no network of it is left to predict with")
        if name not in self.state.tasks:
            raise SplitError(suggest("no task", name, self.state.tasks))
        return self.state.tasks[name]

    def digests(self) -> dict[str, dict[str, str]]:
        """Part -> {"key", "sha256"} of its file as it is on disk."""
        return {n: {"key": k, "sha256": self.store.digest(k)} for n, k in self.state.files().items()}

    def check(self) -> int:
        """Read every part in force and compare it with its digest; returns how many. Raises StoreError with the name of the first that was changed."""
        for part, key in self.state.files().items():
            self.get(part, key)
        return len(self.state.files())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as copies on the CPU."""
    return {n: t.detach().cpu().contiguous().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}
