"""The part of the command line that is about texts: its options, and what its commands do with model folders. Nothing heavy is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.planning.recipe import IMAGE, TEXT

Retain = Annotated[str, typer.Option(help="Texts: JSONL of what must stay; pipelines: concepts to keep, a,b,c or @FILE.")]
Anchor = Annotated[str, typer.Option(help="Texts: the forget questions, row by row, with what to say instead; pipelines: what to draw instead.")]
General = Annotated[str, typer.Option(help="Texts: what the model knows besides; the audit reads it, no method does.")]
Template = Annotated[str, typer.Option(help="Texts: auto (chat where the tokenizer has a template), plain, chat, or a text with {question} in it.")]
Mask = Annotated[str, typer.Option(help="Texts: which tokens are trained and scored: answer+eos, answer, full or entity.")]
MaxLength = Annotated[int, typer.Option(help="Texts: in tokens; 0 is the model's context, at most 512.")]
Dtype = Annotated[str, typer.Option(help="Texts: auto (as stored), float32 or bfloat16.")]
Form = Annotated[str, typer.Option(help="Folders: merged (all of it), peft (texts) or adapter (pipelines; ungated: an SPM without its gate), or auto.")]


def check(task: str, form: str, files: dict[str, str]) -> None:
    """Raises SettingError for an unknown task or form, and for options of texts and pipelines with another task."""
    from expunge.core.errors import SettingError
    from expunge.planning.recipe import checked

    checked(task, form)
    if task not in (*TEXT, *IMAGE) and (given := [name for name, value in files.items() if value]):
        raise SettingError(f"--{given[0]} is a file of texts, for --task causal-lm; for a setting of the method write --METHOD.{given[0]} VALUE")


def request(model: str, files: dict[str, str], reference: list[str] | None, **form: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Model, tokenizer, task, split and references; `form` is that of `texts.prepare`."""
    from expunge.modalities.language import checkpoints
    from expunge.modalities.language import request as texts

    found = texts.prepare(model, files, **form)
    return *found, [checkpoints.load(r, dtype=form["dtype"])[0] for r in reference or []]


def apply(patch: Any, model: str, out: str, form: str, dtype: str, key: bytes | None) -> list[str]:
    """What was written: the folder with the patch in it, and, where the folder is a whole model, the inverse patch beside it."""
    from expunge.modalities.language import checkpoints

    net, tokenizer = checkpoints.load(model, dtype=dtype)
    undo = Path(out).with_name(f"{Path(out).name}.undo.safetensors")
    written = checkpoints.release(net, tokenizer, patch, out, form=form, base=model, undo=undo, key=key)
    return [str(written)] + ([] if checkpoints.is_adapter(written) else [str(undo)])


def revert(patch: Any, model: str, out: str) -> list[str]:
    """What was written: the folder with the weights before. Raises ModelError for an adapter, whose base never changed."""
    from expunge.core.errors import ModelError
    from expunge.modalities.language import checkpoints

    if checkpoints.is_adapter(Path(model)):
        raise ModelError(f"{Path(model).name} is an adapter: its base was never changed, so there is nothing to revert; load the base without it")
    net, tokenizer = checkpoints.load(model)
    patch.apply(net)
    return [str(checkpoints.save(net, tokenizer, out))]


def told(verdict: Any, document: dict[str, Any], out: str) -> None:
    """Print what to do with what a run has written."""
    from expunge.modalities.language.request import guarded

    if "released" in document:
        print(f"wrote {document['released']}, which loads without expunge")
    if guarded(verdict):
        print(f"{out}/patch.safetensors is an inference-time guard and changes no weight: serve the model with it (expunge.serve)")


def demo(result: dict[str, Any], out: str) -> None:
    """Print what `demo_llm.demo` gave, after its report: answers before and after, and what was released."""
    for turn in result["talk"]:
        print(f"\n[{turn['about']}] {turn['question']}\n  before  {turn['before']}\n  after   {turn['after']}")
    print(f"\nreport in {out}/report.html and report.json")
    if result["released"]:
        print(f"released model in {result['released']}: loaded without expunge it gives {'the same' if result['same_answers'] else 'OTHER'} answers")
        print(f"patch applied and reverted: the model is {'bit-identical' if result['reverted'] else 'NOT bit-identical'}")
    print(f"{result['seconds']:.0f} seconds")
