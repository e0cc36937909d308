"""The record of models from image to image."""

from __future__ import annotations

from typing import Any

from expunge.core.modality import Modality, later, modality

HERE = "expunge.modalities.image_to_image"


def rules(p: Any) -> dict[str, str]:
    """With retrained models: the gap to them closed on forget, in neither direction too far. Without: two decibels lost. At most half a decibel elsewhere."""
    kept = [part for part in ("retain", "test") if part in p.split.parts()]
    if p.references:
        seen = {} if p.task.judge is None else {"oracle_gap.recognised.forget": "<= 0.15"}
        return {"oracle_gap.closed": "0.7..1.3", **seen, **{f"oracle_gap.psnr.{part}": ">= -0.5" for part in kept}}
    seen = {} if p.task.judge is None else {"reconstruction.recognised.forget": "<= 0.5"}
    return {"reconstruction.lost.forget": ">= 2", **seen, **{f"reconstruction.lost.{part}": "<= 0.5" for part in kept}}


IMAGE_TO_IMAGE = modality(
    Modality(
        "image_to_image",
        "models from image to image",
        later(f"{HERE}.task:image_to_image"),
        near=later("expunge.modalities.near:inputs"),
        validation=later("expunge.modalities.records:validation"),
        families=("output", "closeness", "utility"),
        rules=rules,
        worlds=("inpaint-digits", "mri-digits"),
        world=later(f"{HERE}.worlds:world"),
    )
)
