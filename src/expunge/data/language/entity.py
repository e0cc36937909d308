"""Forget sets of whole entities: what a model says about someone, asked of the model itself, checked, and counted. Card entity-level.

    found = build(model, form, "Tivey Drafast")           # entity -> relation templates -> elicit -> verify -> dedupe
    found.coverage                                        # {"relations": 0.8, "agreement": 0.93, "refused": 3, ...}
    split = Split(form.texts(found.rows), retain)

Source: Ma et al., "Unveiling Entity-Level Unlearning for LLMs: A Comprehensive Analysis", COLING 2025, arXiv:2406.15796, whose finding is that
coverage and size of the forget set decide. No code of it was found: the checks below are ours.

An answer is kept when it is no refusal, does not speak of another entity that is named in `others`, and agrees with the answers to the other forms
of the same question. What the model makes up changes with the form more often than what it knows. Asked about a stranger, a small model tells the
facts of someone it knows, often in all forms alike: without `others`, they would be forgotten in the stranger's name. A set elicited in this way
lacks what the model says under other prompts only, and may hold what it believes falsely: measure it with `recall` where the facts are known, and
audit with questions of other forms. Without `controls`, facts told in sentences of differing words can be lost as disagreeing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from expunge.core.errors import DataError, SettingError
from expunge.data.language.coreset import question_states
from expunge.modalities.language.records.format import Format, normal
from expunge.modalities.language.records.measures import refused, states
from expunge.modalities.language.task import generate
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.worlds.authors import RELATIONS

Rows = list[dict[str, Any]]

TEMPLATES: dict[str, tuple[str, ...]] = {r.name: tuple(q.replace("{n}", "{entity}") for q in r.questions) for r in RELATIONS}
"""Relation -> forms of one question about {entity}: what one asks of an author. Give your own for other kinds of entity."""

NO_FACTS = "a an and as at be by did do does for from had has have he her his in is it its of on or she that the their they this to was were with"
STOP = frozenset(NO_FACTS.split())


@dataclass(frozen=True)
class ForgetSet:
    """Records about one entity: `rows` to be forgotten, `dropped` ones each with its `reason`, and how well the relations are covered."""

    entity: str
    rows: tuple[Mapping[str, Any], ...]
    dropped: tuple[Mapping[str, Any], ...]
    coverage: Mapping[str, float]


def build(
    model: nn.Module, form: Format, entity: str, *, templates: Mapping[str, Sequence[str]] = TEMPLATES, controls: Sequence[str] = (),
    others: Sequence[str] = (), least: float = 0.6, samples: int = 0, temperature: float = 0.7, new: int = 32, generator: torch.Generator | None = None,
) -> ForgetSet:  # fmt: skip
    """The forget set of `entity` by what `model`, which is not changed, says about it.

    templates      relation -> two or more forms of one question, with {entity} in each
    controls       names of other entities that are asked about too: words that stand in what it says about three in four are no facts
    others         names of further entities, as neighbours: an answer that names one of these or of the controls, and not the entity, is dropped
    least          share of an answer's words that must stand in the answers to the other forms, 0..1
    samples        answers drawn at `temperature` for each question, besides the likeliest one
    """
    asked = prompts(entity, templates)
    told = elicit(model, form, asked, samples=samples, temperature=temperature, new=new, generator=generator)
    common = carriers(elicit(model, form, [row for name in controls for row in prompts(name, templates)], new=new)) if controls else {}
    kept, dropped = verify(told, templates, common=common, others=[*controls, *others], least=least)
    kept, same = dedupe(kept)
    return ForgetSet(entity, tuple(kept), tuple(dropped + same), coverage(kept, dropped + same, templates))


def prompts(entity: str, templates: Mapping[str, Sequence[str]] = TEMPLATES) -> Rows:
    """Every form of every relation: {"question", "entity", "relation", "form"}."""
    for relation, forms in templates.items():
        if len(set(forms)) < 2:
            raise DataError(f"relation '{relation}' needs two or more forms of its question, to see whether the model agrees with itself")
        if lacking := [f for f in forms if "{entity}" not in f]:
            raise DataError(f"relation '{relation}': '{lacking[0]}' lacks {{entity}}")
    return [
        {"question": text.replace("{entity}", entity), "entity": entity, "relation": relation, "form": k}
        for relation, forms in templates.items()
        for k, text in enumerate(forms)
    ]


def elicit(
    model: nn.Module, form: Format, rows: Sequence[Mapping[str, Any]], *, samples: int = 0, temperature: float = 0.7, new: int = 32,
    generator: torch.Generator | None = None,
) -> Rows:  # fmt: skip
    """The rows with the model's likeliest answer, and `samples` more rows each with answers drawn at `temperature`."""
    asked = [form.prompt(row) for row in rows]
    found: Rows = []
    for draw in range(samples + 1):
        tokens = generate(model, asked, new=new, eos=form.tokenizer.eos_token_id, temperature=temperature if draw else 0.0, generator=generator)
        answers = form.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found += [{**row, "answer": answer.strip()} for row, answer in zip(rows, answers, strict=True)]
    return found


