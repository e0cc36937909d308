"""A language request from files: model folder, forget, retain and the other parts as JSON lines -> model, task, split. What the command line and recipes start
from, and what they hand over in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import Hook
from expunge.core.errors import SplitError
from expunge.core.types import Split, Task
from expunge.modalities.language import checkpoints
from expunge.modalities.language.records.format import Format, split, windows
from expunge.modalities.language.records.readers import read_jsonl
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.texts import Texts

PARTS = ("forget", "retain", "test", "validation", "anchor", "general")


def prepare(
    folder: Path | str, files: Mapping[str, str], *, template: str = "auto", mask: str = "answer+eos", max_length: int = 0, dtype: str = "auto",
    validation: float = 0.3, within: Path | None = None,
) -> tuple[nn.Module, Any, Task, Split]:  # fmt: skip
    """(model, tokenizer, task, split).

    files        part -> JSONL file of question and answer, or text; forget must be there
    template     auto takes the tokenizer's chat template if it has one, plain otherwise; see `modalities.language.records.format.Format` for the others
    max_length   in tokens; 0 takes the model's context, at most 512. Longer raw texts are cut into windows of that length
    validation   share of test that tuning may read, when no validation file is named
    within       folder that the base of an adapter may not leave
    Raises DataError, SplitError or ModelError that name the file, the line and what to do.
    """
    if not files.get("forget"):
        raise SplitError("no forget file; name one with --forget")
    model, tokenizer = checkpoints.load(folder, dtype=dtype, within=within)
    context = int(getattr(model.config, "max_position_embeddings", 0) or 512)  # pyright: ignore
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    form = Format(tokenizer, template, mask, max_length or min(context, 512))
    rows = {part: pieces(read_jsonl(path), form) for part, path in files.items() if path}
    found = split(form, **rows)
    if found.test is not None and found.validation is None and validation > 0:
        order = torch.randperm(len(found.test), generator=torch.Generator().manual_seed(0))
        cut = int(validation * len(order))
        found = replace(found, test=found.test.take(order[cut:].sort().values), validation=found.test.take(order[:cut].sort().values) if cut else None)
    name = Path(files["forget"]).name
    return model, tokenizer, causal_lm(tokenizer), replace(found, asked=f"{len(found.forget)} records of {name}")


def pieces(rows: list[dict[str, Any]], form: Format) -> list[dict[str, Any]]:
    """The records, raw texts cut into windows that fit `form.max_length`."""
    out = []
    for row in rows:
        if "question" in row:
            out.append(row)
        else:
            out += [{**row, "text": piece} for piece in windows(row["text"], form.tokenizer, form.max_length - 1)] or [row]
    return out


def sized(files: Mapping[str, str]) -> tuple[Task, Split]:
    """The task, and a split of the files' records for planning alone: their number is right, their tokens are bytes."""
    found: dict[str, Any] = {}
    for part, path in files.items():
        if path:
            rows = read_jsonl(path)
            tokens = tuple(torch.tensor(list(str(row).encode())) for row in rows)
            found[part] = Texts(tokens, tuple(torch.ones(len(t), dtype=torch.bool) for t in tokens), torch.arange(len(rows)), tuple(rows))
    return causal_lm(), Split(**found)


def released(verdict: Any, model: nn.Module, tokenizer: Any, out: Path | str, *, form: str = "auto", base: str = "") -> Path | None:
    """The folder `out`, written as `checkpoints.release` does with the patch that passed; None where none passed, or one that changes no weight."""
    if verdict.chosen is None or guarded(verdict):
        return None
    return checkpoints.release(model, tokenizer, verdict.chosen.attempt.patch, out, form=form, base=base)


def guarded(verdict: Any) -> bool:
    """Whether what passed is an inference-time guard: the weights are as before, and the patch is served."""
    return verdict.chosen is not None and any(isinstance(e, Hook) for e in verdict.chosen.attempt.patch.edits)
