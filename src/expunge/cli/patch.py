"""expunge apply, revert, inspect: patches on files."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from expunge.cli.options import with_options
from expunge.cli.shown import Json, Key, key, wrote


@with_options("weights", "form", "dtype")
def apply(
    patch: str, model: Annotated[str, typer.Option(help="py:module:factory; texts: a folder that save_pretrained wrote.")], options: dict[str, Any],
    out: Annotated[str, typer.Option(help="Where the new weights go; texts: a folder.")] = "out", key_file: Key = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Write the weights with the patch applied, and OUT's inverse patch beside it (NAME.undo.safetensors), which restores every bit.

    For a model folder: write a merged folder and OUT.undo.safetensors, or a PEFT adapter folder, whose base stays as it is. Both load without expunge. For a
    pipeline: the same, the adapter a LoRA that plain diffusers loads, or an SPM. A patch fits the weights at the dtype that it was made with (--dtype).
    """
    from expunge.core.modality import holding
    from expunge.core.patch import Patch

    found = Patch.load(patch, key(key_file))
    wrote(holding(model).apply(found, model, out, key(key_file), options), as_json)


@with_options("weights")
def revert(
    patch: str, model: Annotated[str, typer.Option(help="py:module:factory; texts: the folder that apply wrote.")],
    out: Annotated[str, typer.Option(help="Where the restored weights go; texts: a folder.")], options: dict[str, Any], key_file: Key = "",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Apply an inverse patch: the weights before, bit for bit."""
    from expunge.core.modality import holding
    from expunge.core.patch import Patch

    found = Patch.load(patch, key(key_file))
    wrote(holding(model).revert(found, model, out, options), as_json)


def inspect(patch: str, key_file: Key = "", as_json: Json = False) -> None:
    """Show what a patch file holds, after checking its digest (and signature)."""
    from expunge.core.errors import printable
    from expunge.core.patch import Patch

    found = Patch.load(patch, key(key_file))
    names = [{"name": e.name, "kind": type(e).__name__, "places": Patch((e,)).places} for e in found.edits]
    if as_json:
        print(json.dumps({"meta": dict(found.meta), "digest": found.digest, "edits": names}))
        return
    for name, value in found.meta.items():
        print(f"{printable(str(name)):10} {printable(str(value))}")
    print(f"digest     {found.digest}")
    for e in names:
        print(f"  {e['kind']:8} {printable(e['name']):40} {e['places']:,} values")
