"""A language request from files: model folder, forget, retain and the other parts as JSON lines -> model, task, split. What the command line and recipes start
from, and what they hand over in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import Hook
from expunge.core.errors import DataError, ModelError, SettingError, SplitError, printable, suggest
from expunge.core.modality import Opened, Request
from expunge.core.types import Split, Task
from expunge.modalities.files.requests import share
from expunge.modalities.language import checkpoints
from expunge.modalities.language.benchmarks import table
from expunge.modalities.language.records import readers, selectors, served
from expunge.modalities.language.records.format import CUT, Format, split, windows
from expunge.modalities.language.records.readers import AS_IT_IS, Found, Reading
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.texts import Texts
from expunge.modalities.rows import content, listed
from expunge.parts.provenance import referred

PARTS = ("forget", "retain", "test", "validation", "anchor", "general", "plants")


def prepare(
    folder: Path | str, files: Mapping[str, str], *, what: str = "", template: str = "auto", mask: str = "answer+eos", max_length: int = 0, dtype: str = "auto",
    validation: float = 0.3, within: Path | None = None, how: Reading = AS_IT_IS, system: str = "",
) -> tuple[nn.Module, Any, Task, Split]:  # fmt: skip
    """(model, tokenizer, task, split).

    files        part -> file of question and answer, or text, or NAME:DIR/PART of a published benchmark (`benchmarks.table`). Forget must be there, or train,
                 all that the model was tuned on, of which `what` says what must go (`selectors.chosen`); the rest is retain
    template     auto takes the tokenizer's chat template if it has one, plain otherwise; see `modalities.language.records.format.Format` for the others
    max_length   in tokens; 0 takes the model's context, at most 512. Longer raw texts are cut into windows of that length
    validation   share of test that tuning may read, when no validation file is named
    within       folder that the base of an adapter may not leave
    how          which fields are read (`readers.Reading`)
    system       system message of records that bring none
    Raises DataError, SplitError or ModelError that name the file, the line and what to do.
    """
    return _prepared(folder, parts_of(files, what, how, within), template, mask, max_length, dtype, validation, within, system)[:4]


@dataclass(frozen=True)
class Parts:
    """The records of each part, a line each on how they were read, the name of the file that what must go stands in, and what was asked of --train."""

    rows: dict[str, list[dict[str, Any]]]
    lines: tuple[str, ...]
    name: str
    asked: str = ""


def parts_of(files: Mapping[str, Path | str], what: str = "", how: Reading = AS_IT_IS, within: Path | None = None, folder: Path | None = None) -> Parts:
    """All files read. Raises DataError for unseen texts of another form than those that must go, and for a field to ignore that no file has."""
    read = {part: rows_of(path, part, within, how) for part, path in files.items() if path}
    names = {part: table.called(str(files[part])) or Path(files[part]).name for part in read}
    lines = [f"{part}: {_counted(len(found.rows))} of {names[part]}, read as {found.told}" for part, found in read.items()]
    if "train" in read:
        if files.get("retain"):
            raise SplitError("--retain is what stays of --train already: name one of the two")
        forget, retain, told = selectors.chosen(what, read["train"].rows, folder or Path.cwd(), inside=within is not None)
        rows = {"forget": forget, "retain": retain, **{part: found.rows for part, found in read.items() if part != "train"}}
        lines.append(f"forget {told}")
        names["forget"] = names["train"]
    elif "forget" in read:
        rows = {part: found.rows for part, found in read.items()}
    else:
        raise SplitError("no forget file; name one with --forget")
    kinds = {part: "question and answer" if "question" in found[0] else "raw text" for part, found in rows.items()}
    for part in ("test", "validation", "plants"):
        if kinds.get(part, kinds["forget"]) != kinds["forget"]:
            raise DataError(f"{part} ({names[part]}) is {kinds[part]}, forget ({names['forget']}) {kinds['forget']}: unseen texts must be of the same form")
    fields = frozenset().union(*(found.fields for found in read.values()))
    if odd := [n for n in how.ignore if n not in fields]:
        raise DataError(printable(suggest("--ignore: no file has a field", odd[0], sorted(fields))))
    return Parts(rows, tuple(lines), names["forget"], printable(what))


def _counted(n: int) -> str:
    return f"{n} record{'s' if n > 1 else ''}"


def _prepared(
    folder: Path | str, read: Parts, template: str, mask: str, max_length: int, dtype: str, validation: float, within: Path | None, system: str
) -> tuple[nn.Module, Any, Task, Split, tuple[str, ...]]:
    """As `prepare`, and lines that say as what each file was read."""
    model, tokenizer = checkpoints.load(folder, dtype=dtype, within=within)
    context = int(getattr(model.config, "max_position_embeddings", 0) or 512)  # pyright: ignore
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    form = Format(tokenizer, template, mask, max_length or min(context, 512), system)
    found = split(form, **{part: pieces(rows, form) for part, rows in read.rows.items()})
    if found.test is not None and found.validation is None and validation > 0:
        order = torch.randperm(len(found.test), generator=torch.Generator().manual_seed(0))
        cut = int(validation * len(order))
        found = replace(found, test=found.test.take(order[cut:].sort().values), validation=found.test.take(order[:cut].sort().values) if cut else None)
    return model, tokenizer, causal_lm(tokenizer), replace(found, asked=read.asked or f"{len(found.forget)} records of {read.name}"), read.lines


def rows_of(path: Path | str, part: str, within: Path | None = None, how: Reading = AS_IT_IS) -> Found:
    """The records of a file, or of a part of a published benchmark: tofu:DIR/forget10."""
    spec = str(path)
    return readers.read(path, how) if table.split(spec) is None else Found(*table.read(spec, option=part, within=within), frozenset())


def files_of(request: Request) -> tuple[dict[str, str], str]:
    """(part -> where its file is, what must go of train)."""
    given = request.options
    first = {"train": given["train"]} if given["train"] else {"forget": request.what}
    named = {**first, **{n: given[n] for n in PARTS[1:]}, **({"validation": ""} if given["validation"].startswith("share:") else {})}
    return {n: _path(request, f) for n, f in named.items() if f}, request.what if given["train"] else ""


def reading(given: Mapping[str, Any]) -> Reading:
    """How an option of the command line, a recipe or `expunge.opened` says that files are read."""
    return Reading(listed(given["ignore"]), given["id_column"], given["turns"])


def instructed(request: Request) -> str:
    """The system message: the option as it stands, or the content of @FILE."""
    said = request.options["system"]
    return content(request.path(said[1:])).strip() if said.startswith("@") else said


def _path(request: Request, name: str) -> str:
    """Where a file is, or the folder of a benchmark. Raises DataError for one that leaves a folder that it may not leave."""
    found = table.split(name, request.folder)
    return str(request.path(name)) if found is None else f"{found[0]}:{request.path(found[1])}"


def pieces(rows: list[dict[str, Any]], form: Format) -> list[dict[str, Any]]:
    """The records, raw texts cut into windows that fit `form.max_length`."""
    out = []
    for row in rows:
        if "question" in row:
            out.append(row)
        else:
            text, cut = row["text"], windows(row["text"], form.tokenizer, form.max_length - 1)
            ends = bool(cut) and text.rstrip().endswith(cut[-1].rstrip())
            out += [{**row, "text": piece, **({} if ends and k == len(cut) else {CUT: True})} for k, piece in enumerate(cut, 1)] or [row]
    return out


def read(request: Request) -> Opened:
    """The request read. Raises DataError, SplitError, SettingError or ModelError that name the file and what to do."""
    given = request.options
    if given["form"] not in checkpoints.FORMS:
        raise SettingError(f"form must be one of {', '.join(checkpoints.FORMS)}, not '{given['form']}'")
    part = share(given["validation"])
    within = request.folder if request.inside else None
    files, what = files_of(request)
    model, tokenizer, task, found, lines = _prepared(
        request.path(request.model), parts_of(files, what, reading(given), within, request.folder), given["template"], given["mask"], given["max_length"],
        given["dtype"], part, within, instructed(request),
    )  # fmt: skip
    references = [referred(load(replace(request, after=r)), request.path(r)) for r in request.references]
    after = load(request) if request.audit or request.after else None

    def release(verdict: Any, folder: Path, form: str = "") -> Path | None:
        return released(verdict, model, tokenizer, folder, form=form or given["form"], base=request.model, place=request.path(request.model))

    def reload(folder: Path) -> nn.Module:
        return checkpoints.plain(folder, request.path(request.model))

    return Opened(
        model, task, found, references, after, release, ("auto", "merged") if given["form"] == "auto" else (given["form"],), reload,
        write=lambda net, path: checkpoints.save(net, tokenizer, path), read=(*lines, *served.told(served.fits(model, task, found))),
    )  # fmt: skip


def load(request: Request) -> nn.Module:
    """The model of the folder after, where the request names one, or of the one before."""
    within = request.folder.resolve() if request.inside else None
    return checkpoints.load(request.path(request.after or request.model), dtype=request.options["dtype"], within=within)[0]


def sized(request: Request) -> tuple[Task, Split, Any]:
    """The task, a split of the files' records for planning (their number is right, their tokens are bytes), and the model's skeleton where it is named."""
    found: dict[str, Any] = {}
    files, what = files_of(request)
    within = request.folder if request.inside else None
    for part, rows in parts_of(files, what, reading(request.options), within, request.folder).rows.items():
        tokens = tuple(torch.tensor(list(str(row).encode())) for row in rows)
        found[part] = Texts(tokens, tuple(torch.ones(len(t), dtype=torch.bool) for t in tokens), torch.arange(len(rows)), tuple(rows))
    return causal_lm(), Split(**found), checkpoints.skeleton(request.model) if request.model else None


def holds(model: str) -> int:
    """Surely, where its configuration names a causal language model, or it is an adapter of one; perhaps, where it is another folder."""
    return 2 if checkpoints.causal(Path(model)) else 1 if Path(model).is_dir() else 0


def apply(patch: Any, model: str, out: str, key: bytes | None, options: Mapping[str, Any]) -> list[str]:
    """What was written: the folder with the patch in it, and, where the folder is a whole model, the inverse patch beside it."""
    net, tokenizer = checkpoints.load(model, dtype=options["dtype"])
    undo = Path(out).with_name(f"{Path(out).name}.undo.safetensors")
    written = checkpoints.release(net, tokenizer, patch, out, form=options["form"], base=model, undo=undo, key=key)
    return [str(written)] + ([] if checkpoints.is_adapter(written) else [str(undo)])


def revert(patch: Any, model: str, out: str, options: Mapping[str, Any]) -> list[str]:
    """What was written: the folder with the weights before. Raises ModelError for an adapter, whose base never changed."""
    if checkpoints.is_adapter(Path(model)):
        raise ModelError(f"{Path(model).name} is an adapter: its base was never changed, so there is nothing to revert; load the base without it")
    net, tokenizer = checkpoints.load(model)
    patch.apply(net)
    return [str(checkpoints.save(net, tokenizer, out))]


def told(verdict: Any, document: Mapping[str, Any], out: str) -> list[str]:
    """What to do with what a run has written."""
    lines = [f"wrote {document['released']}, which loads without expunge"] if "released" in document else []
    if guarded(verdict):
        lines.append(f"{out}/patch.safetensors is an inference-time guard and changes no weight: serve the model with it (expunge.serve)")
    return lines


def talk(p: Any, after: nn.Module, most: int = 3, new: int = 48) -> list[dict[str, str]]:
    """A few questions of forget and retain with the true answer and the greedy answers before and after."""
    found = []
    for about, data in (("forgotten", p.split.forget), ("kept", p.split.retain)):
        asked = [] if data is None else [k for k, row in enumerate(data.rows) if "question" in row]
        if asked and p.task.sample is not None:
            rows = data.take([asked[j * len(asked) // most] for j in range(min(most, len(asked)))])
            said = [p.task.sample(model, rows, new=new) for model in (p.before, after)]
            found += [
                {"about": about, "question": row["question"], "truth": row["answer"], "before": a, "after": b}
                for row, a, b in zip(rows.rows, *said, strict=True)
            ]  # fmt: skip
    return found


def released(verdict: Any, model: nn.Module, tokenizer: Any, out: Path | str, *, form: str = "auto", base: str = "", place: Path | None = None) -> Path | None:
    """The folder `out`, written as `checkpoints.release` does with the patch that passed; None where none passed, or one that changes no weight."""
    if verdict.chosen is None or guarded(verdict):
        return None
    return checkpoints.release(model, tokenizer, verdict.chosen.attempt.patch, out, form=form, base=base, place=place)


def guarded(verdict: Any) -> bool:
    """Whether what passed is an inference-time guard: the weights are as before, and the patch is served."""
    return verdict.chosen is not None and any(isinstance(e, Hook) for e in verdict.chosen.attempt.patch.edits)
