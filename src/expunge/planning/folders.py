"""Folders of runs: each run in one of its own, made under a temporary name and renamed into place when it is complete. Nothing of another run is in it.

out/2026-12-01_03-17-32/     report.html, report.json, patch.safetensors, released, candidate
out/latest                   a relative link to the newest; where links cannot be made, a text file that holds its name
out/checkpoints              what runs go on from, kept across runs
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expunge.core.errors import DataError
from expunge.core.files import alive

LATEST = "latest"


@dataclass(frozen=True)
class Run:
    """A run's folder: `made` is where it is written, `place` where it stands once complete."""

    made: Path
    place: Path


def fit(out: Path | str, size: int = 0) -> Path:
    """`out` as a path, found fit to take a run's folder: it is none yet or a folder, may be written to, and has `size` bytes left. Nothing is left behind.

    Raises DataError that says what is wrong, so that a run of hours does not end in it.
    """
    if "\0" in str(out):
        raise DataError("--out holds a character that no path can")
    out = Path(out)
    there = next(p for p in (out, *out.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise DataError(f"--out {out}: {there} is no folder; name another")
    latest = out / LATEST
    if latest.is_dir() and not latest.is_symlink():
        raise DataError(f"--out {out} holds a folder called {LATEST}, which is the name of the link to the newest run; name another folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise DataError(f"--out {out} cannot be written to: {error.strerror or error}") from None
    if free < size:
        raise DataError(f"--out {out} has {free:,} bytes left, and {size:,} are needed")
    return out


@contextlib.contextmanager
def fresh(out: Path | str) -> Iterator[Run]:
    """A new folder in `out`, complete or not there: at the end it stands under its name and `latest` points to it; after an exception nothing is left.
    What killed runs of this machine left half-made is taken away first. Raises DataError where it cannot be written, which `errors.unwritten` tells; where
    `latest` alone cannot, the folder stands, and the message says so."""
    out = fit(out)
    began = [p for p in (out, *out.parents) if not p.exists()]
    name = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d_%H-%M-%S}"
    made = out / f".{name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _swept(out)
        made.mkdir()
        k, place = 1, out / name
        while place.exists():
            k, place = k + 1, out / f"{name}-{k + 1}"
        yield Run(made, place)
        while True:
            try:
                made.rename(place)
                break
            except OSError:
                if not place.exists():
                    raise
                k, place = k + 1, out / f"{name}-{k + 1}"
        _point(out, place.name)
    except OSError as error:
        raise DataError(f"cannot write the folder of a run in {out}: {error.strerror or error}; nothing was left half-written") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        for folder in began:
            with contextlib.suppress(OSError):
                folder.rmdir()


def newest(out: Path | str) -> Path:
    """The folder of the newest run in `out`. Raises DataError where there is none."""
    latest = Path(out) / LATEST
    place = latest.resolve() if latest.is_dir() else Path(out) / latest.read_text(encoding="utf-8").strip() if latest.is_file() else latest
    if not place.is_dir() or place.parent.resolve() != Path(out).resolve():
        raise DataError(f"{out} holds no finished run")
    return place


def _point(out: Path, name: str) -> None:
    made = out / f".{LATEST}.{os.getpid()}.tmp"
    try:
        made.unlink(missing_ok=True)
        try:
            made.symlink_to(name, target_is_directory=True)
        except OSError:
            made.write_text(f"{name}\n", encoding="utf-8")
        os.replace(made, out / LATEST)
    except OSError as error:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
        raise DataError(f"the run is complete in {out / name}, but {out / LATEST} cannot be made to point to it: {error.strerror or error}") from error


def _swept(out: Path) -> None:
    for left in out.glob(f".*.{socket.gethostname()}.*.tmp"):
        number = left.name.split(".")[-2]
        if left.is_dir() and number.isdecimal() and int(number) != os.getpid() and not alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
