"""A request over texts in files: model folder, records, a selector -> model, task, split. What the command line and recipes start from, and hand over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.errors import ModelError, SettingError, SplitError, printable
from expunge.core.modality import Opened, Request
from expunge.core.types import Split, Task
from expunge.modalities.examples import Examples
from expunge.modalities.files.requests import share
from expunge.modalities.files.selectors import echoed, resolve
from expunge.modalities.rows import listed
from expunge.modalities.text_classification import checkpoints
from expunge.modalities.text_classification.task import text_classification
from expunge.modalities.text_classification.texts import Fields, identified, numbered, records
from expunge.modalities.text_classification.texts import read as read_file
from expunge.parts.provenance import referred


def read(request: Request) -> Opened:
    """Models from their folders, and the split. Raises DataError, SplitError, SettingError or ModelError that name the file and what to do."""
    rows, given = files(request), request.options
    model, tokenizer = checkpoints.load(request.path(request.model), dtype=given["dtype"])
    length, names = checkpoints.limit(model, tokenizer, given["max_length"]), _names(model)
    called = [given[part] for part in rows]
    parts = dict(zip(rows, records(tokenizer, *rows.values(), names=names, max_length=length, called=called), strict=True))
    found = split(request, parts, names)
    lines = (*counted(rows, given), printable(f"forget {found.asked}: {echoed(chosen(request.what, names)[0], parts['train'], found.forget)}"))

    def load(folder: str) -> nn.Module:
        return checkpoints.load(request.path(folder), dtype=given["dtype"], finite=False)[0]

    after = load(request.after or request.model) if request.audit else None

    def release(verdict: Any, folder: Path, form: str = "") -> Path | None:
        return None if verdict.chosen is None else checkpoints.release(model, tokenizer, verdict.chosen.attempt.patch, folder)

    references = [referred(load(r), request.path(r)) for r in request.references]
    return Opened(model, text_classification(tokenizer), found, references, after, release, ("merged",), checkpoints.plain, read=lines)


def counted(rows: Mapping[str, list[dict[str, Any]]], given: Mapping[str, Any]) -> list[str]:
    """A line on each file: how many records, and which of its fields are what."""
    said = f"read as {given['text_column']} -> {given['label_column']}"
    out = []
    for part, found in rows.items():
        more = [f"named by {given['id_column'] or 'id'}"] if any("id" in row for row in found) else []
        more += [f"left out: {given['ignore']}"] if given["ignore"] else []
        out.append(printable(f"{part}: {len(found):,} records of {Path(given[part]).name}, {said}" + (f" ({'; '.join(more)})" if more else "")))
    return out


def load(request: Request) -> Any:
    """The model of the folder after, where the request names one, or of the one before."""
    return checkpoints.load(request.path(request.after or request.model), dtype=request.options["dtype"], finite=not request.after)[0]


def files(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Part -> records, of train, test and validation where they are files."""
    given = request.options
    if not given["train"]:
        raise SettingError("--train is missing")
    named = {part: given[part] for part in ("train", "test", "validation") if given[part] and not (part == "validation" and given[part].startswith("share:"))}
    fields = Fields(given["text_column"], given["label_column"], given["id_column"] or "id", listed(given["ignore"]))
    if len({fields.text, fields.label, fields.id}) < 3:
        raise SettingError(printable(f"text, label and id must be three columns, not {fields.text}, {fields.label} and {fields.id}"))
    return {part: read_file(request.path(name), fields) for part, name in named.items()}


def split(request: Request, parts: Mapping[str, Examples], names: Mapping[str, int]) -> Split:
    """Forget and retain of train by the selector, test and validation, a share of test where none is named."""
    what, asked = chosen(request.what, names)
    forget, retain = resolve(what, parts["train"], request.folder, inside=request.inside)
    test, validation = parts.get("test"), parts.get("validation")
    if (part := share(request.options["validation"])) and test is not None and validation is None and (cut := int(part * len(test))):
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        test, validation = test.take(order[cut:]), test.take(order[:cut])
    return Split(forget, retain, test, validation, asked=asked)


