"""The command line. Exit code 0: passed; 1: the gate refused; 2: bad input. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli import exact as cli_exact
from expunge.cli import images as cli_images
from expunge.cli import texts as cli_texts
from expunge.cli.images import Concept, Drawings, Judge
from expunge.cli.texts import IMAGE, TEXT, Anchor, Dtype, Form, General, Mask, MaxLength, Retain, Template

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Machine unlearning with proof. Start with: expunge demo",
    rich_markup_mode=None,
)  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print strict JSON on standard output and nothing else.")]
ModelSpec = Annotated[str, typer.Option(help="py:module:factory, a function without arguments that returns the module.")]
Weights = Annotated[str, typer.Option(help="Safetensors state dict of the model.")]
Quick = Annotated[bool, typer.Option("--quick", help="Leave out checks and baselines that train, but for those the gate reads.")]
Key = Annotated[str, typer.Option("--key-file", help="File whose bytes sign (and check) the patch.")]
TaskName = Annotated[str, typer.Option(help="classification, regression, causal-lm or diffusion.")]
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Entry point: one line on standard error and exit code 2 for bad input."""
    from expunge.core.errors import ExpungeError

    try:
        app()
    except ExpungeError as error:
        print(f"expunge: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def bar(quiet: bool) -> Iterator[Any]:
    """A progress callable shown on standard error; None when quiet."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("", total=None)
        yield lambda text, done, total: progress.update(line, description=text, completed=done, total=total)


def show(document: Any, as_json: bool) -> None:
    """The report's table, or JSON."""
    from expunge.report import table

    if as_json:
        print(table.dump({k: v for k, v in document.items() if k != "pictures"} if isinstance(document, dict) else document))
        return
    from rich.console import Console

    console = Console()
    console.print(table.show(document, console.width))


def settings(method: str, extra: list[str], preset: str = "") -> dict[str, Any]:
    """`--keep 0.3 --soft` after a method -> the settings that were named, over all those of a preset; raises SettingError with the nearest name.
    `--npo.retain none` names the method's own retain, where the command has an option of that name."""
    from expunge.core.errors import SettingError
    from expunge.core.registry import METHODS

    found: dict[str, Any] = {}
    words = [part for word in extra for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise SettingError(f"cannot read '{word}'; write settings as --name value")
        found[word[2:].removeprefix(f"{method}.").replace("-", "_")] = words.pop(0) if words and not words[0].startswith("--") else "true"
    if found and not method:
        raise SettingError(f"--{next(iter(found))} is no option of this command, and settings need --method")
    if preset and not method:
        raise SettingError("--preset needs --method, whose settings it sets")
    read = METHODS[method].settings(found) if found else {}
    return {**(METHODS[method].preset(preset) if preset else {}), **{name: read[name] for name in found}}


@app.command()
def demo(
    out: str = "expunge-demo", seeds: int = 3, as_json: Json = False,
    exact: Annotated[bool, typer.Option("--exact", help="Exact deletion: 50 requests, one after another, served by four designs; into OUT-exact.")] = False,
) -> None:  # fmt: skip
    """Forget a class and 10 % of the records of real digits, audited against retraining. Takes one to two minutes."""
    if exact:
        with bar(as_json) as progress:
            return cli_exact.demo(f"{out}-exact", as_json=as_json, progress=progress)
    from expunge.demos import digits as main_job

    with bar(as_json) as progress:
        result = main_job.demo(out, seeds=seeds, progress=progress)
    if as_json:
        show({**result, "scenarios": {k: {**v, "pictures": {}} for k, v in result["scenarios"].items()}}, True)
        return
    for name, document in result["scenarios"].items():
        show(document, False)
        print(f"{name}: report in {out}/{name}/report.html and report.json")
        if name in result["reverted"]:
            print(f"{name}: patch saved, applied and reverted; the reverted model is {'bit-identical' if result['reverted'][name] else 'NOT bit-identical'}")
    print(f"{result['seconds']:.0f} seconds")


@app.command("demo-llm")
def demo_llm(out: str = "expunge-demo-llm", as_json: Json = False) -> None:
    """Teach a small language model invented authors, forget two of them, keep the rest, prove it. Takes two to three minutes."""
    from expunge.demos import language as main_job

    if result := _demonstrated(main_job.demo, out, as_json):
        cli_texts.demo(result, out)


@app.command("demo-images")
def demo_images(out: str = "expunge-demo-images", as_json: Json = False) -> None:
    """Teach a small diffusion model to draw shapes in four styles, erase one style, keep the rest, prove it. Takes some six minutes, a second run two."""
    from expunge.demos import pictures as main_job

    if result := _demonstrated(main_job.demo, out, as_json):
        print("\n".join(main_job.told(result, out)))


def _demonstrated(job: Any, out: str, as_json: bool) -> dict[str, Any] | None:
    """What a demo of one request gave, its report shown; None where that was JSON, which is all there is to print."""
    with bar(as_json) as progress:
        result = job(out, progress=progress)
    if as_json:
        show({**result, "document": {**result["document"], "pictures": {}}}, True)
        return None
    show(result["document"], False)
    return result


def _recipe(model: str, weights: str, train: str, test: str, validation: str, forget: str, task: str, methods: list[str], references: list[str], **more: Any):
    from expunge.planning.recipe import Recipe

    return Recipe(
        model=model, train=train, forget=forget, folder=Path.cwd(), weights=weights, task=task, test=test, validation=validation or "share:0.3",
        methods=methods, references=references, **more,
    )  # fmt: skip


@app.command()
def plan(
    train: Annotated[str, typer.Argument(help="Data; texts: JSONL of what must stay.")] = "",
    forget: Annotated[str, typer.Argument(help="What must go: class:3 and the like; texts: a JSONL file.")] = "", test: str = "", validation: str = "",
    task: TaskName = "classification", anchor: Anchor = "", model: Annotated[str, typer.Option(help="Texts: the model's folder.")] = "",
    retrain_epochs: float = 0.0, as_json: Json = False, stream: cli_exact.Log = "", records: cli_exact.Records = 0, shard_least: cli_exact.Least = 200,
    storage: cli_exact.Storage = 0, passes: cli_exact.Passes = 0.0, months: cli_exact.Months = 12.0, out: cli_exact.Out = "",
) -> None:  # fmt: skip
    """Say which methods are feasible with the parts at hand, what they may claim and cost. Example: expunge plan world:digits/train class:3

    Texts: expunge plan retain.jsonl forget.jsonl --task causal-lm; "" for retain.jsonl where there is none.
    Exact deletion: expunge plan --stream requests.csv --records 50000 recommends shards, slices and budget for a log of requests.
    """
    if stream:
        return cli_exact.plan(stream, records=records, shard_least=shard_least, storage=storage, passes=passes, months=months, out=out, as_json=as_json)
    _needs(forget, "FORGET, what must go,")

    from dataclasses import asdict

    from expunge.core.errors import SettingError
    from expunge.core.registry import METHODS
    from expunge.modalities.language import checkpoints
    from expunge.modalities.language import request as texts
    from expunge.planning import plan as planner
    from expunge.planning.recipe import prepare
    from expunge.report import table

    cli_texts.check(task, "auto", {"anchor": anchor})
    if task in IMAGE:
        raise SettingError(
            "plan reads files of records; for a pipeline, `expunge methods` names the methods of task diffusion and `forget` tries the cheapest first"
        )
    if task not in TEXT and model:
        raise SettingError("--model is the folder of a language model, for --task causal-lm")
    if task in TEXT:
        chosen, split = texts.sized({"retain": train, "forget": forget, "test": test, "validation": validation, "anchor": anchor})
    else:
        chosen, split = prepare(_recipe("", "", train, test, validation, forget, task, [], []), inside=False)
    net = checkpoints.skeleton(model) if model else None
    options = planner.plan(chosen, split, model=net, retrain_passes=2 * retrain_epochs * len(split.retain or ()) if retrain_epochs else None)
    if as_json:
        print(table.dump([asdict(o) for o in options]))  # pyright: ignore
        return
    ours = [o for o in options if chosen.name in METHODS[o.method].tasks]
    for o in ours:
        cost = f"{o.forward + o.backward:,.0f} examples" + ("" if o.share is None else f", {100 * o.share:.1f} % of retraining")
        print(f"{o.method:20} {o.assurance:12} {cost}" if o.feasible else f"{o.method:20} not feasible: {o.why}")
    print(f"{len(options) - len(ours)} more methods work on other tasks, not on {chosen.name}")


@app.command(context_settings=FREE)
def forget(
    context: typer.Context, model: Annotated[str, typer.Option(help="py:module:factory; texts: a folder that save_pretrained wrote, or a PEFT folder.")],
    forget: Annotated[str, typer.Option(help="class:3, ids:17,42, ids:@file, range:0..30, random:0.1 or random:500; texts: a JSONL file.")] = "",
    concept: Concept = "", train: Annotated[str, typer.Option(help="py:, csv:, parquet:, images: or world: data.")] = "", weights: Weights = "", test: str = "",
    validation: str = "", task: TaskName = "classification",
    method: Annotated[str, typer.Option(help="One method; its settings follow as flags.")] = "",
    preset: Annotated[str, typer.Option(help="paper: the method's settings as published, under those named as flags.")] = "",
    retain: Retain = "", anchor: Anchor = "", general: General = "",
    template: Template = "auto", mask: Mask = "answer+eos", max_length: MaxLength = 0,
    dtype: Dtype = "auto", form: Form = "auto", judge: Judge = "", drawings: Drawings = 0,
    reference: Annotated[list[str] | None, typer.Option(help="Weights (texts: folder) of a retrained model; repeat for several.")] = None,
    retrain_epochs: float = 0.0, seed: int = 0, out: str = "out", key_file: Key = "", quick: Quick = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Unlearn, audit, gate: tries feasible methods in order of cost, or --method NAME with its settings (--keep 0.3).

    Texts: expunge forget --task causal-lm --model DIR --forget f.jsonl --retain r.jsonl --method npo --lora 16; what comes out is loaded without expunge.
    Pipelines of diffusers: expunge forget --task diffusion --model DIR --concept "Van Gogh style" --anchor "painting" --method uce
    A setting that is called like an option of this command is written with its method: --npo.retain none.
    """
    from expunge.modalities import models
    from expunge.modalities.diffusion import request as images
    from expunge.modalities.language import request as texts
    from expunge.planning import plan as planner
    from expunge.planning.recipe import prepare

    given = {method: found} if (found := settings(method, context.args, preset)) else {}
    parts, tokenizer, pipeline = {"retain": retain, "anchor": anchor, "general": general}, None, None
    cli_texts.check(task, form, parts)
    forget = cli_images.asked(task, forget, concept, {"train": train, "weights": weights, "test": test, "validation": validation, **parts}, judge, drawings)
    if task in IMAGE:
        pipeline, split, references = cli_images.request(model, forget, anchor, retain, reference, dtype)
        net, chosen = pipeline.model, pipeline.task
    elif task in TEXT:
        files = {"forget": forget, "test": test, "validation": validation, **parts}
        net, tokenizer, chosen, split, references = cli_texts.request(model, files, reference, template=template, mask=mask, max_length=max_length, dtype=dtype)
    else:
        _needs(train, "--train")
        net = models.load(model, Path(weights) if weights else None)
        chosen, split = prepare(_recipe(model, weights, train, test, validation, forget, task, [method] if method else [], []), inside=False)
        references = [models.load(model, Path(r)) for r in reference or []]
    with bar(as_json) as progress:
        chosen = cli_images.judged(pipeline, split, judge, drawings, progress) if judge else chosen
        verdict = planner.forget(
            net, chosen, split, references=references, methods=[method] if method else [], settings=given, seed=seed, folder=Path(out) / "checkpoints",
            retrain_passes=2 * retrain_epochs * len(split.retain) if retrain_epochs else None, slow=not quick, progress=progress,
        )  # fmt: skip
    document = verdict.save(out, f"Forget {split.asked or forget}", _key(key_file))
    if tokenizer is not None and (folder := texts.released(verdict, net, tokenizer, Path(out) / "released", form=form, base=model)):
        document["released"] = str(folder)
    if pipeline is not None and (folder := images.released(verdict, pipeline, Path(out) / "released", form=form)):
        document["released"] = str(folder)
    _told(verdict, document, out, as_json)
    raise typer.Exit(0 if verdict.passed else 1)


def _told(verdict: Any, document: dict[str, Any], out: str, as_json: bool) -> None:
    """The report, and what to do with what was written."""
    show(document, as_json)
    if not as_json:
        cli_texts.told(verdict, document, out)
        for line in verdict.doubts:
            print(line)


def _needs(value: str, name: str) -> None:
    from expunge.core.errors import SettingError

    if not value:
        raise SettingError(f"{name} is missing")


@app.command()
def run(recipe: str, as_json: Json = False) -> None:
    """Carry out a recipe file. Example: expunge run recipes/digits-class.toml"""
    from expunge.planning import recipe as recipes

    with bar(as_json) as progress:
        verdict, document = recipes.run(found := recipes.read(recipe), progress=progress)
    _told(verdict, document, found.out, as_json)
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def audit(
    model: Annotated[str, typer.Option(help="py:module:factory; texts: the folder of the model before.")],
    forget: Annotated[str, typer.Option()] = "", concept: Concept = "", weights: Annotated[str, typer.Option(help="Weights before.")] = "",
    train: Annotated[str, typer.Option()] = "",
    patch: Annotated[str, typer.Option(help="Patch to audit.")] = "", after: Annotated[str, typer.Option(help="Or: weights after.")] = "", test: str = "",
    validation: str = "", task: TaskName = "classification",
    reference: Annotated[list[str] | None, typer.Option()] = None, retain: Retain = "", anchor: Anchor = "", general: General = "",
    template: Template = "auto", mask: Mask = "answer+eos", max_length: MaxLength = 0, dtype: Dtype = "auto", out: str = "", key_file: Key = "",
    judge: Judge = "", drawings: Drawings = 0,
    shadows: Annotated[int, typer.Option(help="Train this many shadow models (64, say) for per-example attacks; kept and used again.")] = 0,
    training: Annotated[str, typer.Option(help='How the model was trained, for --shadows: "epochs=30 batch_size=50 lr=0.05".')] = "",
    unlearn_shadows: Annotated[int, typer.Option(help="Run the patch's method on this many shadows, for the attack U-LiRA.")] = 0,
    pools: Annotated[str, typer.Option(help="Folder that keeps shadow models.")] = ".cache/expunge", seed: int = 0, quick: Quick = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Audit a patch, or weights from any other tool, against the model before and retrained references.

    Prints the verdict, then the sections of named checks, weakest first.
    Pipelines: expunge audit --task diffusion --model DIR --after out/released --concept "tench" --retain "goldfish,hen" --judge VIT-DIR --drawings 25
    """
    from expunge.core.errors import SettingError
    from expunge.core.patch import Patch
    from expunge.engine.run import Attempt
    from expunge.modalities import models
    from expunge.modalities.diffusion import request as images
    from expunge.modalities.language import checkpoints
    from expunge.planning import outcome
    from expunge.planning.recipe import prepare

    if bool(patch) == bool(after):
        raise SettingError("name either --patch or --after")
    parts, pipeline = {"retain": retain, "anchor": anchor, "general": general}, None
    cli_texts.check(task, "auto", parts)
    forget = cli_images.asked(task, forget, concept, {"train": train, "weights": weights, "test": test, "validation": validation, **parts}, judge, drawings)
    if task in (*TEXT, *IMAGE) and shadows:
        raise SettingError("shadow models are for classification and regression")
    found = Patch.load(patch, _key(key_file)) if patch else None
    if task in IMAGE:
        pipeline, split, references = cli_images.request(model, forget, anchor, retain, reference, dtype)
        before, chosen, now = pipeline.model, pipeline.task, images.opened(pipeline, after or model, dtype)
    elif task in TEXT:
        files = {"forget": forget, "test": test, "validation": validation, **parts}
        before, _, chosen, split, references = cli_texts.request(model, files, reference, template=template, mask=mask, max_length=max_length, dtype=dtype)
        now = checkpoints.load(after or model, dtype=dtype)[0]
    else:
        _needs(weights, "--weights")
        _needs(train, "--train")
        before, now = models.load(model, Path(weights)), models.load(model, Path(after or weights))
        chosen, split = prepare(_recipe(model, weights, train, test, validation, forget, task, [], []), inside=False)
        references = [models.load(model, Path(r)) for r in reference or []]
    if found is not None:
        found.apply(now)
    with bar(as_json) as progress:
        chosen = cli_images.judged(pipeline, split, judge, drawings, progress) if judge else chosen
        pool, forgotten = _pools(before, chosen, split, shadows, unlearn_shadows, training, pools, found, progress)
        meta = {} if found is None else found.meta
        attempt = Attempt(str(meta.get("method", "given")), meta.get("settings", {}), int(meta.get("seed", seed)), "ok", "", found)
        verdict = outcome.audited(before, now, chosen, split, references=references, seed=seed, attempt=attempt, slow=not quick, pool=pool, forgotten=forgotten)
    title = f"Audit of {Path(patch or after).name}"
    show(verdict.save(out, title) if out else verdict.document(title), as_json)
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def select(
    model: ModelSpec, weights: Annotated[str, typer.Option(help="Weights of the trained model.")], train: Annotated[str, typer.Option()],
    size: Annotated[int, typer.Option(help="How many records.")], how: Annotated[str, typer.Option(help="hardest, easiest, vulnerable or random.")] = "hardest",
    out: Annotated[str, typer.Option(help="Where the ids go, one per line.")] = "gone.txt", test: str = "", task: str = "classification",
    shadows: Annotated[int, typer.Option(help="Shadow models, for --how vulnerable.")] = 0,
    training: Annotated[str, typer.Option(help='How the model was trained, for --shadows: "epochs=30 batch_size=50 lr=0.05".')] = "",
    pools: Annotated[str, typer.Option(help="Folder that keeps shadow models.")] = ".cache/expunge", seed: int = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Choose a forget set to audit on: the records that are hardest (or easiest) to forget, or that membership shows in most.

    Example: expunge select --model py:models:factory --weights m.safetensors --train csv:train.csv --size 100; then --forget ids:@gone.txt
    """
    import torch

    from expunge.core.errors import SettingError, suggest
    from expunge.core.files import write
    from expunge.data.records import worst
    from expunge.modalities import models
    from expunge.modalities import readers as load
    from expunge.modalities.classification.task import classification

    ways = ("hardest", "easiest", "vulnerable", "random")
    if how not in ways:
        raise SettingError(suggest("no way to select", how, ways))
    if task != "classification":
        raise SettingError("select works on classification")
    net, data = models.load(model, Path(weights)), load.load(train, task, Path.cwd(), inside=False)
    with bar(as_json) as progress:
        if how == "vulnerable":
            unseen = load.load(test, task, Path.cwd(), inside=False) if test else None
            rows = _shadows(net, classification(), data, unseen, shadows, training, pools, progress).vulnerable(data, size)
        elif how == "random":
            rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:size].sort().values
        else:
            rows = worst.select(net, classification(), data, size, easiest=how == "easiest", seed=seed, progress=progress)
    ids = data.ids[rows].tolist()
    write(out, "".join(f"{i}\n" for i in ids))
    show({"how": how, "ids": ids, "file": out}, True) if as_json else print(f"{len(ids)} {how} records: use --forget ids:@{out}")


def _shadows(net, task, data, unseen, shadows: int, training: str, folder: str, progress):
    """A pool over training data and unseen records."""
    from expunge.audits import pool
    from expunge.core.errors import SettingError
    from expunge.core.types import Split

    if not shadows:
        raise SettingError("--how vulnerable needs --shadows and --training")
    return pool.shadows(net, task, pool.universe(Split(data, None, unseen)), pool.recipe(training), k=shadows, folder=Path(folder), progress=progress)


def _pools(model, task, split, shadows: int, unlearn_shadows: int, training: str, folder: str, patch, progress) -> tuple[Any, Any]:
    """The pool of shadow models, and the same after the patch's method; None for what was not asked for."""
    from expunge.audits import pool
    from expunge.audits.stats import matched
    from expunge.core.errors import SettingError

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
    return found, pool.forgotten(found, patch.meta["method"], data, records, settings, k=unlearn_shadows, progress=progress)


@app.command()
def apply(
    patch: str,
    model: Annotated[str, typer.Option(help="py:module:factory; texts: a folder that save_pretrained wrote.")],
    weights: Weights = "",
    out: Annotated[str, typer.Option(help="Where the new weights go; texts: a folder.")] = "out",
    form: Form = "auto",
    dtype: Dtype = "auto",
    key_file: Key = "",
    as_json: Json = False,
) -> None:
    """Write the weights with the patch applied, and OUT's inverse patch beside it (NAME.undo.safetensors), which restores every bit.

    For a model folder: write a merged folder and OUT.undo.safetensors, or a PEFT adapter folder, whose base stays as it is. Both load without expunge. For a
    pipeline: the same, the adapter a LoRA that plain diffusers loads, or an SPM. A patch fits the weights at the dtype that it was made with (--dtype).
    """
    from expunge.core.patch import Patch

    found = Patch.load(patch, _key(key_file))
    key = _key(key_file)
    if cli_images.is_pipeline(model):
        written = cli_images.apply(found, model, out, dtype, key, form)
    elif Path(model).is_dir():
        written = cli_texts.apply(found, model, out, form, dtype, key)
    else:
        written = _changed(found, model, weights, out, Path(out).with_suffix(".undo.safetensors"), key)
    _wrote(written, as_json)


@app.command()
def revert(
    patch: str,
    model: Annotated[str, typer.Option(help="py:module:factory; texts: the folder that apply wrote.")],
    out: Annotated[str, typer.Option(help="Where the restored weights go; texts: a folder.")],
    weights: Weights = "",
    key_file: Key = "",
    as_json: Json = False,
) -> None:
    """Apply an inverse patch: the weights before, bit for bit."""
    from expunge.core.patch import Patch

    found = Patch.load(patch, _key(key_file))
    if Path(model).is_dir():
        _wrote((cli_images if cli_images.is_pipeline(model) else cli_texts).revert(found, model, out), as_json)
        return
    _needs(weights, "--weights")
    _wrote(_changed(found, model, weights, out, None, None), as_json)


def _changed(patch: Any, model: str, weights: str, out: str, undo: Path | None, key: bytes | None) -> list[str]:
    """What was written: the weights with the patch in them, and the inverse patch where `undo` names a file."""
    from expunge.modalities import models

    net = models.load(model, Path(weights) if weights else None)
    inverse = patch.apply(net)
    written = [str(models.save_state(net, out))]
    return written if undo is None else [*written, str(inverse.save(undo, key))]


def _wrote(written: list[str], as_json: bool) -> None:
    print(json.dumps({"written": written}) if as_json else "wrote " + " and ".join(written))


@app.command()
def inspect(patch: str, key_file: Key = "", as_json: Json = False) -> None:
    """Show what a patch file holds, after checking its digest (and signature)."""
    from expunge.core.patch import Patch

    found = Patch.load(patch, _key(key_file))
    names = [{"name": e.name, "kind": type(e).__name__, "places": Patch((e,)).places} for e in found.edits]
    if as_json:
        print(json.dumps({"meta": dict(found.meta), "digest": found.digest, "edits": names}))
        return
    for key, value in found.meta.items():
        print(f"{key:10} {value}")
    print(f"digest     {found.digest}")
    for e in names:
        print(f"  {e['kind']:8} {e['name']:40} {e['places']:,} values")


@app.command()
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


@app.command()
def bench(
    world: str = "digits",
    methods: Annotated[str, typer.Option(help="Names joined by commas; all, and labels of variants beside it: all,esd+retain.")] = "all",
    seeds: Annotated[str, typer.Option(help="How many, or which: 1..2.")] = "3",
    scenarios: Annotated[str, typer.Option(help="Names joined by commas; all of the world's without it.")] = "",
    references: Annotated[int, typer.Option(help="Retrained models that each cell is read against; -1: 3, and none for drawings.")] = -1,
    out: str = "bench-out",
    audit_power: Annotated[bool, typer.Option("--audit-power", help="Audit the audit: a population of models of known truth.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare methods on a world (digits, cifar10, tofu-tiny, shapes, ...); writes OUT/WORLD.jsonl and OUT/WORLD.md, and goes on where it was stopped."""
    import torch

    from expunge.report.table import strict

    torch.set_num_threads(1)
    chosen = tuple(filter(None, scenarios.split(",")))
    with bar(as_json) as progress:
        if audit_power:
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


def _key(path: str) -> bytes | None:
    if not path:
        return None
    from expunge.core.errors import DataError

    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the key file: {error.strerror}") from None
