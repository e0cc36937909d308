"""The seal of report.json: `sha256` over everything else in it and, with a key, `hmac` over that digest, as patches have; and its one reader.

What is hashed is canonical JSON: strict, keys sorted, no spaces, ASCII. So a tool may lay the file out anew and the seal holds; no value may change. The seal
alone says that nothing was changed by accident, since anyone can seal; who must know who sealed it needs a key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import numbers
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.core.errors import ReportError, printable
from expunge.core.files import doubled

SEAL = ("sha256", "hmac")
MAX_BYTES = 1 << 28
"""Largest report that is read: 256 MiB."""


def strict(value: Any) -> Any:
    """The same structure with nan and infinities as None, tuples as lists, keys as text, NumPy scalars as numbers."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    return [strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def canonical(document: Mapping[str, Any]) -> str:
    """The document without its seal, in the one form that is hashed.

    >>> canonical({"b": 1.0, "a": [float("nan"), "é"], "sha256": "x"})
    '{"a":[null,"\\\\u00e9"],"b":1.0}'
    """
    rest = strict({k: v for k, v in document.items() if k not in SEAL})
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)


def seal(document: Mapping[str, Any], key: bytes | None = None) -> dict[str, str]:
    """{"sha256"} of the document and, with a key, {"hmac"}: what makes it a sealed one when put into it."""
    digest = hashlib.sha256(canonical(document).encode()).hexdigest()
    return {"sha256": digest} if key is None else {"sha256": digest, "hmac": _signature(key, digest)}


def _signature(key: bytes, digest: str) -> str:
    return hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()


def read(path: str | Path, key: bytes | None = None) -> dict[str, Any]:
    """The document of a sealed file. Raises ReportError for one that cannot be read, is too large, is cut, is no report, was changed, or, where a key is
    given, is not signed by it."""
    path = Path(path)
    name = printable(path.name)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ReportError(f"{name} is no file; name the report.json that was written")
        if found.st_size > MAX_BYTES:
            raise ReportError(f"{name} is larger than {MAX_BYTES} bytes, which no report is")
        content = path.read_bytes()
    except OSError as failed:
        raise ReportError(f"cannot read {name}: {failed.strerror or failed}") from None
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_never)
    except (ValueError, RecursionError) as failed:
        raise ReportError(f"{name} is no JSON, or was cut off: {printable(str(failed))}") from None
    if not isinstance(document, dict) or not isinstance(document.get("identity"), dict) or not _is_digest(document.get("sha256")):
        raise ReportError(f"{name} is JSON but no sealed report of expunge: it lacks identity or sha256")
    try:
        wanted = seal(document)["sha256"]
    except RecursionError:  # deeper than any report: JSON reads further down than `strict`
        wanted = ""
    if not hmac.compare_digest(wanted, document["sha256"]):
        raise ReportError(f"{name} was changed after it was written: its content does not match its seal")
    if key is not None and not (_is_digest(document.get("hmac")) and hmac.compare_digest(document["hmac"], _signature(key, wanted))):
        raise ReportError(f"{name} is not signed by this key")
    return document


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name stands twice: readers differ in which of two they take."""
    if name := doubled(pairs):
        raise ValueError(f"'{name}' stands twice in one object")
    return dict(pairs)


def _never(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
