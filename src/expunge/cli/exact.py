"""The part of the command line that is about exact deletion: `expunge plan --stream`. Nothing heavy is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Log = Annotated[str, typer.Option("--stream", help="Log of deletion requests (CSV: time, id or count, records): recommends shards, slices and budget.")]
Records = Annotated[int, typer.Option(help="With --stream: how many training records there are.")]
Least = Annotated[int, typer.Option("--shard-least", help="With --stream: fewest records that each voting model is trained on.")]
Storage = Annotated[int, typer.Option(help="With --stream: most checkpoints that may be stored; 0 for no limit.")]
Passes = Annotated[float, typer.Option(help="With --stream: most sample passes in --months, first training included; 0 for no limit.")]
Months = Annotated[float, typer.Option(help="With --stream: months to plan for.")]
Out = Annotated[str, typer.Option(help="With --stream: folder for plan.html and plan.json.")]
HEADER = (
    "setting",
    "passes per request",
    "of full training",
    "passes per month",
    "first training",
    "checkpoints",
    "requests before retraining",
    "least records",
)
SHOWN = 10


def plan(
    stream: str,
    *,
    records: int,
    shard_least: int = 200,
    storage: int = 0,
    passes: float = 0.0,
    months: float = 12.0,
    out: str = "",
    as_json: bool = False,
    runs: int = 100,
) -> None:
    """Print the ranked settings for a log; with `out`, write plan.html and plan.json there.

    Raises SettingError where --records is missing, DataError for a bad log.
    """
    from expunge.core.errors import SettingError
    from expunge.core.files import write
    from expunge.guarantees.exact.capacity.recommend import recommend
    from expunge.guarantees.exact.capacity.volumes import read
    from expunge.report import table

    if records < 1:
        raise SettingError("--stream needs --records: how many training records there are")
    found = recommend(read(stream, records), records, least=shard_least, storage=storage or None, passes=passes or None, months=months, runs=runs)
    document = told(found)
    written = [write(Path(out) / "plan.json", table.dump(document) + "\n"), write(Path(out) / "plan.html", _page(found))] if out else []
    if as_json:
        print(table.dump(document))
        return
    print("\n".join(lines(found)))
    if written:
        print(f"written: {written[1]}, {written[0].name}")


def demo(out: str, *, as_json: bool, progress: Any) -> None:
    """Run the demo of exact deletion and print its table, or JSON."""
    from rich.console import Console
    from rich.table import Table

    from expunge.demos import exact as demo_exact
    from expunge.report import table

    found = demo_exact.demo(out, progress=progress)
    if as_json:
        print(table.dump(found))
        return
    header, rows = demo_exact.table(found)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    print(f"{found['requests']} requests in {found['seconds']:.0f} seconds; plots of cost and accuracy in {out}/report.html, a proof of each in proofs.json")


def told(found: Any) -> dict[str, Any]:
    """A plan as plain JSON values."""
    from dataclasses import asdict

    options = [{"name": o.design.name, **asdict(o)} for o in found.options]
    volumes = {k: v for k, v in asdict(found.volumes).items() if k != "ids"}  # whose records were asked for stays in the log
    return {"volumes": volumes, "months": found.months, "retrain": found.retrain, "refused": found.refused, "notes": list(found.notes), "options": options}


def _row(option: Any) -> tuple[str, ...]:
    cost, before = option.per_request, option.served
    return (
        option.design.name, f"{cost.mean:,.0f} ({cost.low:,.0f} to {cost.high:,.0f})", f"{100 * option.share:.2f} %", f"{option.per_month:,.0f}",
        f"{option.setup:,}", f"{option.storage:,}", f"{before.mean:,.0f} ({before.low:,.0f} to {before.high:,.0f})", f"{option.least:,}",
    )  # fmt: skip


def lines(found: Any) -> list[str]:
    """Text of a plan: what the log says, the best settings with reasons, what was refused."""
    text = list(found.notes)
    for rank, option in enumerate(found.options[:SHOWN], start=1):
        row = _row(option)
        text.append(f"{rank:2}. {row[0]}: {row[1]} sample passes per request, {row[3]} per month, first training {row[4]}, {row[5]} checkpoints")
        text.append(f"    serves {row[6]} requests before full retraining if nothing is retrained; " + "; ".join(option.reasons))
    if not found.options:
        text.append("no setting keeps the limits")
    text += [f"{number} settings left out: {why}" for why, number in found.refused.items()]
    text.append(f"full retraining after each batch: {found.retrain:,.0f} sample passes in {found.months:g} months" + _saved(found))
    text.append("accuracy is not measured here: fewer, larger shards are the more accurate; intervals are one-sided 95 % bounds of the simulation")
    return text


def _saved(found: Any) -> str:
    return f", the first setting {found.options[0].total:,.0f}" if found.options else ""


def _page(found: Any) -> str:
    from expunge.guarantees.exact.capacity.plots import bars
    from expunge.report.page import page

    best = found.options[:SHOWN]
    plots = [
        ("Cost per request", bars({"this log": {o.design.name: o.per_request for o in best}} if best else {}, "sample passes, mean and 95 % bounds")),
        ("Requests served without retraining", bars({"this log": {o.design.name: o.served for o in best}} if best else {}, "requests, mean and 95 % bounds")),
    ]
    return page("Exact deletion: settings for your requests", lines(found), HEADER, [_row(o) for o in best], plots)
