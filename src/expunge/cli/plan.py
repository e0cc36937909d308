"""expunge plan: what can be done with the parts at hand, and what a stream of requests takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from expunge.cli import exact
from expunge.cli.options import TASK, TASK_HELP, asked, tasks, with_options
from expunge.cli.shown import Json, needs


@with_options("test", "validation", "anchor", "id_column", "ignore", "classes", "mean", "std", "size", "channels", "text_column", "label_column", "turns")
def plan(
    options: dict[str, Any],
    train: Annotated[str, typer.Argument(help="Data; texts: JSONL of what must stay.")] = "",
    forget: Annotated[str, typer.Argument(help="What must go: class:3 and the like; texts: a JSONL file.")] = "",
    task: Annotated[str, typer.Option(help=TASK_HELP.format(tasks()))] = TASK, model: Annotated[str, typer.Option(help="Texts: the model's folder.")] = "",
    retrain_epochs: float = 0.0, as_json: Json = False, stream: exact.Log = "", records: exact.Records = 0, shard_least: exact.Least = 200,
    storage: exact.Storage = 0, passes: exact.Passes = 0.0, months: exact.Months = 12.0, out: exact.Out = "",
) -> None:  # fmt: skip
    """Say which methods are feasible with the parts at hand, what they may claim and cost. Example: expunge plan world:digits/train class:3

    Texts: expunge plan retain.jsonl forget.jsonl --task causal-lm; "" for retain.jsonl where there is none.
    Exact deletion: expunge plan --stream requests.csv --records 50000 recommends shards, slices and budget for a log of requests.
    """
    if stream:
        return exact.plan(stream, records=records, shard_least=shard_least, storage=storage, passes=passes, months=months, out=out, as_json=as_json)
    needs(forget, "FORGET, what must go,")

    from dataclasses import asdict

    from expunge.core.modality import Request, meant
    from expunge.core.registry import METHODS
    from expunge.planning import plan as planner
    from expunge.report import table

    modality = meant(task, model)
    if modality.asks == "forget":
        _, _, forget, options = asked(modality.spelling, model or "none", options, forget)
    chosen, split, net = modality.sized(Request(model, forget, {**options, modality.stays: train}))
    passes_of = 2 * retrain_epochs * len(split.retain or ()) if retrain_epochs else None
    found = planner.plan(chosen, split, model=net, retrain_passes=passes_of)
    if as_json:
        print(table.dump([asdict(o) for o in found]))  # pyright: ignore
        return
    ours = [o for o in found if METHODS[o.method].suits(chosen)]
    for o in ours:
        cost = f"{o.forward + o.backward:,.0f} examples" + ("" if o.share is None else f", {100 * o.share:.1f} % of retraining")
        print(f"{o.method:20} {o.assurance:12} {cost}" if o.feasible else f"{o.method:20} not feasible: {o.why}")
    print(f"{len(found) - len(ours)} more methods work on other tasks, not on {chosen.name}")
