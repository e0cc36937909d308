"""Tables: CSV and Parquet files, and columns by name from Python. Columns are known by their names, in the order of the training data."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.core.errors import DataError, first_line, printable, suggest
from expunge.modalities.examples import Examples
from expunge.modalities.files import schema as schemas
from expunge.modalities.files.schema import Schema

MAX_BYTES = 1 << 34
"""Largest data file that is read, and most bytes that its cells may take at 8 each: 16 GiB."""

MAX_UNPACKED = 1 << 30
"""Most bytes that a CSV file packed with gzip may hold: 1 GiB."""

ROWS = 20
"""Rows from which on a column that tells the class one to one is called a leak."""

COUNTED = {"id", "ids", "index", "idx", "uid", "uuid", "row", "rowid", "row_id", "record_id", "unnamed: 0", "__index_level_0__"}
"""Names of columns that number records."""

OPTIONS = ("target", "id", "ignore", "columns", "classes")
"""Options of tables: the target column, the column that names records, columns that are neither, and, instead of all others, those that are inputs."""


def read(kind: str, path: Path, options: Mapping[str, str], labelled: bool, known: Schema | None, classes: tuple[str, ...] = ()) -> Examples:
    """Examples of a CSV or Parquet file. Raises DataError naming column and row."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError(f"{kind} files need pyarrow: pip install 'expunge[data]'") from None
    if not path.is_file():
        raise DataError(f"{printable(path.name)} is no file")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
    table = _csv(path) if kind == "csv" else unpacked_parquet(path)
    try:
        names = table.column_names
    except UnicodeDecodeError:
        raise DataError(f"{path.name} has column names that are not in UTF-8") from None
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(printable(f"{path.name} has two columns named '{twice[0]}'"))
    return assembled({n: column(table.column(k), n, path.name) for k, n in enumerate(names)}, options, labelled, known, path.name, classes)


