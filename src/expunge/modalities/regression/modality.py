"""The record of regressors."""

from __future__ import annotations

from functools import partial

from expunge.core.modality import Modality, later, modality
from expunge.modalities.files.options import OPTIONS

HERE, RECORDS, REQUESTS = "expunge.modalities.regression", "expunge.modalities.records", "expunge.modalities.files.requests"

REGRESSION = modality(
    Modality(
        "regression",
        "regressors",
        later(f"{HERE}.task:regression"),
        shadows=True,
        relative=True,
        kinds=lambda split: ("records", "class", "range"),
        near=later("expunge.modalities.near:inputs"),
        kept=later(f"{RECORDS}:kept"),
        stops=True,
        level=later(f"{RECORDS}:level"),
        validation=later(f"{RECORDS}:validation"),
        rules=later(f"{RECORDS}:rules"),
        options=OPTIONS,
        open=partial(later(f"{REQUESTS}:read"), task="regression"),
        load=later(f"{REQUESTS}:load"),
        sized=partial(later(f"{REQUESTS}:sized"), task="regression"),
        holds=lambda model: 0,
        worlds=("diabetes",),
        world=later(f"{HERE}.worlds:world"),
    )
)
