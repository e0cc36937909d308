"""The part of the command line that is about folders of diffusion pipelines. Nothing heavy is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.planning.recipe import IMAGE

Concept = Annotated[str, typer.Option(help="Pipelines: what must go, in words; --anchor says what to draw instead, --retain what to keep (a,b,c or @FILE).")]

Judge = Annotated[
    str,
    typer.Option(
        help="Pipelines: a folder of transformers (CLIP, SigLIP, or an image classifier whose labels hold --concept and --retain) that names what is drawn "
        "before and after."
    ),
]
Drawings = Annotated[
    int, typer.Option(help="With --judge: drawings of the concept, twice as many of what is kept; 0 is 40. Fewer than 25 cannot prove that it is gone.")
]


def is_pipeline(folder: str) -> bool:
    """Whether a folder holds a pipeline of diffusers, or an adapter of one."""
    from expunge.modalities.diffusion.release import is_adapter

    return (Path(folder) / "model_index.json").is_file() or is_adapter(folder)


def asked(task: str, forget: str, concept: str, files: dict[str, str], judge: str = "", drawings: int = 0) -> str:
    """What must go: --concept for pipelines, --forget for all else. Raises SettingError for the other, for files that pipelines do not take, for a judge of
    anything else, and for drawings without a judge."""
    from expunge.core.errors import SettingError

    if judge and task not in IMAGE:
        raise SettingError("--judge looks at drawings, for --task diffusion; other tasks know from their records what is right")
    if drawings and not judge:
        raise SettingError("--drawings is how many a judge looks at: name one with --judge")
    if task not in IMAGE:
        if concept:
            raise SettingError("--concept is for --task diffusion; say --forget")
        if not forget:
            raise SettingError("--forget is missing")
        return forget
    if forget:
        raise SettingError("a pipeline forgets a concept: write --concept in place of --forget")
    if other := [name for name, value in files.items() if value and name not in ("anchor", "retain")]:
        raise SettingError(f"--{other[0]} is not for --task diffusion")
    return concept


def request(model: str, concept: str, anchor: str, retain: str, reference: list[str] | None, dtype: str) -> tuple[Any, Any, list[Any]]:
    """Pipeline, split and references."""
    from expunge.modalities.diffusion import request as images

    found, split = images.prepare(model, concept, anchor, retain, dtype=dtype)
    return found, split, [images.opened(found, r, dtype) for r in reference or []]


def judged(pipeline: Any, split: Any, judge: str, drawings: int, progress: Any) -> Any:
    """The task of a pipeline, with the judge in that folder."""
    from expunge.modalities.diffusion import request as images

    return images.judged(pipeline, split, judge, drawings=drawings or images.DRAWINGS, progress=progress)


def apply(patch: Any, model: str, out: str, dtype: str, key: bytes | None, form: str = "auto") -> list[str]:
    """What was written: the folder in a form (`adapters.release`) and, where it is a whole pipeline, the inverse patch beside it. Raises ModelError for a
    patch that has no such form."""
    from expunge.modalities.diffusion import pipelines
    from expunge.modalities.diffusion import release as adapters

    found = pipelines.load(model, dtype=dtype)
    undo = Path(out).with_name(f"{Path(out).name}.undo.safetensors")
    written = adapters.release(found, found.model, patch, out, form=form, undo=undo, key=key)
    return [str(written)] + ([] if adapters.is_adapter(written) else [str(undo)])


def revert(patch: Any, model: str, out: str) -> list[str]:
    """What was written: the folder with the weights before. Raises ModelError for an adapter, whose pipeline never changed."""
    from expunge.core.errors import ModelError
    from expunge.modalities.diffusion import pipelines
    from expunge.modalities.diffusion import release as adapters

    if adapters.is_adapter(model):
        raise ModelError(f"{Path(model).name} is an adapter: its pipeline was never changed, so there is nothing to revert; load the pipeline without it")
    found = pipelines.load(model)
    patch.apply(found.model)
    return [str(pipelines.save(found, found.model, out))]
