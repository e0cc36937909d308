"""A request against a pipeline's folder: concept, anchor and concepts to keep -> model, task and a split of prompts; and the folder that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from expunge import adapters, pipelines
from expunge.errors import DataError, SettingError
from expunge.outcome import Verdict
from expunge.patch import Hook
from expunge.pipelines import Pipeline
from expunge.types import Pictures, Split

TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a painting of {}", "a drawing of {}")
OTHERS = ("a picture showing {}", "{}, in detail", "one {}")
"""Wordings that no method is given."""
KEPT = (
    "a cat", "a dog", "a horse", "a bird", "a flower", "a tree", "a mountain", "the sea", "a river", "a city street", "a house", "a bridge", "a car", "a train",
    "a boat", "a bicycle", "a chair", "a table", "a book", "a cup of coffee", "an apple", "a cake", "a man", "a woman", "a child", "a crowd", "a portrait",
    "a landscape", "a watercolour", "an oil painting", "a pencil sketch", "a black and white photograph", "the night sky", "a sunset", "rain", "snow",
)  # fmt: skip
"""Concepts that are kept where none are named."""
MAX_BYTES = 1 << 20
"""Largest file of concepts that is read."""


def concepts(text: str) -> list[str]:
    """Concepts in a list with commas, or one per line in the file @PATH. Raises DataError when the file cannot be read or holds none.

    >>> concepts("a cat, a dog")
    ['a cat', 'a dog']
    """
    if not text.startswith("@"):
        return [c.strip() for c in text.split(",") if c.strip()]
    path = Path(text[1:])
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise DataError(f"{path.name} holds no concept; write one per line")
    return found


def prompts(found: Pipeline, names: Sequence[str], templates: Sequence[str], first: int = 0) -> Pictures:
    """Every concept in every wording, without images, numbered from `first` on."""
    rows = tuple({"prompt": t.format(name), "concept": name} for name in names for t in templates)
    return Pictures(None, found.encode([str(r["prompt"]) for r in rows]), first + torch.arange(len(rows)), rows, found.encode)


def request(found: Pipeline, concept: str, anchor: str = "", retain: str = "") -> Split:
    """The split of a request: forget (the concept in all wordings), anchor (the same with what to draw instead), retain, and test (other wordings).

    Raises SettingError for an anchor that is the concept, or a kept concept that is, DataError for one that has no tokens.
    """
    concept, anchor = concept.strip(), anchor.strip()
    if not concept:
        raise SettingError("no concept; name one with --concept")
    if concept.lower() == anchor.lower():
        raise SettingError(f"the anchor is the concept itself ('{concept}'): name what to draw instead, or leave it out")
    names = concepts(retain) if retain else [k for k in KEPT if concept.lower() not in k and k not in concept.lower()]
    if concept.lower() in [n.lower() for n in names]:
        raise SettingError(f"'{concept}' also stands among the concepts to keep")
    forget = prompts(found, [concept], TEMPLATES)
    instead = forget.prompted([t.format(anchor) for t in TEMPLATES]) if anchor else None
    kept = prompts(found, names, TEMPLATES[:2], len(forget))
    test = prompts(found, [concept], OTHERS, len(forget) + len(kept))
    return Split(forget, kept, test=test, anchor=instead, asked=f"concept:{concept}" + (f" -> {anchor}" if anchor else ""))


def prepare(folder: Path | str, concept: str, anchor: str = "", retain: str = "", *, dtype: str = "auto") -> tuple[Pipeline, Split]:
    """Pipeline and split. Raises ModelError, SettingError or DataError that say what to do."""
    found = pipelines.load(folder, dtype=dtype)
    return found, request(found, concept, anchor, retain)


def released(verdict: Verdict, found: Pipeline, out: Path | str, *, form: str = "auto") -> Path | None:
    """The folder `out`, written as `adapters.release` does with the patch that passed; None where none passed, or a guard that is asked for in no form of
    its own."""
    if verdict.chosen is None or (form in ("auto", "merged") and any(isinstance(e, Hook) for e in verdict.chosen.attempt.patch.edits)):
        return None
    return adapters.release(found, found.model, verdict.chosen.attempt.patch, out, form=form)


def opened(found: Pipeline, after: Path | str, dtype: str = "auto") -> Any:
    """The model of another folder that must be of the same kind. Raises ModelError when it is not."""
    other = pipelines.load(after, dtype=dtype)
    if type(other.model) is not type(found.model):
        raise pipelines.ModelError(f"{other.folder.name} and {found.folder.name} hold different kinds of pipelines")
    return replace(other, task=found.task).model
