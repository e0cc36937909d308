"""Whether a model can be read at all: its weights and its answers are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from expunge.core.guard import quiet
from expunge.core.types import Split, Task

ALL = ("forget", "retain", "test", "validation")
"""What an audit may read; a run reads no test."""

SOME = 16
"""Records of each part that `broken` reads."""


def unsound(model: nn.Module) -> str:
    """Name of the first parameter or floating-point buffer that holds values that are not finite; empty where there is none."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return next((n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())), "")


def broken(model: nn.Module, task: Task, split: Split, parts: Sequence[str] = ("forget", "retain")) -> str:
    """What cannot be read about the model, to stand behind its name: weights that are not finite, or losses that are not, on the first SOME records of one of
    the parts; empty where all is well."""
    if name := unsound(model):
        return f"holds values that are not finite, first in {name}"
    with quiet(model):
        for name in parts:
            part = getattr(split, name)
            if part is None or not len(part) or getattr(part, "bare", False):  # prompts alone have no loss
                continue
            nll = task.forward(model, task.batches(part, SOME)[0]).nll
            if not bool(torch.isfinite(nll).all()):
                return f"gives answers that are not finite: a loss on {name} is {float(nll[~torch.isfinite(nll)][0])}"
    return ""
