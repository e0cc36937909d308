"""A request against a pipeline's folder: concept, anchor and concepts to keep -> model, task and a split of prompts; and the folder that comes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook
from expunge.core.errors import DataError, ModelError, SettingError
from expunge.core.modality import Opened, Request
from expunge.core.types import Split
from expunge.modalities.diffusion import judges, pipelines
from expunge.modalities.diffusion import release as adapters
from expunge.modalities.diffusion.pipelines import Pipeline
from expunge.modalities.diffusion.task import Painting, draw
from expunge.modalities.pictures import Pictures
from expunge.parts.provenance import referred

TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a painting of {}", "a drawing of {}")
OTHERS = ("a picture showing {}", "{}, in detail", "one {}")
"""Wordings that no method is given."""
KEPT = (
    "a cat", "a dog", "a horse", "a bird", "a flower", "a tree", "a mountain", "the sea", "a river", "a city street", "a house", "a bridge", "a car", "a train",
    "a boat", "a bicycle", "a chair", "a table", "a book", "a cup of coffee", "an apple", "a cake", "a man", "a woman", "a child", "a crowd", "a portrait",
    "a landscape", "a watercolour", "an oil painting", "a pencil sketch", "a black and white photograph", "the night sky", "a sunset", "rain", "snow",
)  # fmt: skip
"""Concepts that are kept where none are named."""
DRAWINGS, STEPS, GUIDANCE, BATCH = 40, 15, 7.5, 4
"""For a judge: drawings of the concept (as many under OTHERS, twice as many of what is kept; all of 40 gone is at least 0.937 by Wilson's bound, and fewer
than 25 cannot prove the gate's 0.9), steps and guidance of a drawing, and drawings at once. A drawing of Stable Diffusion 1.5's size takes minutes on a CPU."""
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


def judged(
    found: Pipeline, split: Split, folder: Path | str, *, drawings: int = DRAWINGS, steps: int = STEPS, guidance: float = GUIDANCE,
    progress: Callable[[str, int, int], None] | None = None,
) -> Painting:  # fmt: skip
    """The pipeline's task with a judge of the request's concepts (`judges.judge`; the anchor is a word that it may say), which draws in `steps` with
    `guidance`, a few at once, and tells `progress` of it.

    Raises as `judges.judge` does, and SettingError for fewer than one drawing.
    """
    if drawings < 1:
        raise SettingError(f"a judge needs at least one drawing to look at, not {drawings}")
    names = [str(row["concept"]) for part in (split.forget, split.retain) if part is not None for row in part.rows]
    anchor = [] if split.anchor is None else [split.anchor.prompts[0]]  # TEMPLATES begin with the name alone
    judge = judges.judge(folder, names, also=anchor, drawings=drawings)
    task = replace(found.task, judge=lambda: judge, batch=BATCH)

    def sample(model: nn.Module, data: Pictures, **options: Any) -> Tensor:
        options = {"steps": steps, "guidance": guidance, **options}
        done, total = itertools.count(1), options["steps"] * -(-len(data) // BATCH)

        def told(*_: Any) -> None:
            if progress is not None:
                progress(f"{len(data)} drawings for the judge", next(done), total)

        return draw(task, model, data, **{"watch": told, **options})

    return replace(task, sample=sample)


def released(verdict: Any, found: Pipeline, out: Path | str, *, form: str = "auto") -> Path | None:
    """The folder `out`, written as `adapters.release` does with the patch that passed; None where none passed, or a guard that is asked for in no form of
    its own."""
    if verdict.chosen is None or (form in ("auto", "merged") and any(isinstance(e, Hook) for e in verdict.chosen.attempt.patch.edits)):
        return None
    return adapters.release(found, found.model, verdict.chosen.attempt.patch, out, form=form)


def opened(found: Pipeline, after: Path | str, dtype: str = "auto") -> Any:
    """The model of another folder that must be of the same kind. Raises ModelError when it is not."""
    other = pipelines.load(after, dtype=dtype, finite=False)
    if type(other.model) is not type(found.model):
        raise pipelines.ModelError(f"{other.folder.name} and {found.folder.name} hold different kinds of pipelines")
    return replace(other, task=found.task).model


def read(request: Request) -> Opened:
    """The request read, its references and what is to be audited too. Raises ModelError, SettingError or DataError that say what to do."""
    given = request.options
    if given["form"] not in adapters.FORMS:
        raise SettingError(f"form must be one of {', '.join(adapters.FORMS)}, not '{given['form']}'")
    if given["drawings"] and not given["judge"]:
        raise SettingError("--drawings is how many a judge looks at: name one with --judge")
    kept, dtype = given["retain"], given["dtype"]
    found, split = prepare(request.path(request.model), request.what, given["anchor"], f"@{request.path(kept[1:])}" if kept[:1] == "@" else kept, dtype=dtype)
    references = [referred(opened(found, request.path(r), dtype), request.path(r)) for r in request.references]
    after = opened(found, request.path(request.after or request.model), dtype) if request.audit else None
    task = found.task
    if given["judge"]:
        task = judged(found, split, given["judge"], drawings=given["drawings"] or DRAWINGS, progress=request.progress)
    return Opened(
        found.model, task, split, references, after, lambda verdict, folder, form="": released(verdict, found, folder, form=form or given["form"]),
        ("auto", "merged") if given["form"] == "auto" else (given["form"],), partial(adapters.reload, found),
        answers=partial(adapters.predictions, task),
    )  # fmt: skip


def load(request: Request) -> nn.Module:
    """The model of the pipeline after, where the request names one, or of the one before."""
    return pipelines.load(request.path(request.after or request.model), dtype=request.options["dtype"], finite=not request.after).model


def sized(request: Request) -> Any:
    """Pipelines have no plan from files yet."""
    raise SettingError(
        "plan reads files of records; for a pipeline, `expunge methods` names the methods of task diffusion and `forget` tries the cheapest first"
    )


def is_pipeline(folder: str) -> bool:
    """Whether a folder holds a pipeline of diffusers, or an adapter of one."""
    return (Path(folder) / "model_index.json").is_file() or adapters.is_adapter(folder)


def holds(model: str) -> int:
    """Surely, where it is a folder of a pipeline."""
    return 2 if is_pipeline(model) else 0


def apply(patch: Any, model: str, out: str, key: bytes | None, options: Mapping[str, Any]) -> list[str]:
    """What was written: the folder in a form (`release.release`) and, where it is a whole pipeline, the inverse patch beside it. Raises ModelError for a
    patch that has no such form."""
    found = pipelines.load(model, dtype=options["dtype"])
    undo = Path(out).with_name(f"{Path(out).name}.undo.safetensors")
    written = adapters.release(found, found.model, patch, out, form=options["form"], undo=undo, key=key)
    return [str(written)] + ([] if adapters.is_adapter(written) else [str(undo)])


def revert(patch: Any, model: str, out: str, options: Mapping[str, Any]) -> list[str]:
    """What was written: the folder with the weights before. Raises ModelError for an adapter, whose pipeline never changed."""
    if adapters.is_adapter(model):
        raise ModelError(f"{Path(model).name} is an adapter: its pipeline was never changed, so there is nothing to revert; load the pipeline without it")
    found = pipelines.load(model)
    patch.apply(found.model)
    return [str(pipelines.save(found, found.model, out))]
