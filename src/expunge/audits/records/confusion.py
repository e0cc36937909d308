"""Which label was predicted for which, for the report."""

from __future__ import annotations

from typing import Any

import torch

from expunge.audits.core import Probe
from expunge.core.registry import picture
from expunge.parts.reading import Scores


def confusion(s: Scores) -> list[list[int]]:
    """Counts [label][prediction]."""
    classes = s.logits.shape[1]
    return torch.bincount(s.labels * classes + s.logits.argmax(1), minlength=classes**2).view(classes, classes).tolist()


@picture("confusion", tasks=("classification",))
def confusions(p: Probe) -> dict[str, Any]:
    """Counts before and after, on test where there is one, on forget else."""
    part = "test" if p.split.test is not None else "forget"
    return {"confusion": {label: confusion(p.scores(label, part)) for label in ("before", "after")}}
