"""Trivial baselines of language models: what one pass over retain does to all weights, and to a last layer drawn anew."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from expunge.core.guard import Guard, watching
from expunge.core.machine.devices import reseeded
from expunge.core.session import Session
from expunge.core.types import Split, Task
from expunge.modalities.language.autopilot import pace
from expunge.parts.training import train
from expunge.parts.updates.descend import descend

SIZE = 16
"""Texts per step."""


def trivial(model: nn.Module, task: Task, split: Split, seed: int = 0) -> dict[str, nn.Module]:
    """fine_tune: all weights trained on retain for one pass. reset_last: the output layer drawn anew, apart from the input embeddings where the two were one,
    and trained alone for one pass. Both at the step size of `pace`; without retain there are none."""
    if split.retain is None:
        return {}
    tuned = copy.deepcopy(model).requires_grad_(True)
    with watching(Guard()):
        train(tuned, task, split.retain, epochs=1.0, batch_size=SIZE, seed=seed, **pace(model))
    return {"fine_tune": tuned, **anew(model, task, split, seed)}


def anew(model: nn.Module, task: Task, split: Split, seed: int = 0) -> dict[str, nn.Module]:
    """reset_last alone; nothing for a model that names no output layer."""
    twin: Any = copy.deepcopy(model)
    old = twin.get_output_embeddings() if hasattr(twin, "get_output_embeddings") else None
    if not isinstance(old, nn.Linear):
        return {}
    with reseeded(seed):
        head = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None).to(old.weight)
        nn.init.normal_(head.weight, std=float(getattr(twin.config, "initializer_range", 0.02)))
    twin.requires_grad_(False)
    twin.set_output_embeddings(head.requires_grad_(True))
    named = dict(head.named_parameters())
    batches = task.batches(split.retain, SIZE, epochs=1.0, seed=seed)
    with watching(Guard()):
        descend(Session(twin, named, dict.fromkeys(named), judged=False), lambda b: task.forward(twin, b).mean.mean(), batches, **pace(model))
    return {"reset_last": twin.requires_grad_(True).eval()}
