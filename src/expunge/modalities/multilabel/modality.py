"""The record of multi-label classifiers."""

from __future__ import annotations

from typing import Any

from expunge.core.modality import Modality, later, modality
from expunge.modalities.files.options import OPTIONS

HERE, RECORDS = "expunge.modalities.multilabel", "expunge.modalities.records"

LEFT_OUT = {"klom": "it compares the first answer alone, and that as a probability, which hardly varies between models"}
"""Methods and checks of both classifiers and regressors that several labels cannot take -> why."""


def adopts(record: Any) -> bool:
    """Whether a method or check is made for any loss, as those are that work on classifiers and on regressors."""
    return {"classification", "regression"} <= {*record.tasks} and record.name not in LEFT_OUT


MULTILABEL = modality(
    Modality(
        "multilabel",
        "multi-label classifiers",
        later(f"{HERE}.task:multilabel"),
        adopts=adopts,
        preflight=later(f"{HERE}.task:preflight"),
        fits=later(f"{HERE}.task:fits"),
        stops=True,
        level=later(f"{HERE}.task:level"),
        validation=later(f"{RECORDS}:validation"),
        rules=later(f"{HERE}.rules:rules"),
        pace=lambda model: {"lr": 0.05, "momentum": 0.9, "clip": 10.0},
        options=OPTIONS,
        open=later(f"{HERE}.request:read"),
        load=later("expunge.modalities.files.requests:load"),
        sized=later(f"{HERE}.request:sized"),
        worlds=("digits-multi",),
        world=later(f"{HERE}.worlds:world"),
    )
)
