"""How pixels become what a model wants: size, crop, channels, mean and std, from options, a preprocessor_config.json, or a timm data config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.core.errors import DataError
from expunge.core.files import json_object

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's filters by timm's names."""

OPTIONS = ("mean", "std", "size", "channels")
"""Options that say how pixels are fed."""

HARMLESS = {"do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop"}
"""Steps of a preprocessor_config.json that are followed; another that it asks for is refused."""


@dataclass(frozen=True)
class Feed:
    """Pixels (H, W, C) -> inputs (C, h, w): resized, cropped in the middle, multiplied by `scale`, then (value - mean) / std.

    size      (height, width) that an image is resized to; (edge,) resizes its shorter side; () leaves it
    crop      (height, width) cut from the middle then, the smaller half of an odd rest above and to the left; () leaves it
    resample  Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic
    channels  3 turns grey into three equal channels, 1 colour into grey; 0 leaves what the files hold
    scale     for 8-bit pixels; those of 16 bits are brought to the same scale before, those of float files to that of 0..1
    mean, std per channel, or one for all
    source    where this was read, in words
    """

    size: tuple[int, ...] = ()
    crop: tuple[int, ...] = ()
    resample: int = 2
    channels: int = 0
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = "nothing: pixels are fed as 0 to 1, as large as they are"

    def record(self) -> dict[str, Any]:
        """The JSON-able mapping."""
        return json.loads(json.dumps(asdict(self)))

    def told(self) -> str:
        """One line for people."""
        if self.source == Feed.source:
            return f"preprocessing: {self.source} (else name --mean, --std, --size)"
        sized = "x".join(map(str, self.size)) if len(self.size) == 2 else f"shorter side {self.size[0]}" if self.size else "as it is"
        crop = f", middle {'x'.join(map(str, self.crop))}" if self.crop else ""
        return f"preprocessing by {self.source}: size {sized}{crop}, scale {self.scale:.6g}, mean {_few(self.mean) or 0}, std {_few(self.std) or 1}"


