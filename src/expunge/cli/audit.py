"""expunge audit, expunge select: what is left in a model, and which records to audit on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.forget import places
from expunge.cli.options import TASK, TASK_HELP, asked, tasks, with_options
from expunge.cli.shown import Anyway, Device, Json, Key, Quick, Require, Twins, Workers, bar, key, show, understood
from expunge.core.modality import DEVICE

Training = Annotated[str, typer.Option(help='How the model was trained, for --shadows: "epochs=30 batch_size=50 lr=0.05".')]
Pools = Annotated[str, typer.Option(help="Folder that keeps shadow models.")]


@with_options(leave=("form",))
def audit(
    options: dict[str, Any],
    place: Annotated[str, typer.Argument(metavar="MODEL", help="The model before: a folder, timm:NAME or py:module:factory.")] = "",
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="What must be gone, as in forget.")] = "",
    model: Annotated[str, typer.Option(help="The same as MODEL.")] = "",
    forget: Annotated[str, typer.Option(help="The same as REQUEST.")] = "",
    patch: Annotated[str, typer.Option(help="Patch to audit.")] = "",
    after: Annotated[str, typer.Option(help="Or: weights (texts, pipelines: folder) after.")] = "",
    task: Annotated[str, typer.Option(help=TASK_HELP.format(tasks()))] = TASK,
    reference: Annotated[list[str] | None, typer.Option(help="Weights (texts: folder) of a retrained model; repeat for several.")] = None,
    out: str = "", require: Require = "", key_file: Key = "", twins: Twins = 0, workers: Workers = 1,
    shadows: Annotated[int, typer.Option(help="Train this many shadow models (64, say) for per-example attacks; kept and used again.")] = 0,
    training: Training = "",
    unlearn_shadows: Annotated[int, typer.Option(help="Run the patch's method on this many shadows, for the attack U-LiRA.")] = 0,
    check: Annotated[str, typer.Option(help="Read this report.json back and hold --patch, --model and --after to it; no audit.")] = "",
    pools: Pools = ".cache/expunge", seed: int = 0, quick: Quick = False, anyway: Anyway = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Audit a patch, or weights from any other tool, against the model before and retrained references.

    Prints the verdict, then the sections of named checks, weakest first.
    A report read back: expunge audit --check RUN/report.json --patch RUN/patch.safetensors [--model ...] [--key-file KEY]; 2 where the seal or a digest differs
    Pipelines: expunge audit --task diffusion --model DIR --after out/latest/released --concept "tench" --retain "goldfish,hen" --judge VIT-DIR --drawings 25
    """
    from expunge.core.errors import SettingError
    from expunge.core.machine.bounds import size_of
    from expunge.core.modality import MODALITIES, Request
    from expunge.core.patch import Patch
    from expunge.engine.log import kept
    from expunge.engine.run import Attempt
    from expunge.planning import outcome
    from expunge.planning.folders import fit, fresh

    if check:
        model = model or place
        if forget or request or reference or shadows or unlearn_shadows or out or twins:
            raise SettingError("--check reads a report back and audits nothing: name --patch, --model (with --weights) or --after to hold them to it")
        return _check(check, model, patch, after, options, key(key_file), as_json)
    if bool(patch) == bool(after):
        raise SettingError("name either --patch or --after")
    modality, model, what, mine = asked(task, model, options, forget, [w for w in (place, request) if w])
    if shadows and not modality.shadows:
        raise SettingError(f"shadow models are for {' and '.join(m.spelling for m in MODALITIES.values() if m.shadows)}")
    size_of("--memory", memory := mine.get("memory", ""))
    if out:
        fit(out)
    found = Patch.load(patch, key(key_file)) if patch else None
    with bar(as_json) as progress, kept(out) if out else nullcontext(lambda _: None) as settle:
        opened = modality.open(Request(model, what, mine, tuple(reference or ()), after, audit=True, progress=progress))
        understood(opened, anyway, as_json)
        if found is not None:
            found.apply(opened.after)
        pool, forgotten = _pools(opened.model, opened.task, opened.split, shadows, unlearn_shadows, training, pools, found, progress, memory)
        meta = {} if found is None else found.meta
        attempt = Attempt(str(meta.get("method", "given")), meta.get("settings", {}), int(meta.get("seed", seed)), "ok", "", found)
        verdict = outcome.audited(
            opened.model, opened.after, opened.task, opened.split, references=opened.references, seed=seed, attempt=attempt, slow=not quick, pool=pool,
            forgotten=forgotten, require=require, twins=twins, workers=workers, folder=Path(out) / "plants" if out else None, progress=progress, memory=memory,
        )  # fmt: skip
        title = f"Audit of {Path(patch or after).name}"
        document = verdict.document(title)
        if out:
            with fresh(out) as run:
                document = {**verdict.save(run.made, key=key(key_file), document=document), "folder": str(run.place)}
            settle(run.place)
    show(document, as_json)
    if out and not as_json:
        print("\n".join(places(document)))
    raise typer.Exit(0 if verdict.passed else 1)


