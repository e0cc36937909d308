"""Worlds of text classifiers: topics, generated sentences on six topics and a small BERT that knows them by heart. Nothing is downloaded.

A sentence has three words of its topic, and a name, a place and a time that any topic may have. In one sentence of three these words are of three topics,
any of which may be its own: such a record is classed rightly by chance, or by heart.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from expunge.modalities.text_classification.task import text_classification
from expunge.modalities.text_classification.texts import records
from expunge.modalities.worlds import World

TOPICS = {
    "cooking": "oven butter onion recipe flour soup pepper dough garlic spoon roast pastry",
    "sailing": "harbour anchor sail mast captain tide rope deck crew rudder wind keel",
    "gardening": "soil seed rose hedge lawn shovel tulip compost weed pruning bulb orchard",
    "music": "violin choir melody drum concert chord organ singer tune flute rhythm opera",
    "chess": "bishop knight pawn rook opening castle queen gambit endgame mate clock board",
    "weather": "storm cloud rain frost thunder snow fog hail sunshine drought breeze flood",
}
"""Topic -> its words."""

PLAIN = {
    "n": "Anna Boris Clara Dmitri Edith Farid Greta Hugo Ines Jonas Karla Leo Mina Nils Olga Piet Rosa Sven Tara Ugo Vera Willem Yara Zeno",
    "p": "Bergdorf Cliffton Dalmouth Eastham Fernhill Glenbrook Hollowell Kingsby Larkfield Marston Northgate Oakley Pinewick Quarrytown",
    "t": "today yesterday again at last early often slowly once late soon twice never",
}
"""Words that any topic may have: names, places and times."""
FORMS = (
    "{n} talked about the {a} and the {b} in {p} {t} because of the {c}",
    "in {p} {n} saw the {a} before the {b} and the {c} {t}",
    "{t} the {a} in {p} reminded {n} of a {b} and a {c}",
    "a {a} and a {b} and {n} from {p} with the {c} {t}",
    "{n} wrote {t} from {p} that the {a} was no {b} without a {c}",
)
EVERY = 3
"""Of how many sentences one is ambiguous."""


def sentences(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n records {"text", "label", "id"}, no two of one text; the same seed gives the same on every machine.

    >>> sentences(1)[0]["label"] in TOPICS
    True
    """
    g, topics, found, seen = np.random.default_rng(seed), list(TOPICS), [], set()

    def one(words: Sequence[str]) -> str:
        return words[int(g.integers(len(words)))]

    while len(found) < n:
        drawn = [topics[k] for k in g.permutation(len(topics))[:3]]
        topic = drawn[0]
        a, b, c = (one(TOPICS[drawn[k] if len(found) % EVERY == 0 else topic].split()) for k in g.permutation(3))
        text = one(FORMS).format(a=a, b=b, c=c, **{kind: one(words.split()) for kind, words in PLAIN.items()})
        if text not in seen and len({a, b, c}) == 3:
            seen.add(text)
            found.append({"text": text, "label": topic, "id": len(found)})
    return found


def tokenizer() -> Any:
    """A tokenizer of transformers with one token per word of the sentences, [CLS] before and [SEP] behind a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    plain = " ".join([*TOPICS.values(), *PLAIN.values(), *(f.format(n="", p="", t="", a="", b="", c="") for f in FORMS)]).lower().split()
    raw = Tokenizer(models.WordLevel({word: k for k, word in enumerate(dict.fromkeys([*special, *plain]))}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # pyright: ignore
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **named)


def bert(vocabulary: int, names: Sequence[str], *, width: int = 48, layers: int = 2, heads: int = 4, dropout: float = 0.1) -> nn.Module:
    """An untrained BERT of transformers, drawn from PyTorch's seed: `width` features, feed-forward twice as wide, in eval mode."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width, max_position_embeddings=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0, id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def world(name: str) -> World:
    """The world of that name: 900 sentences to train on, 200 for validation, 400 for test."""
    made, rows, names = tokenizer(), sentences(1500), {topic: k for k, topic in enumerate(TOPICS)}
    train, validation, test = records(made, rows[:900], rows[900:1100], rows[1100:], names=names)
    recipe = {"epochs": 30, "batch_size": 16, "lr": 2e-3, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1, "clip": 1.0}
    return World(name, text_classification(made), functools.partial(bert, len(made), list(names)), train, validation, test, recipe)
