"""What a run says of itself, by Python's `logging` under the name `expunge`: INFO when something ended (a run, a check, a verdict), DEBUG when it begins.

    logging.getLogger("expunge").setLevel("INFO")     in one's own program, beside a handler
    with kept("out"): ...                             or as a file, out/run.log, as the command line and recipes have it

Messages hold names of methods, checks, settings and outcomes, numbers and versions. Whatever may say who or what is forgotten (words of a request, records,
values that are text, paths, reasons, messages of exceptions) is never in one.
"""

from __future__ import annotations

import logging
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.core.errors import DataError, SettingError, SplitError

NAME = "run.log"
MISTAKES = (DataError, SettingError, SplitError)
"""What was asked cannot be done: nothing is left of such a run."""
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Stream:
    """What a handler of `logging` writes to: a function that is called with each line."""

    say: Callable[[str], None]

    def write(self, text: str) -> None:
        self.say(text.rstrip("\n"))

    def flush(self) -> None:
        pass


@contextmanager
def heard(say: Callable[[str], None], level: int = logging.INFO, form: str = "%(message)s") -> Iterator[None]:
    """Inside, `say` is called with each message of at least this level that this thread logs under `expunge`; messages of other threads are of other runs."""
    logger, mine = logging.getLogger("expunge"), threading.get_ident()
    handler, before, up = logging.StreamHandler(Stream(say)), logger.level, logger.propagate
    upwards = logging.Handler(logger.getEffectiveLevel())
    upwards.emit = lambda record: logger.parent.callHandlers(record) if logger.parent is not None else None
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(form))
    handler.addFilter(lambda record: record.thread == mine)
    if up:  # handlers of the program's own are told what they would have been told without this one
        logger.addHandler(upwards)
        logger.propagate = False
    logger.addHandler(handler)
    logger.setLevel(min(level, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.removeHandler(upwards)
        logger.setLevel(before)
        logger.propagate = up


@contextmanager
def kept(folder: Path | str) -> Iterator[Callable[[Path | str], None]]:
    """Inside, what this thread logs goes to `run.log` in the folder, line by line, over that of the run before; gives a function that moves it to the folder
    of the run once there is one, where it goes on. What is left in `folder` is of a run that did not end.

    The file is made with the first line, so that a run that was refused before it began leaves what was there, and goes with MISTAKES that are found later.
    One that cannot be written is warned of once, and the run goes on.
    """
    from expunge import __version__

    path, lines = Path(folder) / NAME, 0

    def say(line: str) -> None:
        nonlocal lines
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if lines else "w", encoding="utf-8") as f:
                if not lines:
                    f.write(f"expunge {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}\n")
                f.write(f"{line}\n")
        except OSError as error:
            lost(error)
        lines += 1 if lines >= 0 else 0

    def lost(error: OSError) -> None:
        nonlocal lines
        if lines >= 0:
            warnings.warn(f"cannot write {path.name}: {error.strerror}; the run goes on without", stacklevel=3)
        lines = -2

    def settle(run: Path | str) -> None:
        nonlocal path
        if lines > 0:
            try:
                path = path.replace(Path(run) / NAME)
            except OSError as error:
                lost(error)

    with heard(say, form=LINE):
        try:
            yield settle
        except BaseException as error:
            if lines > 0:
                logging.getLogger(__name__).info("ended by %s", type(error).__name__)
            if lines > 0 and isinstance(error, MISTAKES):
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    path.parent.rmdir()  # where nothing else is in it
            raise


def told(settings: Mapping[str, Any]) -> str:
    """Settings with their numbers; text, which may name what is forgotten, is left out.

    >>> told({"keep": 0.5, "soft": False, "concept": "Ada", "steps": 3})
    'keep=0.5 soft=False concept=... steps=3'
    """
    return " ".join(f"{n}={v if isinstance(v, (bool, int, float)) else '...'}" for n, v in settings.items())
