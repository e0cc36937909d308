"""Page one in numbers: losses before and after, the weakest link, how good the model is on what was kept, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row, bounds
from expunge.audits.grade import Finding, Grade
from expunge.audits.membership.losses import targets
from expunge.audits.named import Named
from expunge.audits.plants import own
from expunge.audits.references import Refusal
from expunge.core.digest import model_digest
from expunge.core.errors import GateError
from expunge.core.modality import of
from expunge.core.stats import matched
from expunge.report.words import FAMILIES, WORDS

AT = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the losses that are drawn."""

PARTS = ("retain", "test", "general")
"""Parts on which it is read how good the model is."""


def front(p: Probe, grade: Grade | None, rows: Sequence[Row], named: Sequence[Named], refused: Sequence[Refusal] = ()) -> dict[str, Any]:
    """JSON-able section `front` of a report.

    losses    [{records, model, n, at}]: quantiles AT of the losses of forgotten and of unseen records, before, after, and of all references together;
              of planted ones in the twins before and after, and where never seen
    unseen    how the unseen records were drawn
    levels    [{part, what, before, after, chance, top, n}]: how good the model is, in the modality's own measure (`Modality.level`)
    weakest   the rule that broke or is nearest to it: {name, words, rule, asked, value, low, high, n, state}; {} where none was read
    unknown   sentences

    `p.after` is the model that is shown; `p.before` again where there is none, and then there is no `after` anywhere.
    """
    found, note = losses(p)
    return {
        "losses": found, "unseen": note, "levels": levels(p), "weakest": {} if grade is None else weakest(grade.findings, rows, named),
        "unknown": unknown(p, () if grade is None else grade.findings, named, refused),
    }  # fmt: skip


def _models(p: Probe) -> dict[str, list[Any]]:
    models = {"before": [p.before], **({} if p.after is p.before else {"after": [p.after]})}
    return {**models, **({"retrained": list(p.references)} if p.references else {})}


def losses(p: Probe) -> tuple[list[dict[str, Any]], str]:
    """Quantiles of losses per unit; and how the unseen records were drawn, from test, else from validation. Prompts alone have no loss."""
    have = {name: part for name, part in p.split.parts().items() if not getattr(part, "bare", False) and len(part)}
    if "forget" not in have:
        return [], ""
    groups: dict[str, tuple[str, Tensor]] = {"forget": ("forget", torch.arange(len(have["forget"])))}
    note = "no record that the model never saw was given"
    if unseen := next((name for name in ("test", "validation") if name in have), ""):
        some, note = matched(targets(p.scores("before", "forget")), targets(p.scores("before", unseen)), p.seed)
        note = note.replace("from test", f"from {unseen}").replace("test example", f"{unseen} record")
        groups |= {"unseen": (unseen, some)} if len(some) else {}
    out = []
    for records, (part, some) in groups.items():
        for label, models in _models(p).items():
            out += _drawn(records, label, torch.cat([p.seen(m, part).nll[some] for m in models]))
    return [*out, *_planted(p)], note


def _planted(p: Probe) -> list[dict[str, Any]]:
    """Planted records in the twins that were taught them, before and after the method, and in the models that never saw them; none for another candidate."""
    e: Any = p.plants
    if e is None or not e.there or p.after is p.before or p.once(("digest",), p.after, lambda: model_digest(p.after)) != e.candidate:
        return []
    taught, others = own(e.after.nll, e.taught)
    return [
        *_drawn("planted", "before", own(e.before.nll, e.taught)[0]),
        *_drawn("planted", "after", taught),
        *_drawn("planted", "never saw", others.flatten()),
    ]


def _drawn(records: str, model: str, nll: Tensor) -> list[dict[str, Any]]:
    nll = nll[torch.isfinite(nll)].double()
    return [{"records": records, "model": model, "n": len(nll), "at": nll.quantile(torch.tensor(AT, dtype=torch.double)).tolist()}] if len(nll) else []


def levels(p: Probe) -> list[dict[str, Any]]:
    """How good the model is on each part of PARTS, before and after, where the modality can say."""
    out = []
    for part in PARTS:
        if getattr(p.split, part) is None:
            continue
        before = of(p.task).level(p, p.before, part)
        after = None if p.after is p.before else of(p.task).level(p, p.after, part)
        if before is not None:
            known = {k: v for k, v in asdict(before).items() if k != "value"}
            out.append({"part": part, **known, "before": before.value, "after": None if after is None else after.value})
    return out


