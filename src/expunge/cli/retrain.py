"""expunge retrain: references that never saw what must go."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from expunge.cli.options import TASK, TASK_HELP, asked, tasks, with_options
from expunge.cli.shown import Json, bar, wrote


@with_options(leave=("form", "plants", "judge", "drawings", "concept"))
def retrain(
    options: dict[str, Any], training: Annotated[str, typer.Option(help='How it was trained: "epochs=30 batch_size=50 lr=0.05".')],
    place: Annotated[str, typer.Argument(metavar="MODEL", help="The model that is to forget: a folder or py:module:factory.")] = "",
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="What must go, as in forget.")] = "",
    model: Annotated[str, typer.Option(help="The same as MODEL.")] = "", forget: Annotated[str, typer.Option(help="The same as REQUEST.")] = "",
    task: Annotated[str, typer.Option(help=TASK_HELP.format(tasks()))] = TASK,
    base: Annotated[str, typer.Option(help="Start from this model in place of newly drawn weights, as for fine-tuned language models.")] = "",
    seeds: Annotated[int, typer.Option(help="How many references.")] = 3,
    out: Annotated[str, typer.Option(help="Folder for retrained-0, retrained-1, ... and their records.")] = "references", as_json: Json = False,
) -> None:  # fmt: skip
    """Train references that never saw what must go, with a record of how each came about, for --reference of forget and audit.

    Example: expunge retrain --model py:models:factory --train csv:train.csv?target=label --forget class:3 --training "epochs=30 batch_size=50 lr=0.05"
    """
    from expunge.audits.pool import recipe
    from expunge.core.modality import Request
    from expunge.planning.retraining import references

    modality, model, what, mine = asked(task, model, options, forget, [w for w in (place, request) if w])
    if mine.get("weights") == "":
        mine["weights"] = "none"  # references start from newly drawn weights, so that those of the model are not needed
    with bar(as_json) as progress:
        opened = modality.open(Request(model, what, mine, after=base, progress=progress))
        made = references(opened, recipe(training), out, seeds=seeds, base=opened.after, progress=progress)
    wrote([str(path) for path in made], as_json)
