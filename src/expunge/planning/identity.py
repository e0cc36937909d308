"""What a report is about, by digest: patch, models, data, code; and whether a patch or a model at hand is that one."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.core import Probe
from expunge.core.digest import model_digest
from expunge.core.edits import feed
from expunge.core.errors import printable
from expunge.core.patch import Patch
from expunge.core.types import Data, Split, held
from expunge.report.table import mapping, plain


def identity(p: Probe, rules: Mapping[str, str], patch: Patch | None, after: nn.Module | None) -> dict[str, Any]:
    """The section `identity` of a report. `patch` and `after` are those of the try that is shown, None where there is none.

    A digest of a part that is not held in memory is None; one of a part that is begins with the part's own, `part.digest`.
    """
    known = [p.once(("digest",), model, lambda model=model: model_digest(model)) for model in (p.before, *p.references)]
    return {
        "patch": None if patch is None else patch.digest, "before": known[0], "after": None if after is None else model_digest(after),
        "parts": {name: {"n": len(part), "digest": _rows(part)} for name, part in p.split.parts().items()},
        "references": known[1:], "rules": dict(rules), "seed": p.seed, "code": code(),
    }  # fmt: skip


NAMED = 1000
"""Records to forget that a report names."""


def data(split: Split) -> dict[str, Any]:
    """The section `data` of a report: what the training data was read as (`modalities.files.schema.Schema`, None where it was not), and the user's own
    names of the first NAMED records to forget, where they have such; else their ids."""
    schema = getattr(split.forget, "schema", None)
    ids = split.forget.ids[:NAMED].tolist() if held(split.forget) else []
    called = getattr(split.forget, "called", str)
    return {"schema": None if schema is None else schema.record(), "forgotten": [printable(called(i)) for i in ids]}


def _rows(part: Data) -> str | None:
    return hashlib.sha256(b"".join(part.keys)).hexdigest() if held(part) else None


def code() -> dict[str, str]:
    """Versions, and a digest of the package's own source files: an install that was changed has another."""
    from expunge import __version__

    return {"expunge": __version__, "torch": torch.__version__, "python": platform.python_version(), "source": source(Path(__file__).parent.parent)}


@functools.cache
def source(folder: Path) -> str:
    """SHA-256 over names and content of all Python files and page templates below a folder."""
    h = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for kind in ("*.py", "*.html") for path in folder.rglob(kind)}
    for name in sorted(files):
        feed(h, name, files[name].read_bytes())
    return h.hexdigest()


@dataclass(frozen=True)
class Held:
    """Something at hand, held to a report: what it is, whether it is what the report is about, and in words."""

    what: str
    match: bool
    said: str


def compared(document: Mapping[str, Any], patch: Patch | None = None, model: nn.Module | None = None, after: nn.Module | None = None) -> list[Held]:
    """Patch and models against the digests of a report. `model` may be the one before or the one after; if it is the one before and `patch` is the report's,
    what the patch makes of it is held to the one after, too. All models are left as they were. Raises PatchError where the patch does not apply."""
    known = mapping(document.get("identity"))
    out: list[Held] = []

    def hold(what: str, digest: str, *names: str) -> str:
        found = next((n for n in names if known.get(n) == digest), "")
        asked = " and ".join(f"{n} {plain(known.get(n)) or 'none'}" for n in names)
        out.append(Held(what, bool(found), f"match: it is the report's {found}" if found else f"differs: it is {digest}, the report has {asked}"))
        return found

    right = patch is not None and hold("patch", patch.digest, "patch") == "patch"
    if model is not None and hold("model", model_digest(model), "before", "after") == "before" and right and patch is not None:
        undo = patch.apply(model)
        hold("model with the patch", model_digest(model), "after")
        undo.apply(model)
    if after is not None:
        hold("model after", model_digest(after), "after")
    return out