def asked(rule: str) -> str:
    """A rule as a sentence's end; the rule itself where it cannot be read.

    >>> asked("<= 0.05"), asked(">= 0.5"), asked("0.4..0.6"), asked("0.05")
    ('it must be at most 0.05', 'it must be at least 0.5', 'it must lie between 0.4 and 0.6', 'the rule asks for 0.05')
    """
    try:
        low, high = bounds(rule)
    except GateError:
        return f"the rule asks for {rule}"
    if math.isinf(low):
        return f"it must be at most {high:.3g}"
    return f"it must be at least {low:.3g}" if math.isinf(high) else f"it must lie between {low:.3g} and {high:.3g}"


def room(low: float, high: float, rule: str) -> float:
    """Share of what a rule allows that is left between the worse end of low..high and the rule's limit; negative where that is passed.

        one limit L     (L - high) / |L|, or (low - L) / |L|       (over 1 where L = 0)
        two, a..b       min(low - a, b - high) / ((b - a) / 2)

    Raises GateError for a rule that cannot be read.

    >>> [round(v, 6) for v in (room(0, 0.04, "<= 0.05"), room(0.6, 0.8, ">= 0.5"), room(0.45, 0.5, "0.4..0.6"), room(0.1, 0.2, "<= 0.1"))]
    [0.2, 0.2, 0.5, -1.0]
    """
    a, b = bounds(rule)
    if math.isfinite(a) and math.isfinite(b):
        return min(low - a, b - high) / max((b - a) / 2, 1e-12)
    limit, left = (b, b - high) if math.isfinite(b) else (a, low - a)
    return left / (abs(limit) or 1.0)


def weakest(findings: Sequence[Finding], rows: Sequence[Row], named: Sequence[Named]) -> dict[str, Any]:
    """The rule that broke by most; where none did, the first named check of A or B that failed; else the rule that is thin, or holds, with the least `room`."""
    by_name = {r.name: r for r in rows}
    read = [(f, by_name[f.name]) for f in findings if f.state in ("broken", "thin", "holds") and f.name in by_name]
    failed = next((n for n in named if n.verdict == "FAIL" and n.id[0] in "AB"), None)
    for state in ("broken", "thin", "holds"):
        if state == "thin" and failed is not None:
            return {"name": failed.id, "words": failed.statement, "rule": "", "asked": failed.why, "state": "failed"}
        if mine := [(f, r) for f, r in read if f.state == state]:
            f, r = min(mine, key=lambda pair: room(pair[1].low, pair[1].high, pair[0].rule))
            return {
                "name": f.name, "words": WORDS.get(f.name, ""), "rule": f.rule, "asked": asked(f.rule), "state": state,
                "value": r.value, "low": r.low, "high": r.high, "n": r.n, "room": room(r.low, r.high, f.rule),
            }  # fmt: skip
    return {}


def unknown(p: Probe, findings: Sequence[Finding], named: Sequence[Named], refused: Sequence[Refusal]) -> list[str]:
    """What is not known: rules not measured or that failed their self-test, families without a rule, references, named checks that could not be decided."""
    said = []
    for state, what in (("missing", "what was not measured"), ("unusable", "these, as their rules failed the self-test on this model and data")):
        if mine := [f"{WORDS.get(f.name) or f.name} ({f.name})" for f in findings if f.state == state]:
            said.append(f"{what}: {'; '.join(mine)}")
    for name in of(p.task).families if findings else ():
        if name not in {f.family for f in findings}:
            said.append(f"{FAMILIES.get(name, name)}: no rule reads it ({name})")
    if not p.references:
        said.append("how a model that never saw the records answers: no reference was at hand" + (", or none was believed" if refused else ""))
    elif refused:
        said.append(f"{len(refused)} of {len(refused) + len(p.references)} references were not believed")
    if ids := [n.id for n in named if n.verdict == "UNKNOWN" and not n.absent]:
        said.append(f"{len(ids)} named check{'s' if len(ids) > 1 else ''} that could not be decided: {', '.join(ids)}")
    return said
