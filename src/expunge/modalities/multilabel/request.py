"""Requests over records of several labels in files: as `modalities.files.requests`, for the data that can hold several targets."""

from __future__ import annotations

from typing import Any

from expunge.core.errors import DataError, SplitError
from expunge.core.modality import Opened, Request
from expunge.core.types import Split, Task
from expunge.modalities.files import requests

HERE = "multilabel"
SOURCES, SELECTORS = ("py", "world"), ("ids", "random")


def read(request: Request) -> Opened:
    """Models from their factory, and the split."""
    _check(request)
    return requests.read(request, HERE)


def sized(request: Request) -> tuple[Task, Split, Any]:
    """Task and split for planning."""
    _check(request)
    return requests.sized(request, HERE)


def _check(request: Request) -> None:
    for name in ("train", "test", "validation"):
        kind = request.options[name].partition(":")[0]
        if kind not in (*SOURCES, "", *(("share",) if name == "validation" else ())):
            raise DataError(f"--{name} {request.options[name]}: records of several labels come from py:module:function or world:digits-multi, not from {kind}:")
    if request.what.partition(":")[0] not in SELECTORS:
        raise SplitError(f"records of several labels are named by ids:17,42, ids:@file or random:0.1, not by '{request.what}'")
