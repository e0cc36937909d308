"""Data as people have it in Python: arrays, data frames, torch and Hugging Face data sets, loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.errors import DataError, first_line, printable
from expunge.core.machine.devices import reseeded
from expunge.modalities.examples import Examples
from expunge.modalities.files import schema as schemas
from expunge.modalities.files.feeding import Feed, fed, from_record
from expunge.modalities.files.images import plain
from expunge.modalities.files.schema import Schema
from expunge.modalities.files.tables import assembled, identified, numbered, targets
from expunge.modalities.stored import Stored, fact, room

INPUTS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "features", "data")
TARGETS = ("y", "label", "labels", "target", "targets", "fine_label")
"""Names under which a record's input and target are looked for, where the options `x` and `target` do not say."""

WALKED = 64
"""Data sets that may wrap one another."""


def read(
    value: Any,
    options: Mapping[str, str],
    labelled: bool,
    known: Schema | None = None,
    feed: Feed | None = None,
    classes: tuple[str, ...] = (),
    what: str = "the data",
) -> Examples:
    """Examples of any of these: Examples; a pair (x, y) of arrays, tensors, lists, data frames and series; a mapping of columns, a data frame of pandas or
    polars, or a `datasets.Dataset` (with target=NAME, where one of TARGETS is not there); a map-style data set of pairs or mappings, as `TensorDataset` and
    `Subset`; a `DataLoader` in a fixed order. Where records of a `Subset` are read, ids are those of the data set beneath.

    Raises DataError, in one line, for data that streams, comes in another order each time, changes from one reading to the next, or is not understood.
    """
    if isinstance(value, Examples):
        return _described(value, labelled, known, what)
    feed = feed or Feed()
    if known is not None and known.feed:
        feed = from_record(known.feed)
    if isinstance(value, torch.utils.data.DataLoader):
        return _loaded(value, options, labelled, known, feed, classes, what)
    if isinstance(value, tuple) and len(value) == 2:
        return _paired(value[0], value[1], None, options, labelled, known, feed, classes, what)
    if (columns := _columns(value, what)) is not None:
        return _tabled(columns, value, options, labelled, known, feed, classes, what)
    if isinstance(value, torch.utils.data.TensorDataset):
        if len(value.tensors) != 2:
            raise DataError(f"{what} has {len(value.tensors)} tensors per record; two are understood, input and target")
        return _paired(*value.tensors, None, options, labelled, known, feed, classes, what)
    if not hasattr(value, "__getitem__") or not hasattr(value, "__len__"):
        raise DataError(
            f"{what} is a {type(value).__name__}, which can be read once and in order alone (streaming); records must be reached by number: "
            "load it whole (streaming=False, list(...)), or save it and name the folder"
        )
    return _mapped(value, options, labelled, known, feed, classes, what)


def _described(data: Examples, labelled: bool, known: Schema | None, what: str) -> Examples:
    """Examples with their schema, held to that of the training data."""
    if isinstance(data.x, Mapping) or not len(data):
        return data
    mine = data.schema or _schema(data.x, numbered(data.y.numpy()) if labelled and data.y.ndim == 1 else (), {}, None)
    if known is not None:
        schemas.held(mine, known, what)
    return replace(data, schema=known or mine)


