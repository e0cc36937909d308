"""Selectors: what must go, in words. `class:3` or `class:cat`, `ids:17,42` (names of records, where they have such), `ids:@file`, `range:0..30`
(regression), `random:0.1` (a share), `random:500` (a number of records), `random:0.1@7` (with a seed)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from expunge.core import files
from expunge.core.errors import DataError, SplitError, printable
from expunge.modalities.examples import Examples
from expunge.modalities.files import schema

MAX_BYTES = 1 << 28
"""Largest file of ids that is read: 256 MiB."""


def resolve(selector: str, train: Examples, folder: Path | None = None, *, inside: bool = False) -> tuple[Examples, Examples]:
    """(forget, retain) rows of the training data. With `inside`, a file of ids may not leave `folder`. Raises SplitError for what cannot be read, matches
    nothing, or matches everything."""
    kind, _, value = selector.partition(":")
    makers = {"class": _class, "ids": _ids, "range": _range, "random": _random}
    if kind not in makers or not value:
        raise SplitError(f"cannot read the selector '{printable(selector)}'; write one of class:3, class:cat, ids:17,42, ids:@file, range:0..30, random:0.1")
    if inside and kind == "ids" and value.startswith("@"):
        files.inside(value[1:], folder or Path.cwd())
    gone = makers[kind](value, train, folder or Path.cwd())
    if not bool(gone.any()):
        raise SplitError(f"'{selector}' matches no record")
    if bool(gone.all()):
        raise SplitError(f"'{selector}' matches every record: forgetting everything leaves nothing to keep; delete the model instead")
    return train.take(gone.nonzero().squeeze(1)), train.take((~gone).nonzero().squeeze(1))


def echoed(selector: str, train: Examples, forget: Examples) -> str:
    """What a selector was understood as: class and name, or the first records, and how many of how many."""
    kind = selector.partition(":")[0]
    counted = f"{len(forget):,} of {len(train):,} records"
    if kind == "class":
        return printable(f"class {_named(int(forget.y[0]), train)}, {counted}")
    first = ", ".join(forget.called(i) for i in forget.ids[:5].tolist())
    return printable(f"{'' if kind == 'ids' else selector + ', '}{counted}: {first}{' ...' if len(forget) > 5 else ''}")


def _named(k: int, train: Examples) -> str:
    names = train.schema.classes if train.schema is not None else ()
    return schema.called(k, names)


def _class(value: str, train: Examples, _: Path) -> Tensor:
    known = [] if train.y.is_floating_point() else sorted(set(train.y.tolist()))
    names = train.schema.classes if train.schema is not None else ()
    try:
        k = schema.number(value, names) if names and known else int(value) if value.isdigit() and value.isascii() and len(value) < 19 else -1
    except DataError as error:
        if "is two classes" in str(error):
            raise SplitError(str(error)) from None
        k = -1
    if k not in known:
        near = f"; {found[0]} is near" if (found := difflib.get_close_matches(value, names, n=1)) else ""
        has = ", ".join(_named(i, train) for i in known[:20])
        raise SplitError(printable(f"no class '{value}' in the training data{near}; it has {has}"))
    return train.y == k


def _ids(value: str, train: Examples, folder: Path) -> Tensor:
    if value.startswith("@"):
        path = folder / value[1:]
        try:
            if path.stat().st_size > MAX_BYTES:
                raise SplitError(f"{path.name} is larger than {MAX_BYTES} bytes")
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise SplitError(f"no file {value[1:]} with ids, one per line") from None
        words = [w.strip() for w in text.split("\n") if w.strip()] if train.names else text.split()
    else:
        words = [w.strip() for w in value.split(",")]
    return torch.isin(train.ids, torch.tensor([*_numbered(words, train)], dtype=torch.long))


def _numbered(words: list[str], train: Examples) -> Iterator[int]:
    """Ids of words. A name comes first; numbers stand for records only where an id column of words does not name them."""
    here = set(train.ids.tolist())
    by_name = {name: i for i, name in (train.names or {}).items() if i in here}
    strict = bool(train.names) and (train.schema is None or bool(train.schema.id))
    unknown = []
    for word in words:
        if word in by_name:
            yield by_name[word]
            continue
        counted = not strict and word.lstrip("-").isdigit() and word.isascii() and len(word) < 19
        if not counted and not train.names:
            raise SplitError("ids must be whole numbers, separated by commas or one per line")
        if not counted or int(word) not in here:
            unknown.append(word)
            continue
        yield int(word)
    if unknown:
        near = f" ({found[0]} is)" if (found := difflib.get_close_matches(unknown[0], list(by_name)[:10_000], n=1)) else ""
        raise SplitError(printable(f"{len(unknown)} id(s) are not in the training data, the first is {unknown[0]}{near}"))


def _range(value: str, train: Examples, _: Path) -> Tensor:
    if train.y.ndim != 1 or not train.y.is_floating_point():
        raise SplitError(f"'range:{printable(value)}' takes records by a target that is a real number; classes are named as class:3")
    try:
        low, high = (float(v) for v in value.split(".."))
    except ValueError:
        raise SplitError(f"write a range as range:0..30, not '{value}'") from None
    return (train.y >= low) & (train.y <= high)


def _random(value: str, train: Examples, folder: Path) -> Tensor:
    share, _, seed = value.partition("@")
    try:
        n, generator = int(share) if share.isdigit() and int(share) > 1 else int(float(share) * len(train)), torch.Generator().manual_seed(int(seed or 0))
    except (ValueError, OverflowError):
        raise SplitError(f"write random:0.1, random:500 or random:0.1@7, not '{value}'") from None
    gone = torch.zeros(len(train), dtype=torch.bool)
    gone[torch.randperm(len(train), generator=generator)[: max(0, n)]] = True
    return gone
