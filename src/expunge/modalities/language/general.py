"""What a language model knows besides, as a second retain part: the records that are given as `general`, or else texts that the model itself says.

Of given records a share is trained on and read by validation, and the audit reads the others: no record stands on both sides. Texts that the model says are
no evidence about anything that the user named, so the audit does not read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError
from expunge.core.modality import Parted
from expunge.core.types import Split, Task, concat, spread
from expunge.modalities.language.task import generate
from expunge.modalities.language.texts import Texts

SHARE = 0.25
"""Of the given general records, what training and validation may read; the audit reads the rest."""

CHECKED = 0.25
"""Of that share, what validation alone reads: training does not."""

FEW = 8
"""Fewest general records of a share that is parted further: below, validation reads what is trained on, as it does of retain."""

SAID, NEW = 96, 40
"""Texts that the model is asked for where none are given, and tokens of each."""

OPENINGS = ("", "The", "In", "A", "It", "What is", "How", "There are", "When", "One of the", "Many people", "Who")
"""What they begin with; the first is the begin or end token alone."""

RUN, SHORT = 4, 8
"""Tokens of a run that no text may share with forget alone; fewest tokens of a text."""


def parts(model: nn.Module, task: Task, split: Split, seed: int = 0) -> Parted:
    """Which records methods and validation are given, and which the audit reads.

    trained   retain with general records beside it, at most as many as retain has; `general` holds those that validation alone reads
    audited   the split, whose `general` holds none of these
    Without retain or validation nothing is parted, nor where fewer than two general records are at hand.
    """
    if split.retain is None or split.validation is None:
        return Parted(split, split)
    if split.general is None:
        made = said(model, split, seed)
        if made is None:
            return Parted(split, split)
        told = f"No general texts were given: methods kept {len(made)} that the model itself says (digest {made.digest}); the audit does not read them."
        return Parted(_beside(split, made), split, (told,))
    first, rest = apart(split.general, SHARE)
    if not len(first) or not len(rest):
        return Parted(split, split)
    told = f"Of {len(split.general)} general records, methods and their validation were given {len(first)}; the audit reads the other {len(rest)}."
    if (made := said(model, split, seed, rest)) is not None:
        told += f" They also kept {len(made)} texts that the model itself says (digest {made.digest}), none with a run of the audit's words."
    return Parted(_beside(split, first, made), replace(split, general=rest), (told,))


def _beside(split: Split, general: Texts, more: Texts | None = None) -> Split:
    """The split with part of these records, and `more`, in retain, and the others, which validation reads, as general."""
    checked, trained = apart(general, CHECKED) if len(general) >= FEW else (general, general)
    trained = trained if more is None else concat(trained, more)
    trained = trained.take(spread(len(trained), len(split.retain)))
    first = 1 + max(int(part.ids.max()) for part in split.parts().values())
    numbered = [replace(part, ids=first + torch.arange(len(part)) + k) for part, k in ((trained, 0), (checked, len(trained)))]
    return replace(split, retain=concat(split.retain, numbered[0]), general=numbered[1])


def apart(data: Texts, share: float) -> tuple[Texts, Texts]:
    """(the share, the rest), in the records' order. Drawn by the records' keys, so that neither order nor seed decides, and equal records stand together."""
    ranked = sorted(set(data.keys))
    mine = {ranked[k] for k in spread(len(ranked), round(share * len(ranked)))}
    chosen = [key in mine for key in data.keys]
    return tuple(data.take([k for k, yes in enumerate(chosen) if yes is side]) for side in (True, False))  # pyright: ignore[reportReturnType]


def said(model: nn.Module, split: Split, seed: int = 0, avoid: Texts | None = None) -> Texts | None:
    """Texts that the model says at temperature 1 after OPENINGS, drawn by seed. Left out are those that share a run of RUN tokens with forget, or with `avoid`,
    which does not stand in retain, short ones and doubles; None where the model cannot generate, or nothing is left."""
    form = split.forget.format
    if form is None or not hasattr(model, "generate"):
        return None
    prompts = [_opening(form.tokenizer, OPENINGS[k % len(OPENINGS)]) for k in range(SAID)]
    try:
        new = min(NEW, form.max_length - max(len(p) for p in prompts))
        found = generate(model, prompts, new=new, temperature=1.0, generator=torch.Generator().manual_seed(seed))
    except ExpungeError:
        return None
    special = set(form.tokenizer.all_special_ids)
    whole = [torch.cat([p, f]) for p, f in zip(prompts, found, strict=True)]
    ours = runs(split.forget.tokens) - runs(split.retain.tokens)
    ours |= set() if avoid is None else runs(avoid.tokens) - runs(split.retain.tokens)
    kept, seen = [], set()
    for tokens in whole:
        words = tuple(tokens.tolist())
        if len(words) >= SHORT and words not in seen and not runs([tokens]) & ours and not set(words[1:]) & special:
            seen.add(words)
            kept.append(tokens)
    if not kept:
        return None
    targets = tuple(torch.arange(len(t)) > 0 for t in kept)
    rows = tuple({"text": form.tokenizer.decode(t, skip_special_tokens=True)} for t in kept)
    return Texts(tuple(kept), targets, torch.arange(len(kept)), rows, form)


def _opening(tokenizer: object, text: str) -> Tensor:
    """Tokens of an opening behind the begin token, or the end token where there is none."""
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)  # pyright: ignore[reportAttributeAccessIssue]
    words = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore[reportCallIssue]
    return torch.tensor([*([] if start is None else [start]), *words] or [0], dtype=torch.long)


def runs(texts: Sequence[Tensor]) -> set[tuple[int, ...]]:
    """All runs of RUN tokens.

    >>> sorted(runs([torch.tensor([1, 2, 3, 4, 5])]))
    [(1, 2, 3, 4), (2, 3, 4, 5)]
    """
    return {tuple(t[k : k + RUN].tolist()) for t in texts for k in range(len(t) - RUN + 1)}
