"""Image folders: one folder per class, numbered in natural order, each file read at its own depth and fed as the model wants."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.core.errors import DataError, printable
from expunge.modalities.examples import Examples
from expunge.modalities.files import index
from expunge.modalities.files import schema as schemas
from expunge.modalities.files.feeding import Feed, fed, from_record
from expunge.modalities.files.schema import Schema, natural
from expunge.modalities.stored import Stored, room

LITTER = {"thumbs.db", "desktop.ini"}
"""Files that systems leave in folders; those whose name begins with a dot are passed over, too."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""How names of image files end that are looked for outside the folders of classes."""

PARTS = {"train", "training", "test", "val", "valid", "validation", "eval"}
"""Folder names that are parts of a data set, not classes."""


def read(path: Path, options: Mapping[str, str], feed: Feed, known: Schema | None, classes: tuple[str, ...] = (), inside: bool = False) -> Examples:
    """Examples of an image folder: ids 0, 1, ... in natural order of class and file, `names` class/file.

    known     schema of the training data, whose class numbers and depth are kept
    classes   the model's own class names by number
    inside    whether links may not lead out of the folder
    Raises DataError naming the file or folder that cannot be read rightly.
    """
    if not path.is_dir():
        raise DataError(f"{path.name} is no folder; images: takes one that holds a folder of images per class")
    folders = sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: natural(p.name))
    if loose := [p.name for p in sorted(path.iterdir()) if p.is_file() and p.suffix.lower() in PICTURES]:
        raise DataError(printable(f"image {loose[0]} stands in {path.name} itself, in no class's folder"))
    if folders and {p.name.lower() for p in folders} <= PARTS:
        said = ", ".join(p.name for p in folders)
        raise DataError(f"{path.name} holds {said}, which are parts and no classes; name one of them, as images:{path.name}/{folders[0].name}")
    found = {p.name: _files(p, path, inside) for p in folders}
    full = [name for name, files in found.items() if files]
    if not full:
        raise DataError(f"{path.name} must hold one folder of images per class")
    if known is not None:
        numbers = known.classes
        if odd := [name for name in full if name not in numbers]:
            raise DataError(printable(f"{path.name} has the class {odd[0]}, which the training data lacks: it has {schemas.listed(numbers)}"))
    else:
        numbers = schemas.ordered(found, classes, options.get("classes", ""))
    label = {name: k for k, name in enumerate(numbers)}
    if known is not None and known.feed:
        feed = from_record(known.feed)
    every = [(f"{name}/{file.relative_to(path / name).as_posix()}", file, label[name]) for name, files in found.items() for file in files]
    depth = ""

    def one(said: str, file: Path) -> np.ndarray:
        """An image as the model wants it, of the depth and shape that the others have."""
        nonlocal depth
        image, peak, kind = opened(file, said)
        kind = kind if not feed.channels or image.mode == "F" else "8-bit"
        if depth and kind != depth:
            raise DataError(f"image {printable(said)} is {kind}, the ones before are {depth}; bring all to one kind, or name --channels 3 (or 1)")
        x = fed(image, peak, feed, printable(said))
        if depth and x.shape != first.shape:
            raise DataError(f"image {printable(said)} is {x.shape}, the others are {first.shape}; bring all to one size, or name --size")
        depth = kind
        return x

    first = one(*every[0][:2])
    y = torch.tensor([k for _, _, k in every])
    if len(every) * first.nbytes > room(options.get("memory", "")):
        facts, depth = index.read(path, every, one, {"feed": feed.record(), "shape": list(first.shape), "depth": depth})
        x: Any = Stored(index.fetched(every, one), torch.arange(len(every)), tuple(first.shape), torch.float32, facts)
        ends = min(f.low for f in facts), max(f.high for f in facts)
    else:
        inputs = np.empty((len(every), *first.shape), np.float32)
        for k, (said, file, _) in enumerate(every):
            inputs[k] = one(said, file)
        x = torch.from_numpy(inputs)
        ends = float(x.min()), float(x.max())
    mine = Schema("images", tuple(x.shape[1:]), tuple(numbers), depth=depth, feed=feed.record(), range=ends)
    if known is not None:
        schemas.held(mine, known, path.name)
    return Examples(x, y, torch.arange(len(every)), names={k: said for k, (said, _, _) in enumerate(every)}, schema=known or mine)


def _files(folder: Path, root: Path, inside: bool) -> list[Path]:
    """The files of a class, those in folders of it too, without hidden ones."""
    out = []
    for file in sorted(folder.rglob("*"), key=lambda p: natural(p.relative_to(folder).as_posix())):
        parts = file.relative_to(folder).parts
        if any(p.startswith(".") for p in parts) or parts[-1].lower() in LITTER or file.is_dir():
            continue
        if inside and not file.resolve().is_relative_to(root.resolve()):
            raise DataError(printable(f"image {folder.name}/{'/'.join(parts)} is a link that leaves the folder {root.name}"))
        out.append(file)
    return out


def opened(file: Path, said: str) -> tuple[Any, float, str]:
    """(image of mode L, RGB or F, value of white, depth in words). Raises DataError for pixels that would lose something when they are read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with file.open("rb") as raw:
                head = raw.read(26)
            with Image.open(file) as image:
                image.load()
                frames = getattr(image, "n_frames", 1)
                image = image.copy()
    except Exception:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise DataError(printable(f"image {said} cannot be read")) from None
    if frames > 1:
        raise DataError(printable(f"image {said} holds {frames} pictures; one file is one record"))
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[24] == 16 and head[25] != 0:
        raise DataError(printable(f"image {said} has 16 bits per colour, which would be cut to 8; save it with 8, or give the data as py:module:function"))
    return plain(image, said)


def plain(image: Any, said: str) -> tuple[Any, float, str]:
    """The same of a Pillow image that is loaded."""
    mode = image.mode
    if mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or mode == "PA" else "RGB")
    elif mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA" if mode == "RGB" else "LA")
    if image.mode in ("LA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(printable(f"image {said} is partly transparent; put it on a background first"))
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "RGB"):
        return image, 255.0, "8-bit grey" if image.mode == "L" else "8-bit RGB"
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.float32)), 65535.0, "16-bit grey"
    if image.mode == "F":
        low, high = image.getextrema()
        if not (0 <= low <= high <= 1):
            raise DataError(printable(f"image {said} holds real numbers from {low:.4g} to {high:.4g}; only 0 to 1 have a meaning as pixels: bring them there"))
        return image, 1.0, "float grey"
    raise DataError(printable(f"image {said} has pixels of mode {mode}, which would lose something when read; save it as 8-bit grey or RGB"))
