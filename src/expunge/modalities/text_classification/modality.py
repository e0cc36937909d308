"""The record of text classifiers."""

from __future__ import annotations

from typing import Any

from expunge.core.modality import Modality, Option, later, modality

HERE, RECORDS = "expunge.modalities.text_classification", "expunge.modalities.records"

OPTIONS = (
    Option("train", "", "JSON lines, a JSON list, CSV or Parquet of text, label and, where wanted, id.", required=True),
    Option("test", "", "The same of texts that were never trained on."),
    Option("validation", "share:0.3", "Texts of their own for tuning, or share:0.3, that share of test."),
    Option("text_column", "text", "Field or column of the text."),
    Option("label_column", "label", "Field or column of the class."),
    Option("id_column", "", "Field or column that names records; without it `id`, where there is one."),
    Option("ignore", "", "Fields or columns that are left out, a,b,c; any other is an error."),
    Option("max_length", 0, "In tokens; 0 is the model's context, at most 512."),
    Option("dtype", "auto", "auto (as stored), float32 or bfloat16."),
    Option("memory", "", "Most bytes of gradients of single examples at once, as 512M or 4G (1G)."),
)

LEFT_OUT = {
    **dict.fromkeys(("unsir", "jit", "boundary_shrink", "lcodec"), "it adds noise or a gradient to the inputs, and tokens are whole numbers"),
    "bad_teacher": "it puts forget and retain records into one batch as rows of one tensor, and texts have several",
    "class_concepts": "its concepts are factors that are not negative, and a pooled state has both signs",
    **dict.fromkeys(("lira", "rmia", "ulira"), "they ask shadow models, which are trained in a stack of one tensor per batch and without dropout"),
}
"""Methods and checks of classifiers that texts cannot take -> why."""


def adopts(record: Any) -> bool:
    """Whether a method or check is one of classifiers that texts can take."""
    return "classification" in record.tasks and record.name not in LEFT_OUT


def pace(model: Any) -> dict[str, Any]:
    """How an attacker trains it: AdamW with lr 0.1 / (features of a token), 1e-3 for a width of 100."""
    return {"lr": 0.1 / int(getattr(model.config, "hidden_size", 100)), "optimizer": "adamw", "clip": 1.0}


TEXT_CLASSIFICATION = modality(
    Modality(
        "text_classification",
        "text classifiers",
        later(f"{HERE}.task:text_classification"),
        adopts=adopts,
        removed=later(f"{RECORDS}:removed"),
        kinds=later(f"{RECORDS}:kinds"),
        preflight=later(f"{HERE}.task:preflight"),
        fits=later(f"{HERE}.task:fits"),
        level=later(f"{RECORDS}:level"),
        validation=later(f"{RECORDS}:validation"),
        rules=later("expunge.modalities.classification.rules:rules"),
        pace=pace,
        options=OPTIONS,
        open=later(f"{HERE}.request:read"),
        load=later(f"{HERE}.request:load"),
        sized=later(f"{HERE}.request:sized"),
        holds=later(f"{HERE}.request:holds"),
        apply=later(f"{HERE}.request:apply"),
        revert=later(f"{HERE}.request:revert"),
        told=later(f"{HERE}.request:told"),
        worlds=("topics",),
        world=later(f"{HERE}.worlds:world"),
    )
)
