"""Targets of distillation from a teacher that does not change. Source: card bad-teacher-scrub-negrad, pitfalls (constant teachers)."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from expunge.core.guard import quiet
from expunge.core.types import Batch, Task
from expunge.parts.reading import outputs


def targets(teacher: nn.Module, task: Task, data) -> Callable[[Batch], Tensor]:
    """Batch of `data` -> logits (B, C) of `teacher` as it is now, in eval mode and without gradient.

    Without augmentation an example is always the same, so all logits are computed here, in one pass, and looked up by position `batch["i"]`.
    With `data.records.augment` set a copy of the teacher sees the very batch that the student sees, one forward pass per batch.
    """
    if data.augment is None:
        logits = outputs(teacher, task, data)
        return lambda batch: logits[batch["i"].to(logits.device)]
    twin = copy.deepcopy(teacher)

    def live(batch: Batch) -> Tensor:
        with quiet(twin):
            return task.forward(twin, batch).logits

    return live