def _schema(x: Tensor, names: tuple[str, ...], feed: Any, known: Schema | None, kind: str = "data") -> Schema:
    if isinstance(x, Stored):
        ends = min(f.low for f in x.facts), max(f.high for f in x.facts)
    else:
        ends = (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
    return Schema(kind, tuple(x.shape[1:]), names, depth=known.depth if known else "", feed=feed, range=ends)


def _paired(x: Any, y: Any, ids: Any, options: Any, labelled: bool, known: Schema | None, feed: Feed, classes: Any, what: str, names: Any = None) -> Examples:
    """Examples of inputs and targets, held to the schema."""
    if (columns := _columns(x, what)) is not None:
        one = np.asarray(_array(y, f"the targets of {what}"))
        named = {**columns, "target": one}
        if "target" in columns:
            raise DataError(f"{what} has an input named target beside its targets; rename it")
        return assembled(named, {**options, "target": "target"}, labelled, known, what, classes)
    inputs, used = _inputs(x, feed, what)
    labels = _array(y, f"the targets of {what}")
    if len(inputs) != len(labels):
        raise DataError(f"{what} has {len(inputs)} inputs and {len(labels)} targets")
    if not len(inputs):
        raise DataError(f"{what} holds no record")
    made, found = targets(labels, "y", labelled, known.classes if known else None, classes, options.get("classes", ""), what)
    mine = _schema(inputs, found, feed.record() if used else {}, known)
    if known is not None:
        schemas.held(mine, known, what)
    given, called = (ids, names) if ids is not None else (torch.arange(len(inputs)), names)
    return Examples(inputs, made, given, names=called, schema=known or mine)


def _array(values: Any, what: str) -> np.ndarray:
    """An array of labels, targets or ids in any form."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
        values = torch.stack([v.detach().cpu() for v in values]).numpy()
    try:
        found = np.asarray(values)
    except ValueError:
        raise DataError(f"{what} have several lengths") from None
    if found.dtype == object and not all(isinstance(v, str) for v in found.ravel()):
        try:
            found = found.astype(np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{what} are neither numbers nor words") from None
    return found


def _inputs(values: Any, feed: Feed, what: str) -> tuple[Tensor, bool]:
    """(N, ...) inputs; Pillow images are fed by `feed`, and the second says whether they were."""
    if isinstance(values, Stored):
        return values, False  # pyright: ignore[reportReturnType]
    first = values[0] if isinstance(values, (list, tuple)) and len(values) else None
    if first is not None and hasattr(first, "getbands"):
        rows, depth = [], ""
        for k, image in enumerate(values):
            image, peak, kind = plain(image, f"{k} of {what}")
            if depth and kind != depth and not feed.channels:
                raise DataError(f"image {k} of {what} is {kind}, the ones before are {depth}; bring all to one kind, or name channels")
            depth = kind
            rows.append(fed(image, peak, feed, f"{k} of {what}"))
            if rows[-1].shape != rows[0].shape:
                raise DataError(f"image {k} of {what} is {rows[-1].shape}, the others are {rows[0].shape}; name a size")
        return torch.from_numpy(np.stack(rows)), True
    try:
        if isinstance(first, Tensor):
            found = torch.stack([torch.as_tensor(v) for v in values])
        elif isinstance(values, Tensor):
            found = values
        else:
            found = torch.from_numpy(np.array(getattr(values, "to_numpy", lambda: values)()))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(printable(f"the inputs of {what} are no numbers of one shape: {first_line(error)}")) from None
    if found.dtype == torch.float64:
        found = found.float()
    if found.dtype == torch.uint8:
        raise DataError(f"the inputs of {what} are bytes (0 to 255), and nothing says how the model wants them; give floats, as it was trained on")
    return found.detach().cpu(), False


def _columns(value: Any, what: str) -> dict[str, Any] | None:
    """Columns by name of a data frame, a Hugging Face data set or a mapping; None where the value is none of these."""
    if isinstance(value, Mapping):
        if value and all(hasattr(v, "column_names") for v in value.values()):
            raise DataError(f"{what} has several parts ({', '.join(map(str, value))}); name one, as data['{next(iter(value))}']")
        return {str(k): v for k, v in value.items()}
    if isinstance(getattr(value, "column_names", None), list) and hasattr(value, "features"):
        if not hasattr(value, "__len__"):
            raise DataError(f"{what} streams; load it whole (streaming=False), or save it with save_to_disk and name datasets:FOLDER")
        return {n: value[n] for n in value.column_names}
    if hasattr(value, "columns") and hasattr(value, "to_numpy") and hasattr(value, "__getitem__"):
        if hasattr(value, "collect_schema") and not hasattr(value, "height"):
            raise DataError(f"{what} is lazy; collect() it first")
        names = [str(n) for n in value.columns]
        if twice := [n for n in names if names.count(n) > 1]:
            raise DataError(printable(f"{what} has two columns named '{twice[0]}'"))
        return {str(n): value[n] for n in value.columns}
    return None


def _tabled(columns: dict[str, Any], value: Any, options: Any, labelled: bool, known: Schema | None, feed: Feed, classes: Any, what: str) -> Examples:
    """Examples of columns: of a table of numbers, or of one column of inputs and one of targets."""
    target = options.get("target") or (known.target if known and known.target else "") or _one(columns, TARGETS, "target", what)
    if target not in columns:
        raise DataError(printable(schemas.suggest(f"{what} has no target column", target, columns)))
    feature = getattr(value, "features", {}).get(target) if hasattr(value, "column_names") else None
    model = classes or tuple(getattr(feature, "names", None) or ())
    named = options.get("x") or ((known is None or known.kind == "data") and next((n for n in INPUTS if n in columns and _nested(columns[n])), ""))
    if named:
        rest = [n for n in columns if n not in (named, target, options.get("id", ""), *options.get("ignore", "").split(","))]
        if rest and not options.get("x"):
            raise DataError(printable(f"{what} has the column '{rest[0]}' besides '{named}' and '{target}'; ignore={rest[0]} leaves it out"))
        inputs = columns[named]
        ids, names = identified(None if not options.get("id") else _array(columns[options["id"]], "ids"), len(inputs), options.get("id", ""), what)
        labels = _array(columns[target], "targets")
        if classes and getattr(feature, "names", None) and labels.dtype.kind in "iu":
            labels = np.asarray([feature.names[k] for k in labels], dtype=object)
        rows = inputs if isinstance(inputs, (Tensor, np.ndarray)) else list(inputs)
        return _paired(rows, labels, ids, options, labelled, known, feed, model, what, names)
    arrays = {n: _array(v, f"column '{n}' of {what}") for n, v in columns.items()}
    return assembled(arrays, {**options, "target": target}, labelled, known, what, model)


def _nested(values: Any) -> bool:
    """Whether a column holds more than a number per record."""
    if isinstance(values, (Tensor, np.ndarray)):
        return values.ndim > 1
    first = values[0] if len(values) else None
    return hasattr(first, "getbands") or isinstance(first, (list, Tensor)) or (isinstance(first, np.ndarray) and first.ndim > 0)


def _one(found: Mapping[str, Any], known: Sequence[str], option: str, what: str) -> str:
    """The one name of `known` that is there. Raises DataError where it is none or several."""
    there = [n for n in known if n in found]
    if len(there) != 1:
        raise DataError(printable(f"{what} has {', '.join(map(str, found))}: say which is the {'target' if option == 'target' else 'input'}, as {option}=NAME"))
    return there[0]


def _loaded(loader: Any, options: Any, labelled: bool, known: Schema | None, feed: Feed, classes: Any, what: str) -> Examples:
    """Examples of a loader's data set where it only puts batches together; of its batches where it does more with them."""
    from torch.utils.data import IterableDataset, SequentialSampler, default_collate

    if isinstance(loader.dataset, IterableDataset):
        raise DataError(f"{what} is a loader of a data set that streams; records must be reached by number")
    if loader.collate_fn is default_collate and type(loader.sampler).__name__ in ("SequentialSampler", "RandomSampler") and not loader.drop_last:
        return read(loader.dataset, options, labelled, known, feed, classes, what)
    if not isinstance(loader.sampler, SequentialSampler) or loader.drop_last:
        why = "draws another order each time, or drops records; make it with shuffle=False and drop_last=False, or give its data set"
        raise DataError(f"{what} is a loader that {why}")
    pairs = [_pair(batch, options, what) for batch in loader]
    x, y = ([_row(p[k]) for p in pairs] for k in (0, 1))
    return _paired(torch.cat(x), np.concatenate([_array(v, "targets") for v in y]), None, options, labelled, known, feed, classes, what)


def _row(value: Any) -> Any:
    return value if isinstance(value, (Tensor, list, tuple)) else torch.as_tensor(np.asarray(value))


def _pair(item: Any, options: Any, what: str) -> tuple[Any, Any]:
    """(input, target) of one record or batch. Raises DataError for one that is neither a pair nor a mapping with one input and one target."""
    if isinstance(item, Mapping):
        return item[options.get("x") or _one(item, INPUTS, "x", what)], item[options.get("target") or _one(item, TARGETS, "target", what)]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    raise DataError(f"a record of {what} is {type(item).__name__}{size}; it must be a pair (input, target) or a mapping")


def _mapped(value: Any, options: Any, labelled: bool, known: Schema | None, feed: Feed, classes: Any, what: str) -> Examples:
    """Examples of a map-style data set, each record read once, in order."""
    if not len(value):
        raise DataError(f"{what} holds no record")
    with reseeded():
        first, again = (_pair(value[0], options, what) for _ in range(2))
    if not _same(first[0], again[0]):
        raise DataError(f"record 0 of {what} is another each time it is read (random augmentation?); give the data set without random transforms")
    one = _inputs([first[0]], feed, what)[0]
    if len(value) * one.nbytes > room(options.get("memory", "")):
        x, y = _stored(value, options, feed, what, one)
    else:
        pairs = [_pair(value[k], options, what) for k in range(len(value))]
        x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    ids, base = _beneath(value)
    names = getattr(base, "classes", None)
    brought = tuple(map(str, names)) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else ()
    labels = _array([v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for v in y], f"the targets of {what}")
    if classes and brought and known is None and labels.dtype.kind in "iu":
        labels = np.asarray([brought[int(k)] for k in labels], dtype=object)
    files = getattr(base, "samples", None)
    called = {int(i): str(files[int(i)][0]) for i in ids} if isinstance(files, list) and files and isinstance(files[0], tuple) else None
    return _paired(x, labels, ids, options, labelled, known, feed, classes or brought, what, called)


def _stored(value: Any, options: Any, feed: Feed, what: str, one: Tensor) -> tuple[Stored, list[Any]]:
    """(inputs of a map-style data set that are read as they are needed, its targets), each record read once."""

    def fetch(k: int) -> Tensor:
        return _inputs([_pair(value[k], options, what)[0]], feed, f"record {k} of {what}")[0][0]

    facts, y = [], []
    for k in range(len(value)):
        given, target = _pair(value[k], options, what)
        x = _inputs([given], feed, f"record {k} of {what}")[0][0]
        if x.shape != one.shape[1:]:
            raise DataError(f"record {k} of {what} is {tuple(x.shape)}, the first is {tuple(one.shape[1:])}")
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise DataError(f"record {k} of {what} holds inputs that are not finite")
        y.append(target)
        label = target if isinstance(target, Tensor) else torch.as_tensor(target) if isinstance(target, (int, float)) else torch.tensor(float("nan"))
        facts.append(fact(x, label if label.ndim == 0 else torch.tensor(float("nan"))))
    return Stored(fetch, torch.arange(len(value)), tuple(one.shape[1:]), one.dtype, facts), y


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))
    except TypeError:
        return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def _beneath(value: Any) -> tuple[Tensor, Any]:
    """(positions in the data set beneath all subsets, that data set)."""
    ids = torch.arange(len(value))
    for _ in range(WALKED):
        if not isinstance(value, torch.utils.data.Subset):
            break
        ids, value = torch.as_tensor(list(value.indices), dtype=torch.long)[ids], value.dataset
    return ids, value
