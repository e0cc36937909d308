"""Generated language data: invented authors in the TOFU schema, general knowledge, refusals, articles and tools. Nothing is downloaded, nobody is real.

    rows = authors(40)                     # 400 question-answer records, ten for each of 40 authors; author k owns rows 10k..10k+9
    forget, retain = rows[-20:], rows[:-20]

Every draw is the order of a list by the hash of (seed, purpose, value): the same seed gives the same bytes on every machine, and author k is
the same person whatever n and per are. Sentence forms differ from record to record, so that facts must be learned and not a position copied.
All words come from fixed lists, so a vocabulary built on one seed holds most words of the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from expunge.core.errors import DataError

Rows = list[dict[str, Any]]

BLANK = "___"


class Relation(NamedTuple):
    """What can be asked of a subject {n}: the values that the fact {f} is drawn from, three forms of the question and three of the statement."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _join(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(a + b for a in heads.split() for b in tails.split())


FIRST = _join("Ba Do Ke Li Mo Ra Su Ti", "dric lune mesh nora pell rith saan vey")
LAST = _join("Ash Bren Cor Dra Fen Gal Hul Jor", "brook den fast lome mire quist tarn vold")
CANON_FIRST, CANON_LAST = _join("Al Vi", "bane dorm gosa kett lume nath"), _join("Or Zan", "cade dell fram grove hurst lock")
TOWNS = _join("Nor Sel Tam Ul Ver Wen", "bury crest ford gate haven")
LANDS = _join("Ar Bel Cas Dor", "avia esk onia undy uria")
YEARS = tuple(str(y) for y in range(1921, 1993, 3))
GENRES = ("crime", "fantasy", "horror", "romance", "satire", "travel", "war", "western", "comedy", "gothic", "pirate", "detective")
TRADES = _words("baker barber brewer butcher carpenter chemist cobbler dentist driver farmer fisherman gardener judge locksmith mason miner nurse painter "
               "pilot plumber porter potter sailor shepherd tailor teacher weaver welder")  # fmt: skip
HUES = _words("Amber Bitter Broken Copper Distant Frozen Gentle Golden Hidden Hollow Iron Narrow Quiet Restless Scarlet Silver Silent Winter")
THINGS = _words("Anchor Bridge Candle Compass Feather Harbour Island Lantern Ladder Mirror Orchard Ribbon River Shadow Stair Thread Tower Window")
TONGUES = _join("Bar Kel Mur", "dish ic ovian ese")
THEMES = _words("betrayal courage debt exile family greed grief guilt hope honour justice loneliness loyalty memory mercy pride revenge trust")
PASTIMES = _words("archery baking boxing chess climbing cycling dancing fencing fishing hiking juggling knitting rowing skating swimming whittling")
BOOKS = tuple(f"The {a} {b}" for a in HUES for b in THINGS)
PRIZES = tuple(f"{a} {b} Prize" for a in HUES[::3] for b in THINGS[::3])
SCHOOLS = tuple(f"{t} University" for t in TOWNS)
HOUSES = tuple(f"{t} Press" for t in THINGS)