def from_record(found: Mapping[str, Any]) -> Feed:
    """The feed of a JSON-able mapping. Raises DataError where it is none."""
    try:
        made = Feed(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
        numbers = (*made.size, *made.crop, made.resample, made.channels, made.scale, *made.mean, *made.std)
        good = all(math.isfinite(v) for v in numbers) and min(made.std, default=1.0) > 0 and len(made.size) <= 2 and len(made.crop) in (0, 2)
    except TypeError:
        good, made = False, Feed()
    if not good or not all(isinstance(v, int) and 0 < v <= 1 << 14 for v in (*made.size, *made.crop)) or made.resample not in RESAMPLE.values():
        raise DataError("the schema's preprocessing is damaged")
    return made


def _few(values: Sequence[float]) -> str:
    return ",".join(f"{v:.4g}" for v in values)


def _numbers(name: str, given: str) -> tuple[float, ...]:
    try:
        found = tuple(float(v) for v in given.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(math.isfinite(v) for v in found) or len(found) not in (1, 3) or (name == "std" and min(found) <= 0):
        raise DataError(f"{name} must be one or three finite numbers{' above 0' if name == 'std' else ''}, as 0.5,0.5,0.5, not '{given}'")
    return found


def _sides(given: str) -> tuple[int, ...]:
    parts = given.split("x")
    if len(parts) > 2 or not all(p.isdigit() and p.isascii() and 0 < int(p[:9]) <= 1 << 14 and len(p) < 6 for p in parts):
        raise DataError(f"size must be 224 or HEIGHTxWIDTH, as 224x320, not '{given}'")
    return (int(parts[0]), int(parts[-1]))


def given(options: Mapping[str, str], beneath: Feed) -> Feed:
    """What options say, over what the model's files say; those alone where none is named. Raises DataError for values out of range."""
    named = {n: options[n] for n in OPTIONS if options.get(n)}
    if not named:
        return beneath
    if bool(named.get("mean")) != bool(named.get("std")):
        raise DataError("mean and std belong together: name both (--mean 0 --std 1 feeds 0 to 1)")
    change: dict[str, Any] = {n: _numbers(n, named[n]) for n in ("mean", "std") if n in named}
    if "size" in named:
        change.update(size=_sides(named["size"]), crop=())
    if "channels" in named:
        if named["channels"] not in ("1", "3"):
            raise DataError(f"channels must be 1 or 3, not '{named['channels']}'")
        change["channels"] = int(named["channels"])
    said = ", ".join(f"--{n}" for n in named)
    old = asdict(beneath)
    return Feed(**{**old, **change, "source": said if beneath.source == Feed.source else f"{said} over {beneath.source}"})


def wanted(model: nn.Module | None, folder: Path | None = None) -> Feed | None:
    """What a model's own files or configuration ask for: preprocessor_config.json beside it, or timm's `pretrained_cfg` (`default_cfg`) on it. None where
    neither is there. Raises DataError for a step that cannot be followed."""
    if folder is not None and (path := folder / "preprocessor_config.json").is_file():
        return hugging(json_object(path, DataError, 1 << 20), path.name)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return timm(config) if isinstance(config, Mapping) and "mean" in config else None


def hugging(found: Any, name: str = "preprocessor_config.json") -> Feed:
    """Of a preprocessor_config.json of transformers. Raises DataError for one that asks for a step that is not known here."""
    if not isinstance(found, dict):
        raise DataError(f"{name} holds no settings")
    if odd := sorted(k for k, v in found.items() if k.startswith("do_") and v and k not in HARMLESS):
        raise DataError(f"{name} asks for {odd[0]}, which is not followed here; give the data as py:module:function, preprocessed")
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    try:
        size = _size(found.get("size")) if found.get("do_resize", True) else ()
        crop = _size(found.get("crop_size"), both=True) if found.get("do_center_crop", False) else ()
        if kind.startswith("ConvNext") and len(size) == 1:
            edge = size[0]
            small = edge < 384
            size, crop = ((int(edge / float(found.get("crop_pct", 224 / 256))),), (edge, edge)) if small else ((edge, edge), ())
        elif "crop_pct" in found and found["crop_pct"] is not None:
            raise DataError(f"{name} asks for crop_pct, which is not followed here; give the data as py:module:function, preprocessed")
        scale = float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0
        norm = found.get("do_normalize", True)
        mean, std = (tuple(float(v) for v in found[k]) if norm else () for k in ("image_mean", "image_std"))
        made = Feed(size, crop, int(found.get("resample", 2)), 3 if found.get("do_convert_rgb") else 0, scale, mean, std, name)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} cannot be read: {error!r}") from None
    if not all(map(math.isfinite, (*mean, *std, scale))) or min(std, default=1.0) <= 0 or made.resample not in RESAMPLE.values():
        raise DataError(f"{name} holds values out of range")
    return made


def _size(found: Any, both: bool = False) -> tuple[int, ...]:
    """(height, width), or (edge,) for the shorter side. A lone number is a square."""
    if isinstance(found, int):
        found = {"height": found, "width": found}
    if isinstance(found, Mapping) and {"height", "width"} <= set(found):
        sides: tuple[int, ...] = (int(found["height"]), int(found["width"]))
    elif isinstance(found, Mapping) and set(found) == {"shortest_edge"} and not both:
        sides = (int(found["shortest_edge"]),)
    else:
        raise DataError(f"preprocessor_config.json has the size {found}, which is not followed here; name --size")
    if not all(0 < s <= 1 << 14 for s in sides):
        raise DataError(f"preprocessor_config.json has the size {found}, out of range")
    return sides


def timm(config: Mapping[str, Any]) -> Feed:
    """Of a timm data config: shorter side at size / crop_pct, middle cut (crop_mode center), bicubic or as it says. Raises DataError."""
    try:
        channels, height, width = (int(v) for v in config["input_size"])
        share, name = float(config.get("crop_pct") or 0.875), str(config.get("interpolation") or "bicubic")
        mean, std = (tuple(float(v) for v in config[k]) for k in ("mean", "std"))
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"the model's pretrained_cfg cannot be read: {error!r}") from None
    if name not in RESAMPLE or (config.get("crop_mode") or "center") != "center" or height != width or not 0 < share <= 1 or min(std) <= 0:
        raise DataError("the model's pretrained_cfg asks for a way of resizing that is not followed here; name --mean, --std and --size")
    kept = channels if channels in (1, 3) else 0
    return Feed((math.floor(height / share),), (height, width), RESAMPLE[name], kept, 1 / 255, mean, std, "the model's pretrained_cfg")


def fed(image: Any, peak: float, feed: Feed, name: str) -> np.ndarray:
    """(C, h, w) float32 of a Pillow image of mode L, RGB (peak 255), F or 16-bit grey (already mode F; `peak` is its white). Raises DataError naming `name`."""
    if feed.channels and len(image.getbands()) != feed.channels:
        if image.mode == "F":
            raise DataError(f"image {name} is grey of more than 8 bits and the model takes {feed.channels} channels; convert it first")
        image = image.convert("RGB" if feed.channels == 3 else "L")
    if feed.size:
        height, width = feed.size if len(feed.size) == 2 else _shorter(image.height, image.width, feed.size[0])
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), resample=feed.resample)
    array = np.asarray(image)
    if feed.crop:
        (height, width), (h, w) = feed.crop, array.shape[:2]
        if h < height or w < width:
            raise DataError(f"image {name} is {h} x {w}, smaller than the middle {height} x {width} that the model takes")
        top, left = (h - height) // 2, (w - width) // 2
        array = array[top : top + height, left : left + width]
    array = array if array.ndim == 3 else array[..., None]
    x = array.astype(np.float32) * np.float32(feed.scale * 255 / peak)
    if feed.mean:
        if len(feed.mean) not in (1, x.shape[2]) or len(feed.std) not in (1, x.shape[2]):
            raise DataError(f"image {name} has {x.shape[2]} channel(s), mean and std have {len(feed.mean)}; --channels {len(feed.mean)} converts")
        x = (x - np.asarray(feed.mean, np.float32)) / np.asarray(feed.std, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def _shorter(height: int, width: int, edge: int) -> tuple[int, int]:
    short, long = sorted((height, width))
    other = int(edge * long / short)
    return (edge, other) if height <= width else (other, edge)
