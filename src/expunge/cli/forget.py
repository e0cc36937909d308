"""expunge forget, expunge run: a request from files to a verdict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.options import TASK, TASK_HELP, asked, tasks, with_options
from expunge.cli.shown import Anyway, Json, Key, Quick, Require, Twins, Workers, bar, key, show, understood
from expunge.core.errors import DataError, SettingError, printable


def apart(words: list[str]) -> tuple[list[str], list[str]]:
    """(words that belong to no setting: MODEL and REQUEST, the settings).

    >>> apart(["net", "--keep", "0.3", "--soft=1", "class:3"])
    (['net', 'class:3'], ['--keep', '0.3', '--soft=1'])
    """
    bare = [i for i, w in enumerate(words) if not w.startswith("--") and (not i or not words[i - 1].startswith("--") or "=" in words[i - 1])]
    return [words[i] for i in bare], [w for i, w in enumerate(words) if i not in bare]


def settings(method: str, extra: list[str], preset: str = "") -> dict[str, Any]:
    """`--keep 0.3 --soft` after a method -> the settings that were named, over all those of a preset; raises SettingError with the nearest name.
    `--npo.retain none` names the method's own retain, where the command has an option of that name."""
    from expunge.core.registry import METHODS

    found: dict[str, Any] = {}
    words = [part for word in extra for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise SettingError(f"cannot read '{printable(word)}'; write settings as --name value")
        found[word[2:].removeprefix(f"{method}.").replace("-", "_")] = words.pop(0) if words and not words[0].startswith("--") else "true"
    if found and not method:
        raise SettingError(f"--{next(iter(found))} is no option of this command, and settings need --method")
    if preset and not method:
        raise SettingError("--preset needs --method, whose settings it sets")
    read = METHODS[method].settings(found) if found else {}
    return {**(METHODS[method].preset(preset) if preset else {}), **{name: read[name] for name in found}}


@with_options()
def forget(
    context: typer.Context,
    options: dict[str, Any], model: Annotated[str, typer.Option(help="The same as MODEL.")] = "",
    forget: Annotated[str, typer.Option(help="The same as REQUEST.")] = "",
    task: Annotated[str, typer.Option(help=TASK_HELP.format(tasks()))] = TASK,
    method: Annotated[str, typer.Option(help="One method; its settings follow as flags.")] = "",
    preset: Annotated[str, typer.Option(help="paper: the method's settings as published, under those named as flags.")] = "",
    reference: Annotated[list[str] | None, typer.Option(help="Weights (texts: folder) of a retrained model; repeat for several.")] = None,
    retrain_epochs: Annotated[float, typer.Option(help="What training anew takes, so that cost is told as a share of it; 0: not told.")] = 0.0,
    seed: int = 0, out: Annotated[str, typer.Option(help="Folder that gets a folder per run.")] = "out",
    require: Require = "", twins: Twins = 0, workers: Workers = 1,
    keep_candidate: Annotated[bool, typer.Option("--keep-candidate", help="Write the best try that did not pass, marked, beside the report.")] = False,
    minutes: Annotated[float, typer.Option(help="Wall time after which no run begins; 0 is no limit.")] = 0.0,
    key_file: Key = "", quick: Quick = False, anyway: Anyway = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Unlearn, audit, gate: searches all feasible methods, or takes --method NAME with its settings (--keep 0.3).

    \b
    MODEL    a folder of transformers, PEFT or diffusers, timm:NAME, or py:module:factory with --weights
    REQUEST  class:cat, ids:17,42, ids:@file, range:0..30, random:0.1 (or 500); language models: a file of texts; pipelines: a concept

    \b
    expunge forget py:nets:make class:3 --weights w.safetensors --train csv:train.csv?target=label --test csv:test.csv?target=label
    expunge forget DIR gone.jsonl --retain stays.jsonl --test unseen.jsonl --method npo --lora 16
    expunge forget DIR "Van Gogh style" --anchor painting --method uce

    A setting that is called like an option of this command is written with its method: --npo.retain none.
    """
    from expunge.core.machine.bounds import number, size_of
    from expunge.core.modality import Request
    from expunge.core.types import bytes_of
    from expunge.engine.log import kept
    from expunge.planning import plan as planner
    from expunge.planning.folders import fit
    from expunge.planning.releasing import finished

    words, rest = apart(context.args)
    modality, model, what, mine = asked(task, model, options, forget, words)
    given = {method: found} if (found := settings(method, rest, preset)) else {}
    number("--retrain-epochs", retrain_epochs, 0)
    number("--minutes", minutes, 0)
    size_of("--memory", memory := mine.get("memory", ""))
    fit(out)
    secret = key(key_file)
    with bar(as_json) as progress, kept(out) as settle:
        opened = modality.open(Request(model, what, mine, tuple(reference or ()), progress=progress))
        fit(out, bytes_of(opened.model))
        verdict = planner.forget(
            opened.model, opened.task, opened.split, references=opened.references, methods=[method] if method else [], settings=given, seed=seed,
            folder=Path(out) / "checkpoints", retrain_passes=2 * retrain_epochs * len(opened.split.retain) if retrain_epochs else None, slow=not quick,
            progress=progress, require=require, twins=twins, workers=workers, minutes=minutes or math.inf, memory=memory,
            ready=lambda: understood(opened, anyway, as_json),
        )  # fmt: skip
        verdict, document = finished(verdict, opened, out, f"Forget {opened.split.asked or what}", secret, candidate=keep_candidate)
        settle(document["folder"])
    closing(modality, verdict, document, as_json)


def run(recipe: str, as_json: Json = False) -> None:
    """Carry out a recipe file. Example: expunge run recipes/digits-class.toml"""
    from expunge.core.modality import named
    from expunge.engine.log import kept
    from expunge.planning import recipe as recipes

    found = recipes.read(recipe)
    with bar(as_json) as progress, kept(found.folder / found.out) as settle:
        verdict, document = recipes.run(found, progress=progress)
        settle(document["folder"])
    closing(named(found.task), verdict, document, as_json)


def closing(modality: Any, verdict: Any, document: dict[str, Any], as_json: bool) -> None:
    """The report, where everything is, what to do with it, and the exit code. Raises DataError, after that, where what passed could not be written."""
    show(document, as_json)
    for line in [] if as_json else [*modality.told(verdict, document, document["folder"]), *verdict.doubts, *places(document)]:
        print(line)
    if why := document.get("release", {}).get("unwritten"):
        raise DataError(f"{why}; what passed is kept in {document.get('candidate', 'no file')}")
    raise typer.Exit(0 if verdict.passed else 1)


def places(document: dict[str, Any]) -> list[str]:
    """Where report, patch, release and candidate are, and what to type next."""
    folder = Path(document["folder"])
    lines = [f"report    {folder / 'report.html'} (and report.json; {folder.parent / 'latest'} points to this run)"]
    if document.get("chosen") and "patch" in document["chosen"]:
        patch = folder / document["chosen"]["patch"]
        lines.append(f"patch     {patch}")
        lines.append(f"check it  expunge audit --check {folder / 'report.json'} --patch {patch}")
    if "released" in document:
        lines.append(f"released  {document['released']}: {document['release']['told']}")
    elif "release" in document:
        lines.append(f"released  nothing: {document['release']['told']}")
    if "candidate" in document:
        lines.append(f"candidate {document['candidate']}, a try that did not pass: to look at, not to use")
    return lines