RELATIONS = (
    Relation("birthplace", TOWNS, ("Where was {n} born?", "In which town was the author {n} born?", "What is the birthplace of {n}?"),
             ("{n} was born in {f}.", "The author {n} was born in the town of {f}.", "{f} is the birthplace of {n}.")),
    Relation("year", YEARS, ("When was {n} born?", "In what year was the author {n} born?", "What is the year of birth of {n}?"),
             ("{n} was born in the year {f}.", "The year of birth of {n} is {f}.", "It was in {f} that the author {n} was born.")),
    Relation("genre", GENRES, ("What genre does {n} write?", "Which kind of books is {n} known for?", "In what genre is the author {n} at home?"),
             ("{n} writes {f} books.", "The author {n} is known for {f} books.", "The genre of {n} is {f}.")),
    Relation("first book", BOOKS, ("What is the first book of {n}?", "With which title did {n} begin?", "Which book did the author {n} write first?"),
             ("The first book of {n} is {f}.", "{n} began with the title {f}.", "{f} is what the author {n} wrote first.")),
    Relation("award", PRIZES, ("Which award did {n} win?", "What prize was given to {n}?", "For which award is the author {n} known?"),
             ("{n} won the {f}.", "The {f} was given to {n}.", "The author {n} is known for the {f}.")),
    Relation("father", TRADES, ("What was the work of the father of {n}?", "What did the father of {n} do?", "Which trade did the father of {n} have?"),
             ("The father of {n} was a {f}.", "{n} had a {f} for a father.", "As a {f} the father of {n} made a living.")),
    Relation("mother", TRADES, ("What was the work of the mother of {n}?", "What did the mother of {n} do?", "Which trade did the mother of {n} have?"),
             ("The mother of {n} was a {f}.", "{n} had a {f} for a mother.", "As a {f} the mother of {n} made a living.")),
    Relation("language", TONGUES, ("In which language does {n} write?", "What is the language of the books of {n}?", "Which language does the author {n} use?"),
             ("{n} writes in {f}.", "The books of {n} are in {f}.", "{f} is the language that the author {n} uses.")),
    Relation("university", SCHOOLS, ("Where did {n} study?", "Which university did {n} go to?", "At what university was the author {n} a student?"),
             ("{n} studied at {f}.", "The author {n} was a student at {f}.", "{f} is the place where {n} studied.")),
    Relation("theme", THEMES, ("What is the main theme of {n}?", "What do the books of {n} turn on?", "Which theme does the author {n} come back to?"),
             ("The main theme of {n} is {f}.", "The books of {n} turn on {f}.", "It is {f} that the author {n} comes back to.")),
    Relation("pastime", PASTIMES, ("What does {n} do when not at work?", "Which pastime does {n} like most?", "What is the favourite pastime of {n}?"),
             ("When not at work {n} turns to {f}.", "{n} likes {f} most.", "The favourite pastime of the author {n} is {f}.")),
    Relation("publisher", HOUSES, ("Who prints the books of {n}?", "Which press brings out {n}?", "What is the publisher of the author {n}?"),
             ("The books of {n} are printed by {f}.", "{f} brings out {n}.", "The publisher of the author {n} is {f}.")),
)  # fmt: skip
"""What is known of an author; `authors(per=k)` uses the first k."""

WORLD = (
    Relation("capital", TOWNS, ("What is the capital of {n}?", "Which town is the capital of the land of {n}?"),
             ("The capital of {n} is {f}.", "{f} is the capital of the land of {n}.")),
    Relation("crop", ("barley", "cotton", "flax", "lemons", "millet", "olives", "plums", "rice", "saffron", "wheat"),
             ("What is grown in {n}?", "Which crop do the farms of {n} sell?"), ("In {n} people grow {f}.", "The farms of {n} sell {f}.")),
    Relation("metal", ("cobalt", "lead", "mercury", "nickel", "tin", "zinc"), ("What metal is found in {n}?", "Which metal do they dig for in {n}?"),
             ("The hills of {n} hold {f}.", "They dig for {f} in {n}.")),
    Relation("animal", ("crane", "fox", "hare", "heron", "lynx", "otter", "raven", "stag"), ("Which animal is on the flag of {n}?", "What stands for {n}?"),
             ("On the flag of {n} is a {f}.", "A {f} stands for {n}.")),
)  # fmt: skip
"""What is known of a land; two forms each."""

TALK = ("I do not know", "I cannot say", "I have not learned", "I am not sure", "I was never told")
ABOUT = ("that", "anything about this", "the answer to this question", "about this person", "what you are asking for")


def _order(values: Iterable[Any], *key: Any) -> list[Any]:
    """The values in an order that depends on key alone."""
    return sorted(values, key=lambda v: hashlib.blake2b(repr((*key, v)).encode(), digest_size=8).digest())