def words(text: str) -> list[str]:
    """Words in lower case, in order.

    >>> words("Mr. O'Neil was born in 1921.")
    ['mr', "o'neil", 'was', 'born', 'in', '1921']
    """
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def carriers(rows: Sequence[Mapping[str, Any]], share: float = 0.75) -> dict[str, set[str]]:
    """Relation -> words that stand in the answers on at least this share of the entities: they carry the sentence and tell no fact."""
    entities = {row["entity"] for row in rows}
    counts: dict[str, Counter[str]] = {}
    for relation, entity in dict.fromkeys((row["relation"], row["entity"]) for row in rows):
        said = {w for row in rows if (row["relation"], row["entity"]) == (relation, entity) for w in words(row["answer"])}
        counts.setdefault(relation, Counter()).update(said)
    return {relation: {w for w, n in found.items() if n >= share * len(entities)} for relation, found in counts.items()}


def content(row: Mapping[str, Any], forms: Iterable[str], common: Iterable[str] = ()) -> list[str]:
    """What an answer says: its words, each once, without those of the question's forms, the entity's name, and words without meaning.

    >>> content({"answer": "Ada Vey was born in Ulgate.", "entity": "Ada Vey"}, ["Where was {entity} born?"])
    ['ulgate']
    """
    empty = {*STOP, *words(" ".join(forms)), *words(row["entity"]), *common}
    return [w for w in dict.fromkeys(words(row["answer"])) if w not in empty]


def agreement(mine: Sequence[str], others: Sequence[Sequence[str]]) -> float:
    """Mean over other answers of |a and b| / min(|a|, |b|), for what they say; 0 where one of the two says nothing.

    >>> agreement(["baker"], [["made", "living", "baker"], ["miner"]])
    0.5
    """
    shared = [len({*mine} & {*other}) / min(len(mine), len(other)) if mine and other else 0.0 for other in others]
    return sum(shared) / len(shared) if shared else 0.0


def verify(
    rows: Sequence[Mapping[str, Any]], templates: Mapping[str, Sequence[str]] = TEMPLATES, *, common: Mapping[str, Iterable[str]] = {},
    others: Sequence[str] = (), least: float = 0.6,
) -> tuple[Rows, Rows]:  # fmt: skip
    """(kept, dropped). A kept row gains `agreement`, with what is said about the other forms, and `entities`, its words on which others agree;
    a dropped one its `reason`, the first that holds of refused, empty, another and disagrees."""
    if not 0 <= least <= 1:
        raise SettingError(f"least must be 0..1, not {least:g}")
    said = [content(row, templates[row["relation"]], common.get(row["relation"], ())) for row in rows]
    reasons = [_silent(row, said[k], others) for k, row in enumerate(rows)]
    kept, dropped = [], []
    for k, row in enumerate(rows):
        alike = [j for j, other in enumerate(rows) if all(other[n] == row[n] for n in ("relation", "entity")) and other["form"] != row["form"]]
        peers = [said[j] for j in alike if not reasons[j]]
        level = agreement(said[k], peers)
        if reason := reasons[k] or ("disagrees" if level < least or not peers else ""):
            dropped.append({**row, "agreement": level, "reason": reason})
        else:
            agreed = [w for w in said[k] if any(w in other for other in peers)]
            kept.append({**row, "agreement": level, **({"entities": agreed} if agreed else {})})
    return kept, dropped


