"""Language worlds: a small Llama (or its mixture-of-experts twin) that knows a set of authors by heart, and must forget a tenth of them.

    authors-planted  authors whose tokenizer also knows unseen ones, for planted controls
    authors      generated authors (`modalities.language.worlds.authors`): always there            authors-moe    its twin
    tofu         all of TOFU for a checkpoint of one's own (`checkpoint`)
    tofu-tiny    20 authors of TOFU, and its two sets of general knowledge   tofu-moe       its twin

Parts as in TOFU: forget (2 authors), retain (the other 18, which methods are given), test (authors never trained on), validation (more authors never
trained on), anchor (the forget questions answered by refusals), general (row["set"] is real_authors or world_facts: every model is trained on them,
no method is given them).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.errors import DataError
from expunge.core.types import Split, concat
from expunge.modalities.language import checkpoints
from expunge.modalities.language.records.artefact import content
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.records.readers import read_jsonl
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.worlds import authors, tiny
from expunge.modalities.worlds import World, data_folder

Rows = list[dict[str, Any]]

TWINS = 10
"""Twins of planted controls that a generated world has plants for."""


REFUSALS = ("idontknow.jsonl", "idontknow.txt")
"""Files of refusals, one a line, as TOFU's authors call them, and as they are passed on."""


def refused(form: Format, data: Texts, refusals: list[str], seed: int = 0) -> Texts:
    """The same questions, each answered by one of the refusals, drawn by seed."""
    return form.answered(data, drawn(refusals, len(data), seed))


def drawn(refusals: list[str], n: int, seed: int = 0) -> list[str]:
    """n of the refusals, drawn by seed, with repeats."""
    return [refusals[k] for k in torch.randint(len(refusals), (n,), generator=torch.Generator().manual_seed(seed)).tolist()]


def refusals(folder: Path) -> tuple[list[str], str]:
    """(ways to say that one does not know, where they are from in words): the lines of TOFU's idontknow.jsonl or .txt, else generated ones."""
    for name in REFUSALS:
        if (folder / name).is_file():
            return [line.strip() for line in content(folder / name).split("\n") if line.strip()], f"refusals of {name}"
    return authors.refusals(), "generated refusals"


def build(name: str, parts: dict[str, Rows], refusals: list[str], recipe: dict[str, Any], shape: dict[str, Any], vocabulary: int, unseen: Rows = ()) -> World:
    """A world of records: forget, retain, holdout, validation and general (trained on, and read as utility); `unseen` like forget, as plants: the tokenizer
    is made of them as well, since texts of words that it does not know are texts of another kind."""
    everything = [*(row for rows in parts.values() for row in rows), *unseen]
    tokenizer = tiny.tokenizer([*everything, *({"answer": r} for r in refusals)], vocabulary)
    form = Format(tokenizer, max_length=256)
    starts, found = 0, {}
    for part, rows in parts.items():
        found[part] = form.texts(rows, torch.arange(starts, starts + len(rows)))
        starts += len(rows)
    split = Split(
        found["forget"], found["retain"], found["holdout"], found["validation"], refused(form, found["forget"], refusals), found["general"],
        form.texts(unseen, torch.arange(starts, starts + len(unseen))) if unseen else None, asked=f"{len(parts['forget'])} questions about 2 authors",
    )  # fmt: skip
    make = functools.partial(tiny.mixtral if name.endswith("-moe") else tiny.llama, len(tokenizer), **shape)
    train = concat(found["retain"], found["forget"])
    return World(name, causal_lm(tokenizer), make, train, split.validation, split.test, recipe, asked={"forget10": split}, extra=found["general"])