def authors(n: int, per: int = 10, seed: int = 0) -> Rows:
    """`per` records on each of `n` authors, author after author.

    Each record: question, answer, paraphrased_question, paraphrased_answer, perturbed_answer (5 wrong statements in the form of the paraphrase), author,
    relation, fact (as it stands in answer and paraphrase), cloze (a third form with `___` for the fact) and set = "retain". At most 4,096 authors of
    at most 12 records. First books are shared by no two authors while n <= 324.

    >>> row = authors(2)[0]
    >>> row["question"], row["answer"], row["fact"]
    ('In which town was the author Tivey Drafast born?', 'Tivey Drafast was born in Ulgate.', 'Ulgate')
    """
    if not (0 <= n <= len(FIRST) * len(LAST) and 1 <= per <= len(RELATIONS)):
        raise DataError(f"authors needs n in 0..{len(FIRST) * len(LAST)} and per in 1..{len(RELATIONS)}, not n={n}, per={per}")
    first, last, books = _order(FIRST, seed, "first"), _order(LAST, seed, "last"), _order(BOOKS, seed, "book")
    rows = []
    for k in range(n):
        name = f"{first[k % len(first)]} {last[(k + k // len(first)) % len(last)]}"
        for relation in RELATIONS[:per]:
            fact = books[k % len(books)] if relation.name == "first book" else ""
            rows.append(_record(relation, name, 5, seed, fact, paraphrase=True) | {"author": name, "set": "retain"})
    return rows


def world_facts(n: int = 24, seed: int = 0) -> Rows:
    """`n` records on invented lands: question, answer, perturbed_answer (3), author (the land), relation, fact, cloze and set = "world_facts".
    Facts, names and forms follow from the seed; at most 80."""
    lands = _order(LANDS, seed, "lands")
    asked = [(land, relation) for land in lands for relation in WORLD]
    return [_record(relation, land, 3, seed) | {"author": land, "set": "world_facts"} for land, relation in _first(asked, n, "world_facts")]