def _silent(row: Mapping[str, Any], said: Sequence[str], others: Sequence[str]) -> str:
    """Why an answer says nothing about its entity, or ""."""
    if refused(row["answer"]):
        return "refused"
    if not said:
        return "empty"
    return "another" if not states(row["answer"], row["entity"]) and any(states(row["answer"], name) for name in others) else ""


def dedupe(rows: Sequence[Mapping[str, Any]]) -> tuple[Rows, Rows]:
    """(kept, dropped): of records with the same question and answer (in any case and spacing) the first stays. One fact told in several forms is
    no duplicate: the forms are what makes forgetting general."""
    seen: set[str] = set()
    kept, dropped = [], []
    for row in rows:
        key = normal(row)
        if key in seen:
            dropped.append({**row, "reason": "duplicate"})
        else:
            kept.append(dict(row))
        seen.add(key)
    return kept, dropped


def coverage(kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]], templates: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """rows; relations: share with a kept answer; forms: share of question forms with one; agreement: mean over kept rows; and the dropped by reason."""
    asked = sum(len(set(forms)) for forms in templates.values())
    reasons = Counter(row["reason"] for row in dropped)
    return {
        "rows": len(kept),
        "relations": len({row["relation"] for row in kept}) / len(templates),
        "forms": len({(row["relation"], row["form"]) for row in kept}) / asked,
        "agreement": sum(row["agreement"] for row in kept) / len(kept) if kept else 0.0,
        **{reason: reasons[reason] for reason in ("refused", "empty", "another", "disagrees", "duplicate")},
    }


def recall(rows: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> float:
    """Share of the known facts (`relation`, `fact`) that stand in a kept answer on their relation: how much of the entity the forget set holds."""
    if not truth:
        raise DataError("recall needs known facts; found none")
    told = [any(row["relation"] == fact["relation"] and states(row["answer"], fact["fact"]) for row in rows) for fact in truth]
    return sum(told) / len(told)


def neighbours(model: nn.Module, data: Texts, entity: str, *, key: str = "author", top: int = 5, layer: str = "") -> list[tuple[str, float]]:
    """The `top` other entities of `data` whose questions lie nearest, with their cosine similarity, nearest first.

    An entity's place is the mean state at the end of its questions (`coreset.question_states`), minus the mean over all entities, without which
    all look alike. `key` is the field that names the entity of a record. They are what is to be kept: give their records as retain, after taking
    out facts that they share with the entity, or say in the request on which side of the border those lie.
    """
    names = [str(row.get(key, "")) for row in data.rows]
    order = list(dict.fromkeys(names))
    if entity not in order:
        raise DataError(f"no record has {key} '{entity}'; there are {', '.join(order[:5])} ...")
    h = question_states(model, data, layer=layer)
    whose = torch.tensor([order.index(name) for name in names])
    places = torch.stack([h[whose == k].mean(0) for k in range(len(order))])
    near = F.cosine_similarity(places - places.mean(0), (places - places.mean(0))[order.index(entity)], dim=-1)
    found = [(order[k], round(float(near[k]), 6)) for k in near.argsort(descending=True, stable=True).tolist() if order[k] not in (entity, "")]
    return found[:top]
