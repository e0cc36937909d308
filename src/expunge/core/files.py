"""Files: written whole or not at all, read only if they are what was written."""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from expunge.core.edits import raw
from expunge.core.errors import DataError, ExpungeError, PatchError


def write(path: str | Path, data: bytes | str, error: type[ExpungeError] = PatchError) -> Path:
    """Write a file whole or not at all: temporary file in the same folder, fsync, rename. Raises `error` when it cannot."""
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as why:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise error(f"cannot write {path.name}: {why.strerror or why}; nothing was left half-written") from None
    return path


def file_digest(body: str, tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        h.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        h.update(raw(tensors[name]))
    return h.hexdigest()


def verified(path: Path, entry: str, error: type[ExpungeError], broken: str, foreign: str, most: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(header, tensors) of a safetensors file whose header holds `entry` and the `sha256` of it and the tensors (`file_digest`).

    Raises `error` for a file that cannot be read, is larger than `most` bytes, is no safetensors (`broken` says what it is not), lacks these entries
    (`foreign`), or was changed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > most:
            raise error(f"{path.name} is larger than {most} bytes")
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except OSError as failed:
        raise error(f"cannot read {path.name}: {failed.strerror or failed}") from None
    except SafetensorError as failed:
        raise error(f"{path.name} {broken} ({failed})") from None
    if entry not in header or "sha256" not in header:
        raise error(f"{path.name} {foreign}")
    if not hmac.compare_digest(file_digest(header[entry], tensors), header["sha256"]):
        raise error(f"{path.name} was changed after it was written: its content does not match its checksum")
    return header, tensors


def inside(path: str, folder: Path) -> Path:
    """`path` under `folder`; raises DataError when it leaves it."""
    full = (folder / path).resolve()
    if not full.is_relative_to(folder.resolve()):
        raise DataError(f"path '{path}' leaves the folder {folder.name}")
    return full
