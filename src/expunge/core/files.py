"""Files: written whole or not at all, read only if they are what was written."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge.core.edits import raw
from expunge.core.errors import DataError, ExpungeError, ModelError, PatchError, first_line


def write(path: str | Path, data: bytes | str, error: type[ExpungeError] = PatchError) -> Path:
    """Write a file whole or not at all: temporary file in the same folder, fsync, rename. Raises `error` when it cannot, which `errors.unwritten` tells."""
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        swept(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_mine(path.name), suffix=".tmp")
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
        raise error(f"cannot write {path.name}: {why.strerror or why}; nothing was left half-written") from why
    return path


@contextlib.contextmanager
def whole(out: Path | str, over: bool = False) -> Iterator[Path]:
    """A place beside `out`, not there yet, that is renamed to `out` when all went well, else taken away: a folder is written whole or not at all.

    over    whether a folder of that name gives way, if it holds no file that the new one does not; else only an empty one does
    Raises ModelError for one that holds anything else, and where it cannot be written, which `errors.unwritten` tells.
    """
    from safetensors import SafetensorError

    out, place = Path(out), None
    if not over and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out.name} is there already: name a folder that is not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        swept(out.parent)
        place = Path(tempfile.mkdtemp(dir=out.parent, prefix=_mine(out.name), suffix=".tmp"))
        made, old = place / "made", place / "old"
        yield made
        if out.exists():
            if foreign := sorted(_files(out) - _files(made)):
                raise ModelError(f"{out.name} holds {foreign[0]}, which is no part of a model: name a folder that is not there, as {out.name}/model")
            out.rename(old)
        try:
            made.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    except (OSError, SafetensorError) as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # so does the writer of safetensors tell of a full disk
        why = error if isinstance(error, OSError) else OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
        if why is None:
            raise
        raise ModelError(f"cannot write {out.name}: {why.strerror or why}; nothing was left half-written") from why
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def together(*paths: Path | str) -> Iterator[list[Path]]:
    """Places of files beside `paths`, renamed to them when all were written, else taken away. Raises PatchError where that fails."""
    targets, done = [Path(p) for p in paths], []
    made = [p.with_name(f"{_mine(p.name)}{k}.tmp") for k, p in enumerate(targets)]
    try:
        yield made
        for a, b in zip(made, targets, strict=True):
            there = b.exists()
            os.replace(a, b)
            done += [] if there else [b]
    except OSError as why:
        for path in done:
            path.unlink(missing_ok=True)
        raise PatchError(f"cannot write {targets[0].name}: {why.strerror or why}; nothing was left half-written") from why
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _mine(name: str) -> str:
    """How a temporary file or folder of this process begins, by which `swept` knows it."""
    return f".{name}.@{socket.gethostname()}.{os.getpid()}-"


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} if folder.is_dir() else {folder.name}


def swept(folder: Path) -> list[str]:
    """Remove temporary files and folders whose process is gone: what killed writes of this machine left, which may hold weights. Returns their names."""
    gone = []
    for entry in os.scandir(folder):
        found = re.fullmatch(r"\..+?(?:\.@(.+))?\.(\d{1,9})-[^.-]+\.tmp", entry.name) if entry.name.endswith(".tmp") else None
        if found and found[1] in (None, socket.gethostname()) and not alive(int(found[2])):
            with contextlib.suppress(OSError):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
                gone.append(entry.name)
    return gone


def alive(process: int) -> bool:
    """Whether a process of this machine runs; where that cannot be asked without harm, it is taken to."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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


def seal(what: str, tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of tensors with what they are and the checksum of it all, for `unsealed`."""
    from safetensors.torch import save

    plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    return save(plain, {"expunge": what, "sha256": file_digest(what, plain)})


def unsealed(path: Path, what: str, error: type[ExpungeError], instead: str, most: int = 1 << 36) -> dict[str, Tensor]:
    """The tensors of a file that `seal` made of `what`. Raises `error`, with what to do `instead`, for one that is damaged, changed, foreign or of another
    kind."""
    header, tensors = verified(path, "expunge", error, f"is no safetensors file, or is damaged; {instead}", f"holds no {what} of expunge; {instead}", most)
    if header["expunge"] != what:
        raise error(f"{path.name} holds {header['expunge'][:80]}, not {what}; {instead}")
    return tensors


def seal_json(doc: Mapping[str, Any]) -> str:
    """The document with its checksum, as JSON for `unsealed_json`."""
    body = json.dumps(dict(doc), indent=1, sort_keys=True)
    return json.dumps({**doc, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True)


def unsealed_json(path: Path, error: type[ExpungeError], broken: str, most: int = 1 << 28) -> dict[str, Any]:
    """The document of a file that `seal_json` made. Raises `error` for one that cannot be read, is larger than `most` bytes, is none (`broken`), or was
    changed."""
    try:
        if path.stat().st_size > most:
            raise error(f"{path.name} is larger than {most} bytes")
        doc = json.loads(path.read_text(encoding="utf-8"))
        seal = doc.pop("sha256")
        found = hashlib.sha256(json.dumps(doc, indent=1, sort_keys=True).encode()).hexdigest()
    except OSError as why:
        raise error(f"cannot read {path.name}: {why.strerror or why}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as why:
        raise error(f"{path.name} {broken} ({type(why).__name__})") from None
    if not isinstance(seal, str) or not hmac.compare_digest(seal.encode(), found.encode()):
        raise error(f"{path.name} was changed after it was written: its content does not match its checksum")
    return doc


def json_object(path: Path, error: type[ExpungeError], most: int = 1 << 24) -> dict[str, Any]:
    """The JSON object of a file that another library wrote. Raises `error` for one that cannot be read, is larger than `most` bytes, or holds none."""
    try:
        if path.stat().st_size > most:
            raise error(f"{path.name} of {path.parent.name} is larger than {most} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as why:
        raise error(f"cannot read {path.name} of {path.parent.name}: {why.strerror or why}") from None
    except RecursionError:
        raise error(f"cannot read {path.name} of {path.parent.name}: it is nested too deeply") from None
    except ValueError as why:
        if isinstance(why, error):
            raise
        raise error(f"cannot read {path.name} of {path.parent.name}: {first_line(why)}") from None
    if not isinstance(found, dict):
        raise error(f"{path.name} of {path.parent.name} is no JSON object")
    return found


def doubled(pairs: Sequence[tuple[str, Any]]) -> str:
    """The first name that stands twice in an object of JSON, of which readers differ in the value that they take; "" where none does.

    >>> doubled([("a", 1), ("b", 2), ("a", 3)])
    'a'
    """
    names = [name for name, _ in pairs]
    return next((name for name in names if names.count(name) > 1), "") if len(set(names)) < len(names) else ""


def inside(path: str, folder: Path) -> Path:
    """`path` under `folder`; raises DataError when it leaves it."""
    full = (folder / path).resolve()
    if not full.is_relative_to(folder.resolve()):
        raise DataError(f"path '{path}' leaves the folder {folder.name}")
    return full