def chosen(selector: str, names: Mapping[str, int]) -> tuple[str, str]:
    """A selector with the class by its number, and the same in words. Raises SplitError for a class that is not there, or a selector that texts have not.

    >>> chosen("class:sport", {"news": 0, "sport": 1}), chosen("class:0", {"news": 0, "sport": 1})
    (('class:1', 'class:1 (sport)'), ('class:0', 'class:0 (news)'))
    """
    kind, _, value = selector.partition(":")
    if kind == "range":
        raise SplitError(f"texts have no range of targets: '{selector}'; write one of class:NAME, class:3, ids:17,42, ids:@file, random:0.1")
    if kind != "class" or not value:
        return selector, selector
    called = {number: name for name, number in names.items()}
    number = names[value] if value in names else int(value) if value.isdecimal() else -1
    if names and number not in called:
        raise SplitError(f"no class '{value}'; the model's classes are {', '.join(f'{name} ({k})' for k, name in sorted(called.items())[:12])}")
    plain = called.get(number, f"LABEL_{number}") == f"LABEL_{number}"
    return f"class:{number}", f"class:{number}" if plain else f"class:{number} ({called[number]})"


def sized(request: Request) -> tuple[Task, Split, Any]:
    """The task, a split of the files' records for planning (their numbers and classes are right, their tokens are not), and the model's skeleton where it is
    named; without it, classes in words are numbered by the alphabet."""
    rows = files(request)
    words = sorted({r["label"] for part in rows.values() for r in part if isinstance(r["label"], str)})
    names = checkpoints.classes(request.path(request.model)) if request.model else {word: k for k, word in enumerate(words)}

    def stand_in(part: str, found: list[dict[str, Any]]) -> Examples:
        tokens = torch.tensor([[int.from_bytes(hashlib.blake2b(r["text"].encode(), digest_size=7).digest(), "big")] for r in found])
        y = numbered(found, names, request.options[part])
        ids, called = identified(found, request.options[part])
        return Examples({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, y, ids, names=called)

    found = split(request, {part: stand_in(part, some) for part, some in rows.items()}, names)
    return text_classification(), found, checkpoints.skeleton(request.path(request.model)) if request.model else None


def _names(model: nn.Module) -> dict[str, int]:
    config: Any = model.config
    return {name: number for number, name in config.id2label.items()}


def holds(model: str) -> int:
    """Surely, where its configuration names a text classifier."""
    try:
        return 2 if checkpoints.configured(model) else 0
    except ModelError:
        return 0


def apply(patch: Any, model: str, out: str, key: bytes | None, options: Mapping[str, Any]) -> list[str]:
    """What was written: the folder with the patch in it, and the inverse patch beside it."""
    _apart(model, out)
    net, tokenizer = checkpoints.load(model, dtype=options["dtype"])
    undo = Path(out).with_name(f"{Path(out).name}.undo.safetensors")
    return [str(checkpoints.release(net, tokenizer, patch, out, undo=undo, key=key)), str(undo)]


def revert(patch: Any, model: str, out: str, options: Mapping[str, Any]) -> list[str]:
    """What was written: the folder with the weights before."""
    _apart(model, out)
    net, tokenizer = checkpoints.load(model)
    patch.apply(net)
    return [str(checkpoints.save(net, tokenizer, out))]


def _apart(model: str, out: str) -> None:
    if Path(model).resolve() == Path(out).resolve():
        raise ModelError(f"--out {Path(out).name} is the model's own folder; name another, and the model stays as it is")


def told(verdict: Any, document: Mapping[str, Any], out: str) -> list[str]:
    """What to do with what a run has written."""
    return [f"wrote {document['released']}, which transformers loads as it did the model"] if "released" in document else []
