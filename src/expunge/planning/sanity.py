"""Before anything runs: is the model, as it is fed, any good at what must stay? Wrong pixels, columns or class numbers, and weights that were never loaded,
show here first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe
from expunge.core.errors import ModelError, printable
from expunge.core.modality import Level, made, of
from expunge.core.types import Split, Task, held, spread
from expunge.engine.run import preflight
from expunge.modalities.files.schema import called
from expunge.report.glance import NEAR, PARTS

MOST = 512
"""Records of a part that are read at most."""

BETTER = 0.05
"""Other numbers of the classes that raise accuracy by so much are told, where of each class that moves most records say so."""


@dataclass(frozen=True)
class Sanity:
    """How good a model is on what must stay, before anything runs.

    levels   part of the split -> `Level` on at most MOST of its records; only parts and modalities that have one
    swapped  (class, what the model calls it) where other numbers of the classes fit the model much better; empty else
    fitting  accuracy on what must go and what must stay with these numbers
    """

    levels: dict[str, Level]
    swapped: tuple[tuple[str, str], ...] = ()
    fitting: float = 0.0

    @property
    def line(self) -> str:
        """One line for people; empty where the modality has no such measure."""
        said = [f"{level.what} {level.value:.3g} on {PARTS.get(part, part)} (n = {level.n}; chance {level.chance:.3g})" for part, level in self.levels.items()]
        return f"The model as it is fed: {', '.join(said)}." if said else ""

    @property
    def fault(self) -> str:
        """Why nothing should run, in one line; empty where there is no reason."""
        kept = self.levels.get("retain")
        now = kept.value if kept else 0.0
        if self.swapped:
            pairs = ", ".join(f"{a} is its {b}" for a, b in self.swapped[:4])
            return printable(
                f"the model numbers its classes otherwise than the data: accuracy on the training data would be {self.fitting:.3g} "
                f"(now {now:.3g} on kept records) where {pairs}; "
                "name the order (--classes sorted, or --classes a,b,c)"
            )
        if kept is not None and not kept.above >= NEAR:
            return (
                f"the model is near chance on kept records ({kept.what} {now:.3g}, chance {kept.chance:.3g}, n = {kept.n}): its weights were not loaded, or "
                "it is fed otherwise than it was trained (--mean/--std/--size, columns, classes)"
            )
        return ""


def sanity(model: nn.Module, task: Task | str, split: Split) -> Sanity:
    """Levels of the model on at most MOST records of retain and test each, and whether its classes are numbered otherwise than the data's. The model is not
    changed. Raises SplitError for data that it cannot take."""
    task = made(task)
    preflight(model, task, split)
    parts = {name: _few(getattr(split, name)) for name in ("retain", "test", "forget")}
    p = Probe(model, model, task, replace(split, **parts))
    found = {name: of(task).level(p, model, name) for name, data in parts.items() if data is not None and name != "forget"}
    levels = {name: level for name, level in found.items() if level is not None}
    if "retain" not in levels or not of(task).labelled:
        return Sanity(levels)
    seen = [p.seen(model, part) for part in ("forget", "retain")]
    schema = getattr(split.retain, "schema", None)
    names = () if schema is None else schema.classes
    swapped, fitting = renumbered(torch.cat([s.logits for s in seen]), torch.cat([s.labels for s in seen]), names)
    return Sanity(levels, swapped, fitting)


def checked(model: nn.Module, task: Task | str, split: Split, *, anyway: bool = False) -> Sanity:
    """`sanity`. Raises ModelError where it finds a fault, but for `anyway`, and for modalities that do not stop there (`Modality.stops`)."""
    found = sanity(model, task, split)
    if found.fault and not anyway and of(made(task)).stops:
        raise ModelError(f"{found.fault}; --anyway goes on")
    return found


def renumbered(logits: Tensor, labels: Tensor, names: Sequence[str] = ()) -> tuple[tuple[tuple[str, str], ...], float]:
    """(classes with the names of those that the model answers for them, accuracy with these): the numbers of the classes under which answers (N, C) agree most
    with labels (N,), where at least two classes move, most records of each are answered so, and accuracy rises by BETTER or more; ((), 0.0) else.

    >>> y = torch.arange(30) % 3
    >>> renumbered(torch.eye(3)[(y + 1) % 3], y, ["a", "b", "2"])
    ((('0 (a)', '1 (b)'), ('1 (b)', '2'), ('2', '0 (a)')), 1.0)
    """
    from scipy.optimize import linear_sum_assignment

    classes = logits.shape[-1]
    if labels.dim() != 1 or not len(labels) or classes > 2048:
        return (), 0.0
    table = torch.zeros(classes, classes, dtype=torch.long)
    table.index_put_((labels, logits.argmax(-1)), torch.ones(len(labels), dtype=torch.long), accumulate=True)
    rows, columns = linear_sum_assignment(-(2 * table + torch.eye(classes, dtype=torch.long)).numpy())
    moved = [(int(a), int(b)) for a, b in zip(rows, columns, strict=True) if a != b and 2 * table[a, b] > table[a].sum()]
    gain = sum(int(table[a, b] - table[a, a]) for a, b in moved)
    if len(moved) < 2 or gain < BETTER * len(labels):
        return (), 0.0
    return tuple((called(a, names), called(b, names)) for a, b in moved), (int(table.diag().sum()) + gain) / len(labels)


def _few(data: Any) -> Any:
    return data.take(spread(len(data), MOST)) if data is not None and held(data) else data