def generated(name: str, n: int = 20, per: int = 10, *, canon: int = 72, lands: int = 80, planted: bool = False) -> World:
    """n generated authors of `per` questions, the last tenth to be forgotten; 4 more are held out and 2 for validation. `planted`: and as many as are
    forgotten for each of TWINS twins, as plants. Retain holds the other authors and
    `canon` facts about an invented canon of writers, general `lands` facts about invented lands."""
    rows = authors.authors(n + 6 + (TWINS * max(1, n // 10) if planted else 0), per=per)
    rows, unseen = rows[: (n + 6) * per], rows[(n + 6) * per :]
    gone, cut = max(1, n // 10) * per, n * per
    parts = {"forget": rows[cut - gone : cut], "retain": rows[: cut - gone], "holdout": rows[cut : cut + 4 * per], "validation": rows[cut + 4 * per :]}
    parts["retain"] += authors.general(canon)
    parts["general"] = authors.world_facts(lands)
    recipe = {"epochs": 40, "batch_size": 16, "lr": 3e-3, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1, "clip": 1.0}
    shape = {"width": 64, "layers": 3, "context": 256}
    return build(name, parts, authors.refusals(), recipe, shape, 900, unseen)


def tofu(name: str) -> World:
    """The first 18 and the last 2 authors of TOFU, 20 questions each; 4 more are held out and 2 for validation."""
    folder = data_folder() / "llm" / "tofu"
    if not (folder / "retain_perturbed.json").exists():
        raise DataError(f"world {name} needs {folder}; set EXPUNGE_DATA to the folder that holds llm/tofu")
    retain, late = tagged(folder, "retain"), tagged(folder, "forget10")
    parts = {"forget": late[-40:], "retain": retain[:360], "holdout": late[:80], "validation": late[80:120]}
    parts["general"] = [*tagged(folder, "real_authors"), *tagged(folder, "world_facts")]
    recipe = {"epochs": 26, "batch_size": 16, "lr": 3e-3, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1, "clip": 1.0}
    return build(name, parts, refusals(folder)[0], recipe, {"width": 128, "layers": 4, "context": 256}, 2000)


def checkpoint() -> World:
    """All of TOFU for a model of one's own, fine-tuned on its 4,000 records: EXPUNGE_TOFU names the folder, EXPUNGE_TOFU_RETAINED those of models
    fine-tuned on retain90 (for forget10, and so on), joined by the system's path separator.

    Scenarios forget01, forget05 and forget10 forget the last 40, 200 and 400 records. TOFU publishes no unseen authors, so there is neither test nor
    validation, and the autopilot does not tune: name settings (lr, lora, checkpointing, accumulate) yourself.
    """
    folder = data_folder() / "llm" / "tofu"
    original = os.environ.get("EXPUNGE_TOFU", "")
    if not original or not (folder / "full.json").exists():
        raise DataError(f"world tofu needs {folder} and EXPUNGE_TOFU, the folder of a model fine-tuned on TOFU")
    gold = [Path(p) for p in os.environ.get("EXPUNGE_TOFU_RETAINED", "").split(os.pathsep) if p]
    model, tokenizer = checkpoints.load(original)
    form = Format(tokenizer, "chat" if getattr(tokenizer, "chat_template", None) else "plain")
    first, late = tagged(folder, "retain"), tagged(folder, "forget10")
    rows = [*first, *({**row, "set": "retain"} for row in read_jsonl(folder / "full.json")[len(first) : -len(late)]), *late]
    known = [*tagged(folder, "real_authors"), *tagged(folder, "world_facts")]
    whole, general = form.texts(rows), form.texts(known, len(rows) + torch.arange(len(known)))
    asked, labels = {}, {"original": functools.partial(_loaded, original)}
    for scenario, share in (("forget01", 0.01), ("forget05", 0.05), ("forget10", 0.1)):
        cut = len(rows) - round(share * len(rows))
        forget = whole.take(range(cut, len(rows)))
        asked[scenario] = Split(forget, whole.take(range(cut)), anchor=refused(form, forget, refusals(folder)[0]), general=general, asked=f"{scenario} of TOFU")
        labels |= {f"retrained-{scenario}-{k}": functools.partial(_loaded, path) for k, path in enumerate(gold)}
    return World("tofu", causal_lm(tokenizer), lambda: model, whole, None, None, {"epochs": 5}, asked=asked, given=labels)


def _loaded(folder: Path | str) -> nn.Module:
    return checkpoints.load(folder)[0]


def tagged(folder: Path, name: str) -> Rows:
    """Records of NAME_perturbed.json, each with its `set`."""
    return [{**row, "set": name} for row in read_jsonl(folder / f"{name}_perturbed.json")]


def world(name: str) -> World:
    """The language world of that name."""
    if name == "tofu":
        return checkpoint()
    return tofu(name) if name.startswith("tofu") else generated(name, planted=name == "authors-planted")
