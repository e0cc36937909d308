"""Requests from Python as the command line takes them: a model's folder or factory, and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import SettingError, suggest
from expunge.core.modality import Opened, Request, meant


def opened(
    model: Path | str, what: str, *, task: str = "", references: Sequence[Path | str] = (), folder: Path | str = ".",
    progress: Callable[[str, int, int], None] | None = None, **options: Any,
) -> Opened:  # fmt: skip
    """A model that stands in files and what must go from it, read as `expunge forget MODEL REQUEST` reads them; `expunge.forget` takes it as it is.

        vit = expunge.opened("vit", "class:cat", train="images:train", test="images:test")
        verdict = expunge.forget(vit)

    model       a folder of transformers, PEFT or diffusers, timm:NAME, or py:module:factory
    what        class:cat, ids:17,42, range:0..30 or random:0.1; a file of texts; a concept
    task        what kind of model it is, where its folder does not say so; a factory is a classifier
    references  models retrained without what must go, as `model` or as files of weights
    folder      where relative paths start
    options     those of the kind of model, as on the command line: train, test, retain, weights, template ...

    Raises SettingError for an option that the kind of model has not, with the nearest, and what its reader raises: DataError, SplitError or ModelError.
    """
    modality = meant(task, str(model), Path(folder))
    has = {o.name: o.default for o in modality.options}
    if odd := sorted(set(options) - set(has)):
        raise SettingError(suggest(f"{modality.what} have no option", odd[0], has))
    given = {**has, **{n: str(v) if isinstance(v, Path) else v for n, v in options.items()}, **({modality.asks: what} if modality.asks in has else {})}
    return modality.open(Request(str(model), what, given, tuple(map(str, references)), folder=Path(folder), progress=progress))
