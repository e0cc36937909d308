"""The split of a user's own data in Python: whatever it is, read once and by one schema.

split = expunge.split(train, "class:cat", test=test)
verdict = expunge.forget(model, "classification", split)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.errors import SettingError, suggest
from expunge.core.modality import Request
from expunge.core.types import Split
from expunge.modalities.files import requests


def split(
    train: Any, what: str, *, test: Any = None, validation: Any = "share:0.3", plants: Any = None, task: str = "classification", model: nn.Module | None = None,
    corrected: bool = False, schema: str = "", folder: Path | str = ".", **options: str,
) -> Split:  # fmt: skip
    """The split of data in any form that `readers` knows: a spec (`images:train`, `csv:train.csv?target=label`) or a Python object (`objects.read`).

    what        what must go: class:cat, ids:17,42, range:0..30, random:0.1
    validation  data of its own, or share:0.3 of test, drawn from a fixed seed
    model       brings names and numbers of its classes and how it wants pixels, where it says so
    schema      report.json of an earlier run, to which all data is held
    options     target, x, id, ignore, columns, classes, mean, std, size, channels, as on the command line
    Test, validation and plants are held to the schema of train: `split.forget.schema`. Raises DataError and SplitError, in one line.
    """
    if odd := set(options) - set(requests.PASSED.values()):
        raise SettingError(suggest("data has no option", min(odd), requests.PASSED.values()))
    names = {option: name for name, option in requests.PASSED.items()}
    given = {"train": train, "test": test, "validation": validation, "plants": "" if plants is None else plants, "corrected": corrected, "schema": schema}
    return requests.split(Request("", what, {**given, **{names[n]: v for n, v in options.items()}}, folder=Path(folder)), task, model)
