"""Data from a short spec: `py:module:function`, `csv:file?target=column`, `parquet:file?target=column`, `images:folder`, `world:digits/train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch

from expunge.core.errors import DataError, suggest
from expunge.modalities.examples import Examples
from expunge.modalities.files.models import call

MAX_BYTES = 1 << 34
"""Largest data file that is read: 16 GiB."""


def load(spec: str, task: str, folder: Path | None = None, *, inside: bool = False) -> Examples:
    """Examples with ids 0..N-1. `task` decides whether targets are labels or numbers. With `inside`, paths may not leave `folder`.

    Raises DataError naming the column, row or file that cannot be read.
    """
    from expunge.core import files

    kind, _, rest = spec.partition(":")
    if kind == "py":
        return from_object(call(spec, DataError, folder), task)
    if kind == "world":
        return _world(rest)
    readers = {"csv": _table, "parquet": _table, "images": _images}
    if kind not in readers or not rest:
        raise DataError(suggest("no kind of data", kind, ["py", "world", *readers]))
    name, _, query = rest.partition("?")
    place = folder or Path.cwd()
    path = files.inside(name, place) if inside else place / name
    if not path.exists():
        raise DataError(f"no file or folder {name}")
    return readers[kind](kind, path, dict(parse_qsl(query)), task)


def from_object(value: Any, task: str) -> Examples:
    """Examples from Examples, a pair (x, y) of arrays, or a data set of (x, y) pairs."""
    if isinstance(value, Examples):
        return value
    pair = value if isinstance(value, tuple) and len(value) == 2 else tuple(zip(*[value[i] for i in range(len(value))], strict=True))
    x = torch.stack([torch.as_tensor(v) for v in pair[0]]) if isinstance(pair[0], (tuple, list)) else torch.as_tensor(pair[0])
    y = torch.stack([torch.as_tensor(v) for v in pair[1]]) if isinstance(pair[1], (tuple, list)) else torch.as_tensor(pair[1])
    return Examples(x, y.long() if task == "classification" else y.float(), torch.arange(len(x)))


def _world(name: str) -> Examples:
    from expunge.modalities.worlds import world

    first, _, part = name.partition("/")
    if part not in ("train", "validation", "test", "plants"):
        raise DataError(f"write world:{first}/train, world:{first}/validation, world:{first}/test or world:{first}/plants")
    if (found := getattr(world(first), part)) is None:
        raise DataError(f"world {first} has no {part} of its own")
    return found


def _table(kind: str, path: Path, options: Mapping[str, str], task: str) -> Examples:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{kind} files need the datasets library: pip install 'expunge[data]'") from None
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
    if unknown := set(options) - {"target"}:
        raise DataError(suggest(f"{kind} has no option", min(unknown), ["target"]))
    import tempfile

    with tempfile.TemporaryDirectory() as cache, _no_bars():
        try:
            table = load_dataset(kind, data_files=str(path), split="train", cache_dir=cache).with_format("numpy")
        except Exception as error:
            raise DataError(f"{path.name} cannot be read as {kind}: {str(error).splitlines()[0]}") from None
        target = options.get("target", "")
        if target not in table.column_names:
            raise DataError(suggest(f"{path.name} has no target column", target, table.column_names))
        columns = {name: np.asarray(table[name]) for name in table.column_names}
    features = [name for name in columns if name != target]
    for name, values in columns.items():
        if not np.issubdtype(values.dtype, np.number) and values.dtype != bool:
            raise DataError(f"column '{name}' of {path.name} is not numeric; encode it first")
        if not np.isfinite(values.astype(np.float64)).all():
            raise DataError(f"column '{name}' of {path.name} has an empty or non-finite value in row {int(np.argmin(np.isfinite(values.astype(np.float64))))}")
    if not features:
        raise DataError(f"{path.name} has no column besides the target '{target}'")
    if task == "classification" and not np.array_equal(columns[target], columns[target].astype(np.int64)):
        raise DataError(f"target '{target}' of {path.name} must hold whole numbers for classification")
    x = np.stack([columns[name].astype(np.float32) for name in features], 1)
    return from_object((x, columns[target]), task)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of `datasets` on standard error, where an error is one line."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were:
            enable_progress_bars()


def _images(_: str, path: Path, options: Mapping[str, str], task: str) -> Examples:
    from PIL import Image, UnidentifiedImageError

    if options:
        raise DataError(f"images has no option '{min(options)}'; there are none")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir())
    files = [(f, k) for k, name in enumerate(classes) for f in sorted((path / name).iterdir()) if f.is_file()]
    if not files:
        raise DataError(f"{path.name} must hold one folder of images per class")
    pixels, labels = [], []
    for file, label in files:
        try:
            with Image.open(file) as image:
                array = np.asarray(image if image.mode == "L" else image.convert("RGB"))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            raise DataError(f"image {file.parent.name}/{file.name} cannot be read") from None
        if pixels and array.shape != pixels[0].shape:
            raise DataError(f"image {file.parent.name}/{file.name} is {array.shape}, the others are {pixels[0].shape}; bring all to one size")
        pixels.append(array)
        labels.append(label)
    x = torch.as_tensor(np.stack(pixels)).float() / 255
    return Examples(x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2), torch.tensor(labels), torch.arange(len(labels)))
