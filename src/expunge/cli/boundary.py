"""The boundary of the command line: whatever is raised inside becomes one exit code and, but for the gate's answer, one line on standard error.

0    passed, or done
1    the gate refused, and nothing else
2    the user can mend it: bad input, no space, no permission, too little memory
3    a bug of expunge: a file to send is written, with the traceback's places and versions, and without a message, an argument or a value
130  interrupted        141  nobody reads the output any more
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESUMED = ("forget", "run", "bench")
"""Commands that go on where they were stopped."""
VERSIONS = ("expunge", "torch", "numpy", "scikit-learn", "transformers", "peft", "diffusers", "datasets", "safetensors", "typer")


def ended(call: Callable[[], Any], words: Sequence[str]) -> int:
    """Run `call`, the command line over `words`; returns the exit code. `call` gives the exit code of a command, or None."""
    from typer._click.exceptions import ClickException

    from expunge.core.errors import ExpungeError, plain

    try:
        found = call()
        code = found if isinstance(found, int) and not isinstance(found, bool) else 0
        return interrupted(words) if code == 130 else code
    except ExpungeError as error:
        return told(plain_line(error))
    except ClickException as error:
        error.show()
        return 2
    except KeyboardInterrupt:
        return interrupted(words)
    except SystemExit as end:  # typer's own answer to a closed pipe is 1
        return 141 if end.code == 1 else end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        return 141
    except (MemoryError, OSError) as error:
        named = getattr(error, "filename", None)
        return told(f"{plain(error) if not named else f'{Path(str(named)).name}: {error.strerror}'}")  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return told("there is not enough memory: a smaller batch_size or --dtype bfloat16 takes less")
        return bug(error, words)


def plain_line(error: Exception) -> str:
    """The message on one line, control characters escaped."""
    from expunge.core.errors import printable

    return printable(" ".join(str(error).splitlines()))


def told(line: str) -> int:
    """2, after the line."""
    print(f"expunge: {line}", file=sys.stderr)
    return 2


def interrupted(words: Sequence[str]) -> int:
    """130, after what to do next."""
    after = "; the same command goes on where it was stopped" if words and words[0] in RESUMED else "; nothing was left half-written"
    print(f"expunge: interrupted{after}", file=sys.stderr)
    return 130


def bug(error: Exception, words: Sequence[str]) -> int:
    """3, after writing what to send."""
    text = json.dumps(described(error, words), indent=1)
    name = f"expunge-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(text)
            where = str(folder / name)
            break
        except OSError:
            where = ""
    line = next(iter(str(error).strip().splitlines()), "")
    from expunge.core.errors import printable

    print(f"expunge: this is a bug of expunge: {type(error).__name__}: {printable(line)[:300]}", file=sys.stderr)
    print(f"expunge: please send {where}, which holds no data, with the command that you called" if where else text, file=sys.stderr)
    return 3


def described(error: Exception, words: Sequence[str]) -> dict[str, Any]:
    """What a bug's file holds: types of the exceptions, places of their frames, versions; names of options without values. No message: it may hold data."""
    chain, link = [], error
    while link is not None and len(chain) < 10:
        frames = [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in traceback.extract_tb(link.__traceback__)][-60:]
        chain.append({"type": type(link).__name__, "frames": frames})
        link = link.__cause__ or link.__context__
    options = [w.split("=")[0] for w in words[1:] if w.startswith("--")]
    return {"command": words[0] if words else "", "options": options, "errors": chain, "python": platform.python_version(), "system": platform.system(),
            "versions": {n: v for n in VERSIONS if (v := _version(n))}}  # fmt: skip


def _short(path: str) -> str:
    """The path from its package on: where a user keeps it says who they are."""
    parts = Path(path).parts
    for root in ("site-packages", "src", "lib"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) :])
    return parts[-1] if parts else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
