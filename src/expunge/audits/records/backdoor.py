"""Is the manipulation gone? Trigger success and corrected accuracy on data from the manipulated domain. Source: card corrective, Metrics.

    trigger.success     share of the examples that get the class the manipulation wants
    trigger.corrected   share that get their true class
    trigger.worst       success of the pair of classes where it is largest, when there is more than one
    trigger.base        success on the same examples without trigger: what is left of a model without backdoor
    corrected.test, corrected.train, corrected.clean      accuracy by true labels: manipulated domain, manipulated training rows, clean test data

Plain functions, no registered check: a `Split` has no part for data from the manipulated domain. Success alone is not enough: a model that
answers at random has none. Bounds are Wilson's; those of `trigger.worst` do not pay for having picked the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.audits.core import Row
from expunge.core.errors import SplitError
from expunge.core.stats import wilson
from expunge.core.types import IGNORE, Task
from expunge.data.records.manipulate import Manipulated
from expunge.modalities.examples import Examples
from expunge.parts.reading import score


def trigger(model: nn.Module, task: Task, data: Examples, target: int | Tensor, *, plain: Examples | None = None) -> list[Row]:
    """Rows trigger.* of a model on triggered examples with their true labels.

    target   the class the trigger asks for, or one per example (N,), IGNORE for none
    plain    the same examples without trigger, for the row trigger.base

    Examples that are of the target class anyway are left out. Raises SplitError if none is left.
    """
    aim = torch.as_tensor(target).expand(len(data)) if isinstance(target, int) or target.ndim == 0 else target
    if len(aim) != len(data) or (plain is not None and not torch.equal(plain.y, data.y)):
        raise SplitError(f"targets and plain examples must match the {len(data)} triggered examples one by one")
    rows = ((aim != data.y) & (aim != IGNORE)).nonzero().squeeze(1)
    if not len(rows):
        raise SplitError("no triggered example whose true class is not the target: nothing to measure success on")
    seen, aim = score(model, task, data.take(rows)), aim[rows]
    given = seen.logits.argmax(-1)
    n, note = len(rows), f"{len(data) - len(rows)} examples without another target left out" if len(rows) < len(data) else ""
    out = [
        Row("trigger.success", *wilson(int((given == aim).sum()), n), n, note),
        Row("trigger.corrected", *wilson(int(seen.correct.sum()), n), n, note),
    ]
    pairs = torch.stack([seen.labels, aim], 1).unique(dim=0).tolist()
    if len(pairs) > 1:
        each = []
        for s, t in pairs:
            mine = (seen.labels == s) & (aim == t)
            each.append(Row("trigger.worst", *wilson(int((given[mine] == t).sum()), int(mine.sum())), int(mine.sum()), f"{s} to {t}, of {len(pairs)} pairs"))
        out.append(max(each, key=lambda r: r.value))
    if plain is not None:
        without = score(model, task, plain.take(rows)).logits.argmax(-1)
        out.append(Row("trigger.base", *wilson(int((without == aim).sum()), n), n, "without trigger"))
    return out


def corrected(model: nn.Module, task: Task, data: Manipulated, test: Examples | None = None) -> list[Row]:
    """Rows corrected.test and corrected.train, and with `test` (clean data) corrected.clean: accuracy by true labels."""
    parts = {"test": (data.test, "test data of the manipulated domain"), "train": (data.corrected, "manipulated training rows")}
    if test is not None:
        parts["clean"] = test, "clean test data"
    rows = []
    for name, (part, note) in parts.items():
        right = score(model, task, part).correct
        rows.append(Row(f"corrected.{name}", *wilson(int(right.sum()), len(right)), len(right), f"{note}, true labels"))
    return rows