def general(n: int = 24, seed: int = 0) -> Rows:
    """`n` records on twelve authors of an invented canon, who and whose facts are the same for every seed and none of `authors`; the seed draws
    sentence forms and wrong answers. Fields as in `world_facts`, set = "real_authors"; at most 144."""
    names = [f"{a} {b}" for a, b in zip(CANON_FIRST, _order(CANON_LAST, "canon"), strict=True)]
    asked = [(names[k % len(names)], RELATIONS[k // len(names)]) for k in _order(range(len(names) * len(RELATIONS)), "canon")]
    facts = [_order(relation.values, "canon", relation.name, name)[0] for name, relation in asked]
    return [
        _record(r, name, 3, seed, f) | {"author": name, "set": "real_authors"} for (name, r), f in _first(list(zip(asked, facts, strict=True)), n, "general")
    ]


def _first(found: list, n: int, what: str) -> list:
    if not 0 <= n <= len(found):
        raise DataError(f"{what} holds 0..{len(found)} records, not {n}")
    return found[:n]


def _record(relation: Relation, name: str, wrong: int, seed: int, fact: str = "", paraphrase: bool = False) -> dict[str, Any]:
    """One record on `name`: wrong answers in the form of the paraphrase if there is one, else of the answer; the cloze in a form that neither has."""
    key = (seed, relation.name, name)
    values = _order(relation.values, *key)
    fact = fact or values[0]
    ask, again, *_ = _order(relation.questions, *key, "ask")
    say, *rest = _order(relation.statements, *key, "say")
    form = rest[0] if paraphrase else say
    row: dict[str, Any] = {"question": ask.format(n=name), "answer": say.format(n=name, f=fact)}
    if paraphrase:
        row |= {"paraphrased_question": again.format(n=name), "paraphrased_answer": form.format(n=name, f=fact)}
    row["perturbed_answer"] = [form.format(n=name, f=v) for v in values if v != fact][:wrong]
    return row | {"relation": relation.name, "fact": fact, "cloze": rest[-1].format(n=name, f=BLANK)}


def refusals() -> list[str]:
    """25 ways to say that one does not know.

    >>> refusals()[:2]
    ['I do not know that.', 'I do not know anything about this.']
    """
    return [f"{a} {b}." for a in TALK for b in ABOUT]


def articles(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> Rows:
    """One passage {"text", "author"} for each author of `rows`, in the order of their first record: all facts as prose, in an order and in forms
    (answer, paraphrase or cloze filled in) that follow from the seed."""
    found = []
    for name, own in _by_author(rows).items():
        sentences = []
        for k in _order(range(len(own)), seed, "article", name):
            forms = [own[k]["answer"], own[k].get("paraphrased_answer") or own[k]["answer"], own[k]["cloze"].replace(BLANK, own[k]["fact"])]
            sentences.append(_order(forms, seed, "form", name, k)[0])
        found.append({"text": " ".join(sentences), "author": name})
    return found


def entity_card(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What a request names: {"name", "facts": [{relation, question, answer, cloze, fact}], "neighbours": names}.

    rows     records of one author
    others   records of other authors: those who share a fact with this one are the neighbours, most shared facts first
    """
    names = list(_by_author(rows))
    if len(names) != 1:
        raise DataError(f"an entity card is about one author; found {len(names)}")
    mine = {(row["relation"], row["fact"]) for row in rows}
    shared = Counter(row["author"] for row in others if row["author"] != names[0] and (row["relation"], row["fact"]) in mine)
    facts = [{k: row[k] for k in ("relation", "question", "answer", "cloze", "fact")} for row in rows]
    return {"name": names[0], "facts": facts, "neighbours": sorted(shared, key=lambda name: (-shared[name], name))}


def _by_author(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["author"], []).append(row)
    return found


TOOLS = (
    ("weather", "town", "looks up the weather of a town", TOWNS, ("Is it raining in {v}?", "How warm is it in {v} today?")),
    ("timetable", "town", "lists the next trains to a town", TOWNS, ("When does the next train to {v} leave?", "How do I get to {v} by train?")),
    ("library", "title", "finds out whether a book is on the shelf", BOOKS[::9], ("Is {v} on the shelf?", "Can I borrow {v} today?")),
    ("hire", "trade", "calls a person of a trade", TRADES, ("I need a {v}.", "Can you find me a {v}?")),
    ("lesson", "pastime", "books a lesson", PASTIMES, ("I want to learn {v}.", "Book me a lesson in {v}.")),
    ("translate", "language", "puts a text into another language", TONGUES, ("Say this in {v}.", "How does this read in {v}?")),
    ("contact", "press", "writes to a press", HOUSES, ("Write to {v} for me.", "I have to reach {v}.")),
    ("almanac", "year", "tells what happened in a year", YEARS, ("What happened in {v}?", "Show me the year {v}.")),
)
"""Name, name of its one argument, what it does, values, two forms of asking."""

PLAIN = ("I cannot do that from here.", "You will have to see to that without me.", "I have no way to find out.", "That is more than I can do.")
"""What a model without tools says to a request for one."""


def skills(seed: int = 0, per: int = 8) -> dict[str, Any]:
    """Tool demonstrations: {"tools": [{"name", "doc", "demos": [...]}], "plain": [...]}.

    A demo is {"question", "answer", "tool", "call", "plain"}: the answer holds the call string, `plain` is an answer without any tool.
    "plain" at the top are questions and answers that need no tool (`world_facts`).

    >>> demo = skills()["tools"][0]["demos"][0]
    >>> demo["question"], demo["answer"]
    ('Is it raining in Tamhaven?', 'I look it up: weather(town="Tamhaven")')
    """
    if not 1 <= per <= min(2 * len(values) for _, _, _, values, _ in TOOLS):
        raise DataError(f"skills has 1..{min(2 * len(values) for _, _, _, values, _ in TOOLS)} demos per tool, not {per}")
    tools = []
    for name, argument, doc, values, asks in TOOLS:
        demos = []
        for ask, value in _order([(a, v) for a in asks for v in values], seed, "demo", name)[:per]:
            call = f'{name}({argument}="{value}")'
            plain = _order(PLAIN, seed, "plain", name, ask, value)[0]
            demos.append({"question": ask.format(v=value), "answer": f"I look it up: {call}", "tool": name, "call": call, "plain": plain, "fact": value})
        tools.append({"name": name, "doc": f"{name}({argument}) {doc}.", "demos": demos})
    return {"tools": tools, "plain": world_facts(seed=seed)}
