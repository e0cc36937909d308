"""The record of classifiers."""

from __future__ import annotations

from functools import partial

from expunge.core.modality import Modality, Search, later, modality
from expunge.modalities.files.options import OPTIONS

HERE, RECORDS, REQUESTS = "expunge.modalities.classification", "expunge.modalities.records", "expunge.modalities.files.requests"

CLASSIFICATION = modality(
    Modality(
        "classification",
        "classifiers",
        later(f"{HERE}.task:classification"),
        labelled=True,
        shadows=True,
        removed=later(f"{RECORDS}:removed"),
        kinds=later(f"{RECORDS}:kinds"),
        near=later("expunge.modalities.near:inputs"),
        preflight=later(f"{HERE}.task:preflight"),
        kept=later(f"{RECORDS}:kept"),
        stops=True,
        level=later(f"{RECORDS}:level"),
        validation=later(f"{RECORDS}:validation"),
        search=Search(screened=True),
        rules=later(f"{HERE}.rules:rules"),
        options=OPTIONS,
        open=partial(later(f"{REQUESTS}:read"), task="classification"),
        load=later(f"{REQUESTS}:load"),
        sized=partial(later(f"{REQUESTS}:sized"), task="classification"),
        holds=later(f"{REQUESTS}:holds"),
        apply=later(f"{REQUESTS}:apply"),
        revert=later(f"{REQUESTS}:revert"),
        worlds=("digits", "mnist", "cifar10", "digits-wrong", "mnist-wrong"),
        world=later(f"{HERE}.worlds:world"),
    )
)