def _check(report: str, model: str, patch: str, after: str, options: Mapping[str, Any], secret: bytes | None, as_json: bool) -> None:
    """What a report is about, its seal, and whether patch and models at hand are the report's. Raises ReportError where one is not."""
    from expunge.core.errors import ReportError, printable
    from expunge.core.modality import Request, named
    from expunge.core.patch import Patch
    from expunge.parts import seal
    from expunge.planning import identity
    from expunge.report import table

    document = seal.read(report, secret)
    nets = [None, None]
    if model or after:
        modality = named(table.plain(document.get("task")))
        request = Request(model, "", {o.name: options.get(o.name, o.default) for o in modality.options})
        factory = bool(after) and not request.options.get("weights", "a folder")  # that says no weights of the model before
        nets = [modality.load(request) if model and not factory else None, modality.load(replace(request, after=after)) if after else None]
    found = identity.compared(document, Patch.load(patch, secret) if patch else None, *nets)
    signed = "not signed" if "hmac" not in document else "signed; --key-file checks by whom" if secret is None else "signed by this key"
    here = "the same as here" if table.mapping(document["identity"].get("code")).get("source") == identity.code()["source"] else "another than here"
    if as_json:
        shown = {k: document.get(k) for k in ("title", "asked", "verdict", "created", "version", "identity", "sha256")}
        print(table.dump({"file": report, "seal": "whole", "signed": signed, **shown, "source": here, "held": [asdict(h) for h in found]}))
    else:
        print(f"{printable(Path(report).name)}: the seal is whole; {signed}")
        verdict = "passed" if table.passed(document) else "; ".join(["not passed", *table.texts(table.mapping(document.get("verdict")).get("reasons"))])
        about = [(k, table.plain(document.get(k))) for k in ("title", "asked", "created", "version")]
        for name, said in (*about, ("verdict", verdict), *table.identified(document), ("source", here), *((h.what, h.said) for h in found)):
            print(f"{name:20} {said}")
    if other := [h.what for h in found if not h.match]:
        raise ReportError(f"{printable(Path(report).name)} is about another {' and another '.join(other)}: see which digest differs, and name what was audited")


