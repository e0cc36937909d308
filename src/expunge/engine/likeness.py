"""Whether one model may stand for another: the same weights to the bit, or the same outputs within a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.digest import model_digest
from expunge.core.guard import quiet
from expunge.core.types import Split, Task, spread

BOUND = 1e-4
"""Largest difference of an output of the released model from the audited one, as a share of the largest output."""
SHARE = 0.01
"""The same as a share of what the edit itself moved: else the model before could stand for one that was edited lightly."""
COMPARED = 8
"""Records of forget, and of retain, whose outputs are compared."""

Answers = Callable[[Any, Any, list[int]], Any]


@dataclass(frozen=True)
class Likeness:
    """How near two models are: whether all weights are the same bits, the largest difference of an output as a share of the largest output, and how many
    records were read."""

    bits: bool
    apart: float
    records: int
    moved: float = float("inf")
    """What the edit moved, measured alike: the largest difference of the audited model from the one before."""

    @property
    def same(self) -> bool:
        """Whether one may stand for the other. Where no record could be read, only the same bits do."""
        return self.apart == 0 if self.bits else self.records > 0 and self.apart <= min(BOUND, SHARE * self.moved)

    @property
    def why(self) -> str:
        """How far apart they are, and how far they may be, in words."""
        return f"its outputs differ by {self.apart:.2g} of the largest, more than {min(BOUND, SHARE * self.moved):.2g}"

    @property
    def told(self) -> str:
        """In words."""
        if self.bits and self.apart == 0:
            return f"loaded back it is the audited model bit for bit, outputs of {self.records} records too"
        return f"loaded back, its outputs on {self.records} records are those that were audited within {self.apart:.1e} (the edit moved {self.moved:.1e})"


def likeness(audited: nn.Module, loaded: nn.Module, task: Task, split: Split, answers: Answers | None = None, *, before: nn.Module | None = None) -> Likeness:
    """All models read the same records of forget and retain; `answers` says what is compared (`outputs` where it is None, which prompts alone have not).
    `before` is the model that was edited."""
    apart, moved, records, read = 0.0, 0.0, 0, answers or partial(outputs, task)
    for part in (split.forget, split.retain):
        if part is None or (answers is None and getattr(part, "bare", False)):
            continue
        rows = spread(len(part), COMPARED)
        a = _read(read, audited, part, rows)
        apart = max(apart, _gap(a, _read(read, loaded, part, rows)))
        moved = max(moved, _gap(a, _read(read, before, part, rows))) if before is not None else float("inf")
        records += len(rows)
    return Likeness(model_digest(audited) == model_digest(loaded), apart, records, moved)


def _read(read: Answers, model: nn.Module, part: Any, rows: list[int]) -> Tensor:
    with quiet(model):
        return read(model, part, rows).detach().float().cpu()


def _gap(a: Tensor, b: Tensor) -> float:
    gap = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
    return gap / max(float(a.abs().max()), 1e-30) if gap < float("inf") else float("inf")


def outputs(task: Task, model: nn.Module, part: Any, rows: list[int]) -> Tensor:
    """Logits of these records, else what is predicted of them, else their losses."""
    out = task.forward(model, task.collate(part, torch.tensor(rows), torch.Generator().manual_seed(0)))
    return out.logits if out.logits is not None else out.pred if out.pred is not None else out.nll
