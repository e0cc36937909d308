"""Selectors: what must go, in words. `class:3`, `ids:17,42`, `ids:@file`, `range:0..30` (regression), `random:0.1` (a share),
`random:500` (a number of records), `random:0.1@7` (with a seed)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from expunge.core.errors import SplitError
from expunge.modalities.examples import Examples


def resolve(selector: str, train: Examples, folder: Path | None = None) -> tuple[Examples, Examples]:
    """(forget, retain) rows of the training data. Raises SplitError for what cannot be read, matches nothing, or matches everything."""
    kind, _, value = selector.partition(":")
    makers = {"class": _class, "ids": _ids, "range": _range, "random": _random}
    if kind not in makers or not value:
        raise SplitError(f"cannot read the selector '{selector}'; write one of class:3, ids:17,42, ids:@file, range:0..30, random:0.1")
    gone = makers[kind](value, train, folder or Path.cwd())
    if not bool(gone.any()):
        raise SplitError(f"'{selector}' matches no record")
    if bool(gone.all()):
        raise SplitError(f"'{selector}' matches every record: forgetting everything leaves nothing to keep; delete the model instead")
    return train.take(gone.nonzero().squeeze(1)), train.take((~gone).nonzero().squeeze(1))


def _class(value: str, train: Examples, _: Path) -> Tensor:
    known = sorted(set(train.y.tolist()))
    if train.y.is_floating_point() or not value.isdigit() or int(value) not in known:
        raise SplitError(f"no class '{value}' in the training data; it has {', '.join(map(str, known[:20]))}")
    return train.y == int(value)


def _ids(value: str, train: Examples, folder: Path) -> Tensor:
    if value.startswith("@"):
        path = folder / value[1:]
        if not path.is_file():
            raise SplitError(f"no file {value[1:]} with ids, one per line")
        words = path.read_text().split()
    else:
        words = value.split(",")
    try:
        wanted = torch.tensor([int(w) for w in words], dtype=torch.long)
    except ValueError:
        raise SplitError("ids must be whole numbers, separated by commas or one per line") from None
    unknown = wanted[~torch.isin(wanted, train.ids)]
    if len(unknown):
        raise SplitError(f"{len(unknown)} id(s) are not in the training data, the first is {int(unknown[0])}")
    return torch.isin(train.ids, wanted)


def _range(value: str, train: Examples, _: Path) -> Tensor:
    try:
        low, high = (float(v) for v in value.split(".."))
    except ValueError:
        raise SplitError(f"write a range as range:0..30, not '{value}'") from None
    return (train.y >= low) & (train.y <= high)


def _random(value: str, train: Examples, folder: Path) -> Tensor:
    share, _, seed = value.partition("@")
    try:
        n, generator = int(share) if share.isdigit() and int(share) > 1 else int(float(share) * len(train)), torch.Generator().manual_seed(int(seed or 0))
    except ValueError:
        raise SplitError(f"write random:0.1, random:500 or random:0.1@7, not '{value}'") from None
    gone = torch.zeros(len(train), dtype=torch.bool)
    gone[torch.randperm(len(train), generator=generator)[: max(0, n)]] = True
    return gone
