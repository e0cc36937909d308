"""The record of dual encoders of images and texts."""

from __future__ import annotations

from typing import Any

from expunge.core.modality import Modality, later, modality

HERE = "expunge.modalities.contrastive"


def rules(p: Any) -> dict[str, str]:
    """Images of the class are matched to it no more, under its own words and (where the task has any) others, and at most one in twenty of the rest is lost."""
    parts = p.split.parts()
    others = {"zero_shot.forget_other": "<= 0.2"} if "other" in getattr(p.task, "others", {}) else {}
    return {"zero_shot.forget": "<= 0.1", **others, **{f"zero_shot.{part}_drop": "<= 0.05" for part in ("retain", "test") if part in parts}}


CONTRASTIVE = modality(
    Modality(
        "contrastive",
        "dual encoders of images and texts",
        later(f"{HERE}.task:contrastive"),
        kinds=lambda split: ("class",),
        families=("output", "utility"),
        near=later("expunge.modalities.near:inputs"),
        level=later(f"{HERE}.task:level"),
        rules=rules,
        worlds=("clip-digits",),
        world=later(f"{HERE}.worlds:world"),
    )
)
