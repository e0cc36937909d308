"""expunge methods, expunge bench: what there is, and how it compares."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from expunge.cli.shown import Json, bar


def methods(name: Annotated[str, typer.Argument()] = "", as_json: Json = False) -> None:
    """List all methods, or show one's manual page with its settings. Example: expunge methods salun"""
    from expunge.core.registry import METHODS

    if name:
        m = METHODS[name]
        print(json.dumps({"name": name, "stable": m.stable, "reason": m.reason, "settings": m.defaults, "manual": m.manual}) if as_json else m.manual)
        return
    listed = [
        {"name": m.name, "tasks": m.tasks, "needs": m.needs, "assurance": m.assurance, "stable": m.stable, "paper": m.paper, "what": m.manual.splitlines()[0]}
        for m in METHODS.values()
    ]
    if as_json:
        print(json.dumps(listed))
        return
    for m in listed:
        print(f"{m['name']:20} {'stable' if m['stable'] else 'experimental':12} {m['what']}")


def bench(
    world: str = "digits",
    methods: Annotated[str, typer.Option(help="Names joined by commas; all, and labels of variants beside it: all,esd+retain.")] = "all",
    seeds: Annotated[str, typer.Option(help="How many, or which: 1..2.")] = "3",
    scenarios: Annotated[str, typer.Option(help="Names joined by commas, for --plants sizes of requests; all of the world's without it.")] = "",
    references: Annotated[int, typer.Option(help="Retrained models that each cell is read against; -1: 3, and none for drawings.")] = -1,
    out: str = "bench-out",
    audit_power: Annotated[bool, typer.Option("--audit-power", help="Audit the audit: a population of models of known truth.")] = False,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="With --audit-power: tricks of one strength, searched for what passes the gate.")] = False,
    grades: Annotated[bool, typer.Option("--grades", help="With --audit-power: the grade of each model, with three, one and no retrained model.")] = False,
    sizes: Annotated[str, typer.Option(help="With --grades: requests of so few records instead, as 1,3,5.")] = "",
    plants: Annotated[bool, typer.Option("--plants", help="Planted controls of methods against the truth, on digits-wrong and authors.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare methods on a world (digits, cifar10, tofu-tiny, shapes, ...); writes OUT/WORLD.jsonl and OUT/WORLD.md, and goes on where it was stopped."""
    import torch

    from expunge.core.errors import SettingError
    from expunge.parts.seal import strict

    torch.set_num_threads(1)
    chosen = tuple(filter(None, scenarios.split(",")))
    if adaptive and not audit_power:
        raise SettingError("--adaptive searches for what passes the audit: give --audit-power with it")
    if grades and not audit_power:
        raise SettingError("--grades says what the audit says of models of known truth: give --audit-power with it")
    if sizes and not (grades and all(s.isdigit() and int(s) for s in sizes.split(","))):
        raise SettingError(f"--sizes are numbers of records, as 1,3,5, and go with --grades; not '{sizes}'")
    if plants and audit_power:
        raise SettingError("--plants and --audit-power are two benchmarks: name one")
    with bar(as_json) as progress:
        if plants:
            from expunge.bench import plants as planted
            from expunge.bench.run import seed_numbers

            if not all(n.isdigit() for n in chosen):
                raise SettingError(f"--scenarios of --plants are sizes of requests, such as 5,50, not '{scenarios}'")
            asked = [int(n) for n in chosen]
            named = () if methods == "all" else tuple(methods.split(","))
            cells = planted.bench(world, out, draws=seed_numbers(seeds), sizes=asked, methods=named, progress=progress)
            text = planted.markdown(cells)
        elif audit_power and grades:
            from expunge.bench import grades as graded

            count = {} if references < 0 else {"counts": tuple(dict.fromkeys((references, 0)))}
            cells = graded.bench(world, chosen, out, sizes=[int(s) for s in sizes.split(",") if s], quick=True, progress=progress, **count)
            text = graded.markdown(cells)
        elif audit_power and adaptive:
            from expunge.bench import adaptive as adversary

            count = {} if references < 0 else {"references": references}
            cells = adversary.bench(world, chosen, out, progress=progress, **count)
            text = adversary.markdown(cells)
        elif audit_power:
            from expunge.bench import power

            cells = power.bench(world, chosen, out, progress=progress)
            text = power.markdown(cells)
        else:
            from expunge.bench import run as runner
            from expunge.bench.table import markdown

            count = None if references < 0 else references
            cells = runner.bench(world, methods.split(","), runner.seed_numbers(seeds), chosen, out, references=count, progress=progress)
            text = markdown(cells)
    print(json.dumps(strict(cells)) if as_json else text)
