"""Numbers and text of a document as they are printed, whatever stands there: a document may lack anything."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeGuard

MISSING = "not measurable"
"""What stands for nan, infinities and values that are not numbers."""


def finite(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number with a finite value; a truth value is not a number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Three figures, thousands grouped; MISSING for what is not a finite number.

    >>> number(0.97), number(-0.0), number(54321.0), number(float("nan")), number(None)
    ('0.97', '0', '54,321', 'not measurable', 'not measurable')
    """
    if not finite(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"


def interval(row: Mapping[str, Any] | None) -> str:
    """Value, one-sided 95 % bounds and n of a row; "-" for a row that is not there. A count (no width, n of at most 1) is printed alone.

    >>> interval({"value": 0.97, "low": 0.95, "high": 0.98, "n": 500})
    '0.97 (0.95 to 0.98, n = 500)'
    >>> interval({"value": 0.97, "low": 0.95, "high": float("inf"), "n": 500})
    '0.97 (no interval, n = 500)'
    """
    if row is None:
        return "-"
    value, low, high, n = row.get("value"), row.get("low"), row.get("high"), row.get("n")
    if not finite(value):
        return MISSING
    if low == value == high and (n is None or n == 1):
        return number(value)
    span = f"{number(low)} to {number(high)}" if finite(low) and finite(high) else "no interval"
    return f"{number(value)} ({span}, n = {plain(n)})" if n is not None else f"{number(value)} ({span})"


def plain(value: Any) -> str:
    """One line of text: characters that do not print (line breaks, escape codes) become spaces, None becomes ""."""
    return "" if value is None else "".join(c if c.isprintable() else " " for c in str(value))


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list; empty for None and what is no list."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, (list, tuple)) else []


def texts(value: Any) -> list[str]:
    """The entries of a list as text; empty for None and what is no list."""
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else []
