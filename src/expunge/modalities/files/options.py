"""Options of requests over records in files."""

from __future__ import annotations

from expunge.core.modality import Option

OPTIONS = (
    Option("train", "", "py:, csv:, parquet:, images:, datasets: or world: data.", required=True),
    Option("weights", "", "Safetensors state dict of the model; none: the factory loads its own."),
    Option("dtype", "auto", "auto (as stored), float32, bfloat16 or float64: the model is cast to it."),
    Option("test", "", "Data that was never trained on."),
    Option("corrected", False, "The training data also holds inputs of what must go under their right target, to be kept."),
    Option("plants", "", "Records like those to forget that the model never saw, for --twins; without it, half of validation; wrong: that under wrong labels."),
    Option("validation", "share:0.3", "Data of its own for tuning, or share:0.3, that share of test."),
    Option("id_column", "", "Tables: the column that names records."),
    Option("ignore", "", "Tables: columns that are no inputs, a,b,c."),
    Option("classes", "", "How classes are numbered: in natural order (2 before 10); sorted: as strings, as torchvision does; or a,b,c."),
    Option("mean", "", "Images: mean of the inputs, as 0.5,0.5,0.5, in place of what the model's own files say."),
    Option("std", "", "Images: their standard deviation."),
    Option("size", "", "Images: 224, or HEIGHTxWIDTH, to which they are resized."),
    Option("channels", "", "Images: 3 repeats grey, 1 makes colour grey."),
    Option(
        "memory",
        "",
        "Most bytes of inputs held in memory, as 4G (a quarter of the machine's): images and data sets above it are read as needed. Also of gradients of "
        "single examples at once (1G).",
    ),
    Option("schema", "", "report.json of an earlier run, to whose columns, classes and preprocessing the data is held."),
)
