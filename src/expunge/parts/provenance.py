"""How a retrained model came about: a record beside its weights, written when it is made and held against the file when it is read.

    retrained-0.safetensors                  retrained-0.json
    a folder DIR                             DIR/retrained.json

It says what the training started from (`base`: the digest of a model, or "" for newly drawn weights), the digest and number of the records it saw, settings,
seed and the digest of what came out. It is sealed by a SHA-256 like a patch. A record is a claim of whoever wrote it; what it saves the audit is the guess
whether a model that resembles the original descends from it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.digest import model_digest
from expunge.core.errors import DataError
from expunge.core.files import write

MAX_BYTES = 1 << 20
"""Largest record that is read."""


@dataclass(frozen=True)
class Provenance:
    """What a retrained model was made of.

    model     digest of its weights               base    digest of the model it started from, "" for newly drawn weights
    data      digest of the records it saw        n       how many
    settings  of the training                     seed    of training and newly drawn weights
    """

    model: str
    base: str
    data: str
    n: int
    settings: dict[str, Any]
    seed: int


def place(weights: Path | str) -> Path:
    """Where the record of a file or folder of weights stands."""
    path = Path(weights)
    return path / "retrained.json" if path.is_dir() else path.with_suffix(".json")


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save(weights: Path | str, record: Provenance) -> Path:
    """Write the record beside its weights."""
    body = {"expunge": "retrained", **asdict(record)}
    return write(place(weights), json.dumps({**body, "sha256": _seal(body)}, indent=1, sort_keys=True) + "\n")


def load(weights: Path | str, model: nn.Module) -> Provenance | None:
    """The record beside these weights; None where there is none. Raises DataError for one that was changed, or that is of other weights."""
    path = place(weights)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        body = json.loads(path.read_text(encoding="utf-8"))
        seal = body.pop("sha256", "") if isinstance(body, dict) else ""
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or type(error).__name__}") from None
    if not isinstance(body, dict) or body.get("expunge") != "retrained":
        return None  # some other file of that name
    if _seal(body) != seal:
        raise DataError(f"{path.name} was changed after it was written: its content does not match its checksum")
    kinds = {"model": str, "base": str, "data": str, "n": int, "settings": dict, "seed": int}
    if odd := [f.name for f in fields(Provenance) if not isinstance(body.get(f.name), kinds[f.name])]:
        raise DataError(f"{path.name} lacks {odd[0]}, or holds it as another type")
    record = Provenance(**{f.name: body[f.name] for f in fields(Provenance)})
    if record.model != model_digest(model):
        raise DataError(f"{path.name} is the record of other weights than {Path(weights).name} holds")
    return record


@dataclass(frozen=True)
class Reference:
    """A model that is said to never have seen the forget set, its name in messages, and the record of how it came about, where there is one."""

    model: nn.Module
    name: str = ""
    record: Provenance | None = None


def referred(model: nn.Module, weights: Path | str) -> Reference:
    """A model that was read from these weights, under their name and with the record beside them."""
    return Reference(model, Path(weights).name, load(weights, model))
