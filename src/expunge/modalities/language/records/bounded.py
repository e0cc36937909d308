"""Chat templates are programs that come with a model. They run in the sandbox of transformers, and here within limits of time, memory and output: one that
loops or grows ends in one line."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from expunge.core.errors import DataError

SECONDS = 10.0
"""Longest time that one rendering may take."""

MEMORY = 1 << 32
"""Most bytes that the process may grow by meanwhile, where the system can be told so (Linux): 4 GiB."""

LONGEST = 1 << 24
"""Longest text that a template may make, in characters."""


class _Late(BaseException):
    """The time is up: raised in the thread that renders, where no `except Exception` can hold it."""


def bounded(make: Callable[[], str], *, seconds: float = SECONDS, memory: int = MEMORY, longest: int = LONGEST) -> str:
    """What `make` gives. Raises DataError where it takes longer than `seconds`, needs more than `memory` bytes, or gives more than `longest` characters.

    The time is kept by a thread that raises an exception in this one at its next Python instruction; a single call into C is not cut short.
    """
    lock, state, me = threading.Lock(), {"done": False, "fired": False}, threading.get_ident()

    def late() -> None:
        with lock:
            if not state["done"]:
                state["fired"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), ctypes.py_object(_Late))

    def settle() -> None:
        with lock:
            state["done"] = True
        while state["fired"]:  # on its way to this thread: it must not arrive elsewhere
            time.sleep(0.001)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    try:
        timer.start()
        try:
            with _room(memory):
                found = make()
        except _Late:
            raise
        except BaseException:
            settle()
            raise
        settle()
    except _Late:
        raise DataError(f"the chat template took more than {seconds:g} seconds; use a template of your own") from None
    except MemoryError:
        raise DataError("the chat template needs more memory than it may take; use a template of your own") from None
    finally:
        timer.cancel()
    if len(found) > longest:
        raise DataError(f"the chat template made {len(found):,} characters of one record, more than {longest:,}; use a template of your own")
    return found


@contextlib.contextmanager
def _room(memory: int) -> Iterator[None]:
    """The process may grow by that many bytes and no more, where the system says how large it is."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + memory
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
