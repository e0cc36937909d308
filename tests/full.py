"""A disk that is full, or read-only, from some write on."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextlib.contextmanager
def full(root: Path, n: int, code: int = errno.ENOSPC, once: bool = False) -> Iterator[list[str]]:
    """Inside, the n-th write of this process below `root` and all after it fail (0: none; `once`: that one alone): what is opened to be written, folders made,
    renames and links. Gives the names of all writes. What is opened on a full disk is there, empty, and takes no byte: it is /dev/full that is written to."""
    seen: list[str] = []
    opened, descriptor = io.open, os.open

    def fails(path) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)) or not Path(os.path.abspath(os.fsdecode(path))).is_relative_to(root):
            return False
        seen.append(os.path.relpath(os.fsdecode(path), root))
        return len(seen) == n if once else 0 < n <= len(seen)

    def refuse(path):
        raise OSError(code, os.strerror(code), os.fsdecode(path))

    def open_(file, mode="r", *rest, **options):
        if not set("wax+") & set(mode) or not fails(file):
            return opened(file, mode, *rest, **options)
        if code != errno.ENOSPC:
            refuse(file)
        opened(file, mode, *rest, **options).close()
        return opened("/dev/full", mode.replace("x", "w").replace("a", "w"), *rest, **options)

    def open_descriptor(path, flags, *rest, **options):
        if not flags & WRITING or flags & os.O_TMPFILE == os.O_TMPFILE or not fails(path):
            return descriptor(path, flags, *rest, **options)
        if code != errno.ENOSPC:
            refuse(path)
        os.close(descriptor(path, flags, *rest, **options))
        return descriptor("/dev/full", os.O_WRONLY)

    def watched(function, at: int):
        def called(*paths, **options):
            if fails(paths[at]):
                refuse(paths[at])
            return function(*paths, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)
        patch.setattr(os, "open", open_descriptor)
        for name, at in (("mkdir", 0), ("rename", 1), ("replace", 1), ("symlink", 1)):
            patch.setattr(os, name, watched(getattr(os, name), at))
        yield seen
