"""In which format a model knows its answers: losses per token under each format at hand, before anything runs. A model that was tuned as a chat and is audited
with another prompt looks as if it had never learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from expunge.core.errors import DataError
from expunge.core.types import Split, Task, spread
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.texts import Texts
from expunge.parts.reading import score

MOST = 32
"""Records that are read in each format."""

BETTER = 0.1
"""Another format is told where the answers cost so many nats a token less in it, at the near end of the 95 % interval over records."""

BARE = "{question}"


@dataclass(frozen=True)
class Fit:
    """Losses of the same answers in one format: (N,) nats a token, the end-of-turn token left out."""

    name: str
    nll: Tensor


def formats(form: Format) -> Iterator[tuple[str, Format]]:
    """The one in use, then the others that the tokenizer allows: the chat template (with and without the system message), plain, and the question alone."""
    used = form.template if form.template in ("chat", "plain") else "your template"
    system = form.template == "chat" and form.system != ""
    yield f"{used} with the system message" if system else used, form
    if form.template == "chat" and form.system:
        yield "chat without the system message", replace(form, system="")
    others = [("chat", "chat")] if getattr(form.tokenizer, "chat_template", None) else []
    for name, template in [*others, ("plain", "plain"), ("the question alone", BARE)]:
        if template != form.template:
            yield name, replace(form, template=template)


def fits(model: nn.Module, task: Task, split: Split) -> list[Fit]:
    """At most MOST records of forget and retain, in each format that holds all of them; empty where there are fewer than two with a question. The first is the
    format in use. The model is not changed."""
    parts = [part for part in (split.forget, split.retain) if isinstance(part, Texts) and part.format is not None]
    rows = [row for part in parts for row in (part.rows[k] for k in spread(len(part), MOST // len(parts))) if "question" in row]
    if len(rows) < 2:
        return []
    out = []
    for name, form in formats(replace(parts[0].format, mask="answer")):
        try:
            data = form.texts(rows)
        except DataError:  # earlier turns that no other format holds, an answer that a template changes, a prompt that is too long
            if not out:
                return []
            continue
        out.append(Fit(name, score(model, task, data).nll.double()))
    return out


def told(found: list[Fit]) -> list[str]:
    """A line on all formats, and one that begins with BEWARE where another fits better than the one in use."""
    if len(found) < 2:
        return []
    used, *others = found
    said = ", ".join(f"{float(f.nll.mean()):.3g} with {f.name}" for f in others)
    lines = [f"format: answers cost {float(used.nll.mean()):.3g} nats a token with {used.name}, which is used ({said}; n = {len(used.nll)})"]
    best = min(others, key=lambda f: float(f.nll.mean()))
    gain = used.nll - best.nll
    least = float(gain.mean()) - 1.96 * float(gain.std()) / math.sqrt(len(gain))
    if least > BETTER:
        lines.append(
            f"BEWARE: the model knows these answers better with {best.name}, by {float(gain.mean()):.3g} nats a token (at least {least:.3g}): it is audited "
            "otherwise than it was tuned. Name the format that it is served in (--template, --system)"
        )
    return lines
