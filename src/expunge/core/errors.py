"""The exception tree.

ValueError
└── ExpungeError        every error that a user can mend: one line, says what was asked, what was found, what to do
    ├── SplitError      forget, retain, test or validation missing, empty, overlapping, or with labels out of range
    ├── ScopeError      no weight in scope, a name that does not exist, a frozen weight that was written to
    ├── SettingError    a method, check, rule or setting that does not exist or has a value out of range
    ├── DataError       a data file, folder or column that cannot be read as what it should be
    ├── ModelError      a model or weight file that cannot be loaded, or cannot be given fresh weights
    ├── PatchError      a patch that is damaged, signed by another key, or made for another model
    ├── RecipeError     a recipe file with an unknown key or a value of the wrong type
    ├── GateError       a gate rule that cannot be read
    ├── JobError        a job whose process died at every try
    ├── ReportError     a report that is cut, changed, signed by another key, or about another patch or model
    ├── JournalError    a checkpoint of a run cannot be written or removed: no space, or a folder that may not be written to
    ├── StoreError      a store of checkpoints that is damaged, changed, of another version, or of other data
    └── Diverged        weights or loss left their bounds; everything was rolled back
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000
"""Most characters of a message: what a file holds may be named in it, and a name may be as long as the file."""


class ExpungeError(ValueError):
    """Something a user can mend. The message is one line of at most LONGEST characters; what does not print in it is escaped (`printable`)."""

    def __init__(self, *words: object) -> None:
        super().__init__(*(_short(printable(w)) if isinstance(w, str) else w for w in words))


def _short(message: str) -> str:
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 405]} ... {message[-400:]}"


class SplitError(ExpungeError):
    """A part of the split is missing, empty, overlaps another, or holds labels the model does not have."""


class ScopeError(ExpungeError):
    """No weight may move, a weight does not exist, or one outside the scope was written to."""


class SettingError(ExpungeError):
    """A method, check, world or setting does not exist, or a value is outside its range."""


class DataError(ExpungeError):
    """A data file, folder or column cannot be read as what it should be."""


class ModelError(ExpungeError):
    """A model or weight file cannot be loaded, or a model cannot be given fresh weights."""


class PatchError(ExpungeError):
    """A patch is damaged, signed by another key, or made for another model."""


class RecipeError(ExpungeError):
    """A recipe holds an unknown key or a value of the wrong type."""


class GateError(ExpungeError):
    """A gate rule cannot be read."""


class JobError(ExpungeError):
    """A job's process died at every try."""


class ReportError(ExpungeError):
    """A report is cut, was changed, is signed by another key, or is about another patch or model."""


class JournalError(ExpungeError):
    """A checkpoint of a run cannot be written or removed."""


class StoreError(ExpungeError):
    """A store of checkpoints is damaged, was changed, is of another version, or belongs to other data."""


class Diverged(ExpungeError):
    """Weights or loss left their bounds; the model was rolled back."""


def printable(text: str) -> str:
    """The text on one line: characters that do not print (line breaks, escape codes) are written as escapes.

    >>> printable("a\\nb\\x1b[31m é")
    'a\\\\nb\\\\x1b[31m é'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


HINTS = {
    "Expected more than 1 value per channel": "batch norm needs two records at a time, and a batch held one: choose a batch_size that leaves none alone",
    "No space left on device": "no space is left on the disk; checkpoints that stand are kept, and the same call goes on from them",
    "Read-only file system": "the folder cannot be written to",
    "out of memory": "the device's memory is full: a smaller batch_size or --dtype bfloat16 takes less",
}
"""Words in other libraries' messages -> what a user can do."""


def unwritten(error: BaseException) -> bool:
    """Whether an error tells of a file or folder that could not be written: no space, read-only, no permission. Those who write raise from the OSError; who
    reads does not.

    >>> unwritten(OSError(28, "No space left on device")), unwritten(ModelError("no folder x"))
    (True, False)
    """
    return isinstance(error, OSError) or (error.__cause__ is not None and unwritten(error.__cause__))


def first_line(error: BaseException) -> str:
    """The first line that an error says, or its kind where it says nothing.

    >>> first_line(ValueError("a\\nb")), first_line(ValueError())
    ('a', 'ValueError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def plain(error: BaseException) -> str:
    """Any exception on one line: its type and first line, or what is known about it (`HINTS`).

    >>> plain(KeyError("a"))
    "KeyError: 'a'"
    """
    text = str(error).strip()
    known = next((hint for words, hint in HINTS.items() if words in text), "")
    return printable(known or f"{type(error).__name__.lstrip('_')}: {next(iter(text.splitlines()), 'no message')[:400]}")


def suggest(kind: str, asked: str, known: Iterable[str]) -> str:
    """One line: what was asked, the nearest known name if one is near, and all known names.

    >>> suggest("salun has no setting", "kep", ["keep", "lr"])
    "salun has no setting 'kep'; did you mean 'keep'? There are: keep, lr"
    """
    names = list(known)
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"{kind} '{asked}'{hint} There are: {', '.join(names) or 'none'}"
