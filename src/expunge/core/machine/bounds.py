"""Ranges that hold everywhere: seeds, settings, and how long a run may take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from expunge.core.errors import SettingError

SEEDS = 1 << 32
"""Seeds lie below this: what NumPy's and PyTorch's generators both take, with room for the seeds that are made of it."""

LEAST = {"batch_size": 1, "epochs": 0, "steps": 0, "lr": 0, "lora": 0, "accumulate": 1, "trajectories": 0, "path": 1, "max_length": 0}
"""Settings of these names, whichever method has them, are at least this."""

OPEN = ("bound", "clip")
"""Settings that are limits, of which infinity means none."""

DAYS, MOST = 30, 1e10
"""A run that would take more days, or pass more examples, is refused, whatever ends it sooner: its batches alone would not fit into memory."""


def seed_of(seed: Any) -> int:
    """The seed, if it is a whole number from 0 to 2^32 - 1; raises SettingError else.

    >>> seed_of(3)
    3
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise SettingError(f"seed must be a whole number from 0 to {SEEDS - 1}, not {seed!r}")
    return seed


def number(name: str, value: Any, least: float, *, whole: bool = False) -> Any:
    """The value, if it is a finite number, a whole one where asked, of at least so much; raises SettingError else.

    >>> number("twins", 3, 0, whole=True)
    3
    """
    kind = "a whole number" if whole else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value) or value < least:
        raise SettingError(f"{name} must be {kind}, {least:g} or more, not {value!r}")
    return value


def size_of(name: str, value: Any) -> int:
    """Bytes, of a whole number or text such as 512M, 2G or 4 GiB (K, M, G, T: powers of 1024); 0 of 0 and "", which state none. Raises SettingError.

    >>> size_of("memory", "2G"), size_of("memory", 4096), size_of("memory", "")
    (2147483648, 4096, 0)
    """
    if value == "" or (value == 0 and type(value) is int):
        return 0
    found = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)i?B?", str(value).strip(), re.ASCII | re.IGNORECASE)
    size = 0 if found is None or isinstance(value, (bool, float)) else int(found[1]) << 10 * " KMGT".index(found[2].upper() or " ")
    if not 0 < size < 1 << 60:
        raise SettingError(f"{name} must be a size such as 4G or 512M, not {value!r}")
    return size


def ranged(what: str, name: str, value: Any, default: Any) -> Any:
    """The value of a setting, if it lies in its range; raises SettingError for NaN, for infinity where it is no limit (`OPEN`), and below `LEAST`."""
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and name not in OPEN)):
        raise SettingError(f"{what} must be a finite number, not {value}")
    if name in LEAST and not isinstance(value, (bool, str)) and value < min(LEAST[name], default):
        raise SettingError(f"{what} must be at least {LEAST[name]}, not {value:g}")
    return value


def affordable(method: str, settings: Mapping[str, Any], examples: float, seconds: float) -> None:
    """Raises SettingError, with the cost, for a run of so many examples at so many seconds each that would take more than DAYS days, or for more than MOST."""
    days = examples * seconds / 86400
    if days > DAYS or examples > MOST:
        long = f"{days / 365:.3g} years" if days > 730 else f"{days:.0f} days"
        named = ", ".join(f"{n}={settings[n]:g}" for n in ("epochs", "steps", "trajectories") if n in settings)
        raise SettingError(f"{method} with {named or 'these settings'} would pass {examples:.3g} examples, {long} or more at this model's speed here; "
                           f"the most are {DAYS} days and {MOST:.0e} examples: lower them")  # fmt: skip