@with_options("id_column", "ignore", "classes", "mean", "std", "channels")
def select(
    options: dict[str, Any], model: Annotated[str, typer.Option(help="py:module:factory, a function without arguments that returns the module.")],
    weights: Annotated[str, typer.Option(help="Weights of the trained model.")], train: Annotated[str, typer.Option(help="Its training data.")],
    size: Annotated[int, typer.Option(help="How many records.")],
    how: Annotated[str, typer.Option(help="hardest, easiest, vulnerable or random.")] = "hardest",
    out: Annotated[str, typer.Option(help="Where the ids go, one per line.")] = "gone.txt",
    test: Annotated[str, typer.Option(help="Data that was never trained on.")] = "", task: str = TASK, device: Device = DEVICE.default, dtype: str = "auto",
    shadows: Annotated[int, typer.Option(help="Shadow models, for --how vulnerable.")] = 0, training: Training = "", pools: Pools = ".cache/expunge",
    seed: int = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Choose a forget set to audit on: the records that are hardest (or easiest) to forget, or that membership shows in most.

    Example: expunge select --model py:models:factory --weights m.safetensors --train csv:train.csv --size 100; then --forget ids:@gone.txt
    """
    import torch

    from expunge.core.errors import SettingError, suggest
    from expunge.core.files import write
    from expunge.core.machine.devices import placed
    from expunge.core.modality import MODALITIES, meant
    from expunge.data.records import worst
    from expunge.modalities.files import models, readers
    from expunge.modalities.files.requests import PASSED

    ways = ("hardest", "easiest", "vulnerable", "random")
    if how not in ways:
        raise SettingError(suggest("no way to select", how, ways))
    modality = meant(task, model)
    if not modality.labelled:
        raise SettingError(f"select works on {' and '.join(m.spelling for m in MODALITIES.values() if m.labelled)}")
    made, given = modality.task(), {option: str(options[name]) for name, option in PASSED.items() if options.get(name)}
    net, data = placed(models.load(model, Path(weights)), device, dtype), readers.load(train, modality.name, Path.cwd(), options=given)
    with bar(as_json) as progress:
        if how == "vulnerable":
            unseen = readers.load(test, modality.name, Path.cwd(), known=data.schema, options=given) if test else None
            rows = _shadows(net, made, data, unseen, shadows, training, pools, progress).vulnerable(data, size)
        elif how == "random":
            rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:size].sort().values
        else:
            rows = worst.select(net, made, data, size, easiest=how == "easiest", seed=seed, progress=progress)
    ids = data.ids[rows].tolist()
    write(out, "".join(f"{data.called(i)}\n" for i in ids))
    show({"how": how, "ids": ids, "file": out}, True) if as_json else print(f"{len(ids)} {how} records: use --forget ids:@{out}")


def _shadows(net, task, data, unseen, shadows: int, training: str, folder: str, progress):
    """A pool over training data and unseen records."""
    from expunge.audits import pool
    from expunge.core.errors import SettingError
    from expunge.core.types import Split

    if not shadows:
        raise SettingError("--how vulnerable needs --shadows and --training")
    return pool.shadows(net, task, pool.universe(Split(data, None, unseen)), pool.recipe(training), k=shadows, folder=Path(folder), progress=progress)


def _pools(model, task, split, shadows: int, unlearn_shadows: int, training: str, folder: str, patch, progress, memory: str) -> tuple[Any, Any]:
    """The pool of shadow models, and the same after the patch's method; None for what was not asked for."""
    from expunge.audits import pool
    from expunge.core.errors import SettingError
    from expunge.core.stats import matched

    if not shadows:
        if unlearn_shadows or training:
            raise SettingError("--training and --unlearn-shadows need --shadows")
        return None, None
    split.require("retain", "test")
    recipe = pool.recipe(training)
    data = pool.universe(split)
    found = pool.shadows(model, task, data, recipe, k=shadows, folder=Path(folder), progress=progress)
    if not unlearn_shadows:
        return found, None
    if patch is None or not patch.meta.get("method"):
        raise SettingError("--unlearn-shadows needs a patch that names its method")
    drawn, _ = matched(split.forget.y, split.test.y, 0)
    unseen = split.test.take(drawn)
    records = pool.universe(replace(split, retain=None, test=unseen))
    settings = patch.meta.get("settings", {})
    return found, pool.forgotten(found, patch.meta["method"], data, records, settings, k=unlearn_shadows, progress=progress, memory=memory)
