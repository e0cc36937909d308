"""Options of requests over records in files."""

from __future__ import annotations

from expunge.core.modality import Option

OPTIONS = (
    Option("train", "", "py:, csv:, parquet:, images: or world: data.", required=True),
    Option("weights", "", "Safetensors state dict of the model."),
    Option("test", "", "Data that was never trained on."),
    Option("corrected", False, "The training data also holds inputs of what must go under their right target, to be kept."),
    Option("plants", "", "Records like those to forget that the model never saw, for --twins; without it, half of validation; wrong: that under wrong labels."),
    Option("validation", "share:0.3", "Data of its own for tuning, or share:0.3, that share of test."),
)