def _csv(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    with path.open("rb") as file:
        head = file.read(4)
    for magic, what in ((b"BZh", "bzip2"), (b"\xfd7zX", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip")):
        if head.startswith(magic):
            raise DataError(printable(f"{path.name} is packed with {what}; unpack it first"))
    try:
        if head.startswith(b"\x1f\x8b"):
            return csv.read_csv(pa.py_buffer(_unpacked(path)), parse_options=csv.ParseOptions(newlines_in_values=True))
        with pa.OSFile(str(path), "rb") as file:
            return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True))
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(printable(f"{path.name} cannot be read as csv: {first_line(error)}")) from None


def _unpacked(path: Path) -> bytes:
    """The content of a gzip file, at most MAX_UNPACKED bytes of it."""
    out, packed = io.BytesIO(), zlib.decompressobj(31)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            while piece:
                try:
                    out.write(packed.decompress(piece, MAX_UNPACKED - out.tell() + 1))
                except zlib.error as error:
                    raise DataError(printable(f"{path.name} is no whole gzip file ({error})")) from None
                if out.tell() > MAX_UNPACKED:
                    raise DataError(printable(f"{path.name} unpacks to more than {MAX_UNPACKED} bytes"))
                piece = packed.unconsumed_tail or packed.unused_data
                if packed.eof and piece:
                    packed = zlib.decompressobj(31)
    if not packed.eof:
        raise DataError(printable(f"{path.name} is no whole gzip file"))
    return out.getvalue()


def unpacked_parquet(path: Path) -> Any:
    """The Arrow table of a Parquet file. Raises DataError for one that cannot be read, or says that it holds more than MAX_BYTES."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            meta = file.metadata
            if (cells := meta.num_rows * meta.num_columns * 8) > MAX_BYTES:
                size = f"{meta.num_rows:,} rows of {meta.num_columns} columns, {cells:,} bytes"
                raise DataError(printable(f"{path.name} says that it holds {size}, above {MAX_BYTES:,}"))
            return file.read()
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(printable(f"{path.name} cannot be read as parquet: {first_line(error)}")) from None


def column(values: Any, name: str, what: str) -> np.ndarray:
    """An array of numbers or of str of an Arrow column. Raises DataError for an empty cell, naming its row, and for types that are neither."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    t = values.type
    if values.null_count:
        row = compute.index(values.is_null(), True).as_py()
        raise DataError(printable(f"column '{name}' of {what} is empty in row {row}"))
    if pa.types.is_boolean(t) or pa.types.is_integer(t) or pa.types.is_floating(t):
        return np.asarray(values.to_numpy())
    if pa.types.is_decimal(t):
        return np.asarray(values.cast(pa.float64()).to_numpy())
    if pa.types.is_string(t) or pa.types.is_large_string(t):
        try:
            return np.asarray(values.to_pylist(), dtype=object)
        except UnicodeDecodeError:
            raise DataError(printable(f"column '{name}' of {what} holds text that is not in UTF-8")) from None
    return np.asarray([str(t)] * len(values), dtype=object)


def assembled(
    columns: Mapping[str, np.ndarray], options: Mapping[str, str], labelled: bool, known: Schema | None, what: str, classes: tuple[str, ...] = ()
) -> Examples:
    """Examples of columns by name.

    Inputs are the numeric columns besides target, id and those to ignore, in the order of the training data (`known`) or, for that itself, of the columns.
    A column of a table that the training data lacks, or one that it has and this lacks, is a DataError; so is one that numbers records, or holds the target.
    """
    target = options.get("target") or (known.target if known else "")
    id_column = options.get("id") or (known.id if known else "")
    if target not in columns:
        unsaid = f"name the target column of {what}, as ?target=label; it has {', '.join(columns)}"
        raise DataError(printable(suggest(f"{what} has no target column", target, columns) if target else unsaid))
    ignored = [n for n in options.get("ignore", "").split(",") if n]
    if known is None:
        for name in (*ignored, *([id_column] if id_column else [])):
            if name not in columns:
                raise DataError(printable(suggest(f"{what} has no column", name, columns)))
    chosen = [n for n in options.get("columns", "").split(",") if n] or (list(known.columns) if known else [])
    if lacking := [n for n in chosen if n not in columns]:
        raise DataError(printable(suggest(f"{what} lacks the column", lacking[0], columns)))
    extra = [n for n in columns if n not in (target, id_column, *ignored, *chosen)]
    if known is not None and extra:
        raise DataError(printable(f"{what} has the column '{extra[0]}', which the training data lacks; --ignore {extra[0]} leaves it out"))
    features = chosen or extra
    if target in features or id_column in features:
        raise DataError(f"columns names '{target if target in features else id_column}', which is the {'target' if target in features else 'id'}")
    if not features:
        raise DataError(f"{what} has no column besides the target '{target}'")
    for name in (*features, target):
        _whole(columns[name], name, what, word=name == target)
    y, names_of = targets(columns[target], target, labelled, known.classes if known else None, classes, options.get("classes", ""), what)
    for name in features:
        values = columns[name]
        if not options.get("columns") and known is None and _counts(name, values):
            ways = f"--id-column {name} makes it their names, --ignore {name} leaves it out"
            raise DataError(printable(f"column '{name}' of {what} numbers the records and is no input: {ways}"))
        if _leaks(values, y.numpy(), labelled):
            raise DataError(printable(f"column '{name}' of {what} holds the target '{target}' (a leak): --ignore {name} leaves it out"))
    x = torch.from_numpy(np.stack([columns[n].astype(np.float32) for n in features], 1))
    ids, names = identified(columns.get(id_column), len(x), id_column, what)
    mine = Schema("table", (len(features),), names_of, tuple(features), target, id_column, range=(float(x.min()), float(x.max())) if len(x) else (0.0, 0.0))
    if known is not None:
        schemas.held(mine, known, what)
    return Examples(x, y, ids, names=names, schema=known or mine)


def _whole(values: np.ndarray, name: str, what: str, word: bool) -> None:
    """Raises DataError for a column that is not numeric (words are allowed in a target), or holds values that are not finite."""
    if values.dtype == object or values.dtype.kind not in "biuf":
        if not word or not all(isinstance(v, str) for v in values):
            raise DataError(printable(f"column '{name}' of {what} is not numeric; encode it first, or --ignore {name}"))
        return
    finite = np.isfinite(values.astype(np.float64))
    if not finite.all():
        raise DataError(printable(f"column '{name}' of {what} has an empty or non-finite value in row {int(np.argmin(finite))}"))
    beyond = np.abs(values.astype(np.float64)) > np.finfo(np.float32).max
    if beyond.any():
        raise DataError(printable(f"column '{name}' of {what} has a value beyond float32 in row {int(np.argmax(beyond))}"))


def targets(
    values: Any, name: str, labelled: bool, known: Sequence[str] | None, model: tuple[str, ...], how: str, what: str
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """(labels or real targets, names of classes by number). Words become numbers by `schema.ordered`; whole numbers stay what they are.

    known   names in the training data: none other may stand here; None for the training data itself
    model   names that the model brings
    Raises DataError for numbers that are no labels, and for names that the training data lacks.
    """
    array = np.asarray(values)
    worded = array.dtype.kind in "OUS"
    if worded and array.dtype.kind == "O":
        worded = all(isinstance(v, str) for v in array.ravel())
        if not worded:
            raise DataError(printable(f"target '{name}' of {what} mixes words and other values"))
    if not labelled:
        if worded:
            raise DataError(printable(f"target '{name}' of {what} holds words, and this kind of model has numbers"))
        return torch.from_numpy(np.array(array)).float(), ()
    if array.ndim != 1:
        raise DataError(printable(f"target '{name}' of {what} has the shape {array.shape}; one label per record is a list of N"))
    if not worded:
        whole = np.isfinite(array.astype(np.float64)) & (array.astype(np.float64) == np.floor(array.astype(np.float64)))
        if not whole.all():
            row = int(np.argmin(whole))
            raise DataError(printable(f"target '{name}' of {what} must hold whole numbers for classification; row {row} has {array[row]}"))
        if how and known is None:
            raise DataError(printable(f"--classes puts classes in order that are words; target '{name}' of {what} holds numbers, which stay what they are"))
        if known and any(k != str(i) for i, k in enumerate(known)) and not model:
            raise DataError(printable(f"target '{name}' of {what} holds numbers, that of the training data names: {schemas.listed(known)}"))
        if known and len(array) and not 0 <= array.min() <= array.max() < len(known):
            odd = int(array.max() if array.max() >= len(known) else array.min())
            raise DataError(printable(f"{what} has the class {odd}, which the training data lacks: it has {schemas.listed(known)}"))
        return torch.from_numpy(array.astype(np.int64)), tuple(known or model or numbered(array))
    words = [str(v) for v in array]
    if known is not None and (odd := sorted(set(words) - set(known), key=schemas.natural)):
        has = schemas.listed(known) or "numbers"
        raise DataError(printable(f"{what} has the class {odd[0]}, which the training data lacks: it has {has}"))
    numbers = tuple(known) if known is not None else schemas.ordered(words, model, how)
    place = {n: k for k, n in enumerate(numbers)}
    return torch.tensor([place[w] for w in words], dtype=torch.long), numbers


MOST = 10_000
"""Classes whose numbers a schema keeps, where they have no names."""


def numbered(labels: np.ndarray) -> tuple[str, ...]:
    """The numbers 0, 1, ... up to the largest label as names; nothing where labels are no such numbers."""
    fits = len(labels) and labels.min() >= 0 and labels.max() < MOST
    return tuple(str(k) for k in range(int(labels.max()) + 1)) if fits else ()


def _counts(name: str, values: np.ndarray) -> bool:
    """Whether a column numbers the records: by its name, or as 0, 1, 2, ... or 1, 2, 3, ... in order."""
    if name.strip().lower() in COUNTED or not name.strip():
        return len(np.unique(values)) == len(values)
    return len(values) >= ROWS and values.dtype.kind in "iu" and bool((np.diff(values.astype(np.int64)) == 1).all()) and int(values[0]) in (0, 1)


def _leaks(values: np.ndarray, y: np.ndarray, labelled: bool) -> bool:
    """Whether a column says the target: the same numbers, or of many labelled rows one value for each class and class for each value."""
    if len(y) < 2 or len(np.unique(y)) < 2:
        return False
    if np.array_equal(values.astype(np.float32), y.astype(np.float32)):
        return True
    if not labelled or len(y) < ROWS:
        return False
    pairs = {(float(a), int(b)) for a, b in zip(values, y, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def identified(values: Any, n: int, name: str, what: str) -> tuple[torch.Tensor, dict[int, str] | None]:
    """(ids, names by id or None): whole numbers are ids themselves, words are named beside 0, 1, ... Raises DataError for one that stands twice."""
    if values is None:
        return torch.arange(n), None
    array = np.asarray(values)
    unique, first = np.unique(array.astype(str), return_index=True)
    if len(unique) != n:
        row = sorted(set(range(n)) - set(first.tolist()))[0]
        raise DataError(printable(f"id column '{name}' of {what} names {array[row]} twice, again in row {row}"))
    if array.dtype.kind in "iu":
        if array.dtype.kind == "u" and n and int(array.max()) >= 1 << 63:
            raise DataError(f"id column '{name}' of {what} holds numbers above 2^63; make them words")
        return torch.from_numpy(array.astype(np.int64)), None
    if array.dtype.kind == "f":
        raise DataError(f"id column '{name}' of {what} holds real numbers; ids are whole numbers or words")
    return torch.arange(n), {k: str(v) for k, v in enumerate(array)}
