"""The record of generators of GANs."""

from __future__ import annotations

from typing import Any

from expunge.core.modality import Modality, later, modality

HERE = "expunge.modalities.gan"


def rules(p: Any) -> dict[str, str]:
    """At most 3 % of a GAN's drawings show the class, and each other one is still drawn."""
    return {"gan.erased": "<= 0.03", "gan.rarest": ">= 0.03"}


GAN = modality(
    Modality(
        "gan",
        "generators of GANs",
        later(f"{HERE}.task:gan"),
        near=later("expunge.modalities.near:inputs"),
        kinds=later("expunge.modalities.records:kinds"),
        validation=later("expunge.modalities.records:validation"),
        families=("output", "utility"),
        rules=rules,
        worlds=("gan-digits",),
        world=later(f"{HERE}.worlds:world"),
    )
)
