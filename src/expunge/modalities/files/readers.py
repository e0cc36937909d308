"""Data from a short spec: `py:module:function`, `csv:file?target=column`, `parquet:file?target=column`, `images:folder`, `datasets:folder`,
`world:digits/train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from expunge.core.errors import DataError, first_line, suggest
from expunge.core.modality import MODALITIES
from expunge.modalities.examples import Examples
from expunge.modalities.files import feeding, images, objects, tables
from expunge.modalities.files.feeding import Feed
from expunge.modalities.files.models import call
from expunge.modalities.files.schema import Schema

KINDS: dict[str, tuple[str, ...]] = {
    "py": ("x", *tables.OPTIONS, *feeding.OPTIONS, "memory"),
    "csv": tables.OPTIONS,
    "parquet": tables.OPTIONS,
    "images": ("classes", *feeding.OPTIONS, "memory"),
    "datasets": ("x", "split", *tables.OPTIONS, *feeding.OPTIONS),
    "world": (),
}
"""Kind of data -> options that its spec takes after a question mark."""


def load(
    spec: Any, task: str, folder: Path | None = None, *, inside: bool = False, known: Schema | None = None, options: Mapping[str, str] | None = None,
    feed: Feed | None = None, classes: tuple[str, ...] = (),
) -> Examples:  # fmt: skip
    """Examples of a spec, or of a Python object (`objects.read`), with their schema.

    task      decides whether targets are labels or numbers
    inside    whether paths may not leave `folder`
    known     schema of the training data, which this is held to; None where this is the training data
    options   those of the command line; what the spec says itself after its question mark comes first
    feed      how the model wants pixels; classes: the names of its classes by number
    Raises DataError naming the column, row or file that cannot be read.
    """
    from expunge.core import files

    kind, _, rest = spec.partition(":") if isinstance(spec, str) else ("py", "", "the data")
    if kind not in KINDS or not rest:
        raise DataError(suggest("no kind of data", kind, KINDS))
    name, _, query = rest.partition("?")
    place = folder or Path.cwd()
    if query and kind != "world" and (place / rest).exists():
        name, query = rest, ""  # a file of that very name
    said = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := set(said) - set(KINDS[kind]):
        raise DataError(suggest(f"{kind} has no option", min(unknown), KINDS[kind]))
    mine = {n: v for n, v in {**(options or {}), **said}.items() if v}
    if odd := [n for n in mine if n not in KINDS[kind]]:
        raise DataError(f"--{'id-column' if odd[0] == 'id' else odd[0]} is not for {kind}: data, which takes {', '.join(KINDS[kind]) or 'no options'}")
    labelled = MODALITIES[task.replace("-", "_")].labelled
    fed = feeding.given(mine, feed or Feed()) if known is None or not known.feed else feeding.from_record(known.feed)
    if kind == "py":
        value = call(f"py:{name}", DataError, folder) if isinstance(spec, str) else spec
        return objects.read(value, mine, labelled, known, fed, classes, spec if isinstance(spec, str) else "the data")
    if kind == "world":
        return objects.read(_world(rest), mine, labelled, known)
    path = files.inside(name, place) if inside else place / name
    if not path.exists():
        raise DataError(f"no file or folder {name}")
    if kind == "images":
        if not labelled:
            raise DataError(f"image folders name classes; --task {task} has none: give the data as py:module:function")
        return images.read(path, mine, fed, known, classes, inside)
    if kind == "datasets":
        return objects.read(_disk(path, mine.pop("split", "")), mine, labelled, known, fed, classes, spec)
    return tables.read(kind, path, mine, labelled, known, classes)


def from_object(value: Any, task: str) -> Examples:
    """Examples of a Python object (`objects.read`), without options."""
    return objects.read(value, {}, MODALITIES[task].labelled)


def _disk(path: Path, part: str) -> Any:
    """What `save_to_disk` of Hugging Face's `datasets` wrote."""
    try:
        from datasets import Dataset, DatasetDict, load_from_disk
    except ImportError:
        raise DataError("datasets: needs the datasets library: pip install 'expunge[data]'") from None
    try:
        found: Any = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path.name} is no folder that save_to_disk wrote: {first_line(error)}") from None
    if isinstance(found, DatasetDict):
        if part not in found:
            raise DataError(suggest(f"name the part of {path.name}, as datasets:{path.name}?split=train; it has no part", part, found))
        return found[part]
    if part or not isinstance(found, Dataset):
        raise DataError(f"{path.name} has no parts to name with split=")
    return found


def _world(name: str) -> Examples:
    from expunge.modalities.worlds import world

    first, _, part = name.partition("/")
    if part not in ("train", "validation", "test", "plants"):
        raise DataError(f"write world:{first}/train, world:{first}/validation, world:{first}/test or world:{first}/plants")
    if (found := getattr(world(first), part)) is None:
        raise DataError(f"world {first} has no {part} of its own")
    return found
