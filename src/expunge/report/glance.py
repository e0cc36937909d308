"""Page one in sentences: from a document, of which any part may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.report.cells import finite, interval, items, mapping, number, plain, texts

NEAR = 0.1
"""A model this little above chance (`Level.above`, from 0 to 1) is as good as at chance."""

PARTS = {"retain": "kept records", "test": "records it was never trained on", "general": "what it knows besides"}
RECORDS = {"forget": "forgotten", "unseen": "unseen", "planted": "planted"}
"""Groups of records in the picture of losses."""
STATES = {
    "broken": "It is broken.",
    "failed": "It failed.",
    "thin": "The interval reaches over the limit: there are too few records to tell.",
    "holds": "It holds.",
}
SAYS = (
    "Bars: the middle half of the records, lines: 5 to 95 %, mark: the median. A model that never saw the forgotten records answers them like the retrained "
    "ones, or, where records are alike, like unseen ones."
)

FED = (
    "It was fed wrongly (inputs scaled or ordered otherwise than when it was trained, another tokenizer or template, labels in another order) or never learnt "
    "this: nothing below means anything until that is mended."
)
BY_HEART = "it knows by heart what it was taught, and utility on unseen records says little here."


def front(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `front`."""
    return mapping(document.get("front"))


def losses(document: Mapping[str, Any]) -> list[tuple[str, str, list[float]]]:
    """(records, model, five quantiles of the loss) of every row of the picture that can be drawn."""
    out = []
    for row in items(front(document).get("losses")):
        at = row.get("at")
        if isinstance(at, (list, tuple)) and len(at) == 5 and all(finite(v) for v in at):
            out.append((plain(row.get("records")), plain(row.get("model")), [float(v) for v in at]))
    return out


def about(document: Mapping[str, Any]) -> str:
    """Which try page one is about, where it is one that did not pass; "" else.

    >>> about({"front": {"of": {"method": "salun", "seed": 0, "passed": False}}})
    'after: salun, seed 0, which did not pass'
    """
    of = mapping(front(document).get("of"))
    return f"after: {plain(of.get('method'))}, seed {plain(of.get('seed'))}, which did not pass" if of and of.get("passed") is not True else ""


def weakest(document: Mapping[str, Any]) -> str:
    """The rule that broke, or is nearest to it, in a sentence; "" where none was read.

    >>> weakest({"front": {"weakest": {"name": "a.b", "words": "what is left", "asked": "it must be at most 0.1", "value": 0.2, "low": 0.1, "high": 0.3,
    ...                                "n": 50, "state": "broken"}}})
    'The weakest link: what is left (a.b) reads 0.2 (0.1 to 0.3, n = 50); it must be at most 0.1. It is broken.'
    """
    found = mapping(front(document).get("weakest"))
    if not found:
        return ""
    name, words, asked = (plain(found.get(k)) for k in ("name", "words", "asked"))
    what = f"{words} ({name})" if words else name
    left = f" {number(100 * found['room'])} % of what the rule allows is left." if found.get("state") == "holds" and finite(found.get("room")) else ""
    said = f"{asked}." if "value" not in found else f"reads {interval(found)}; {asked}."
    state = STATES.get(plain(found.get("state")), "It is not known whether it holds.")
    return f"The weakest link: {what}{':' if 'value' not in found else ''} {said} {state}{left}"


def levels(document: Mapping[str, Any]) -> list[str]:
    """How good the model is on what was kept, before and after, one line per part.

    >>> levels({"front": {"levels": [{"part": "retain", "what": "accuracy", "before": 0.99, "after": 0.97, "chance": 0.11, "n": 891}]}})
    ['On kept records (n = 891): accuracy 0.99 before, 0.97 after; chance is 0.11.']
    """
    out = []
    for row in items(front(document).get("levels")):
        after = f", {number(row['after'])} after" if finite(row.get("after")) else ""
        part = PARTS.get(plain(row.get("part")), plain(row.get("part")))
        out.append(
            f"On {part} (n = {plain(row.get('n'))}): {plain(row.get('what'))} {number(row.get('before'))} before{after}; chance is {number(row.get('chance'))}."
        )
    return out


def warnings(document: Mapping[str, Any]) -> list[str]:
    """What makes everything else doubtful: a model before that is no better than chance on what it was taught, or on unseen records alone, and what was said
    when the request was read."""
    fed = [said for said in texts(mapping(document.get("data")).get("read")) if said.startswith("BEWARE")]
    rows = {plain(row.get("part")): row for row in items(front(document).get("levels"))}
    low = [part for part, row in rows.items() if not (finite(row.get("above")) and row["above"] >= NEAR)]
    if not low:
        return fed
    reads = [
        f"{PARTS.get(part, part)} ({plain(rows[part].get('what'))} {number(rows[part].get('before'))} where chance is {number(rows[part].get('chance'))}, "
        f"n = {plain(rows[part].get('n'))})"
        for part in low
    ]
    taught = low == ["test"] and len(rows) > 1
    said = (
        f"The model before is near chance on {reads[0]}: {BY_HEART}"
        if taught
        else f"BEWARE: the model before is near chance on {' and on '.join(reads)}. {FED}"
    )
    return [*fed, said]


def unknown(document: Mapping[str, Any]) -> list[str]:
    """What is not known, one line each."""
    return [f"Not known: {said}." for said in texts(front(document).get("unknown"))]


def notes(document: Mapping[str, Any]) -> list[str]:
    """Notes that page one does not say in other words: not those on rules that failed their self-test, and on references that are not there."""
    said = texts(document.get("notes"))
    names = [plain(t.get("name")) for t in items(document.get("selftest"))] if front(document) else []
    told = tuple([*(f"{name}: unusable here" for name in names), *(["No retrained reference was at hand"] if front(document) else [])])
    return [note for note in said if not note.startswith(told)] if told else said


def absent(document: Mapping[str, Any]) -> str:
    """One line on the named checks that do not exist for the kind of model; "" where all do.

    >>> absent({"task": "causal_lm", "sections": [{"absent": ["A8"]}, {"absent": ["C5", "C7"]}]})
    '3 named checks do not exist for causal lm: A8, C5, C7'
    """
    ids = sorted(name for section in items(document.get("sections")) for name in texts(section.get("absent")))
    if not ids:
        return ""
    what = plain(document.get("task")).replace("_", " ") or "this kind of model"
    return f"{len(ids)} named check{'s do' if len(ids) > 1 else ' does'} not exist for {what}: {', '.join(ids)}"


def reasons(document: Mapping[str, Any], most: int = 2) -> list[str]:
    """Why it did not pass: of a search, at most `most` reasons of every method's audited tries and how many more there are; of one candidate, all."""
    verdict, tries = mapping(document.get("verdict")), items(document.get("tries"))
    out: dict[str, str] = {}
    for t in tries if verdict.get("passed") is not True else ():
        ended = plain(t.get("outcome", "ok")).replace("_", " ")
        why = [*([] if ended == "ok" else [f"{ended}: {plain(t.get('reason'))}"]), *texts(t.get("reasons"))]
        if why and (items(t.get("rows")) or ended != "ok"):
            rest = f"; and {len(why) - most} more, in the report" if len(why) > most else ""
            out.setdefault(plain(t.get("method")), f"{plain(t.get('method'))}: {'; '.join(why[:most])}{rest}")
    return list(out.values()) if len(out) > 1 else texts(verdict.get("reasons"))
