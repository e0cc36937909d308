"""Calls of transformers without its bars and its notes on standard error, and whether the weights that it read are those of the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from expunge.core.errors import ModelError


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers says and shows on standard error: what matters of it is raised."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def fitting(name: str, info: Mapping[str, Any], why: str = "would be drawn at random") -> None:
    """Raises ModelError for what transformers' loading info says that does not fit: weights of the model that the folder `name` lacks, which is `why` it is
    refused, has besides, or has in another shape."""
    for what, said in (("missing", why), ("unexpected", "has no place in the model"), ("mismatched", "has another shape")):
        if names := sorted(map(str, info.get(f"{what}_keys") or ())):
            raise ModelError(f"the weights of {name} do not fit its model: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {said}")
