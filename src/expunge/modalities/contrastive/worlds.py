"""Worlds of contrastive models: images and captions in one space; the link between the images and the words of one class must go.

    clip-digits    digits of scikit-learn, 8 x 8, with captions as in `modalities.diffusion.worlds`: always there

Parts: forget (all training images of the class, with their captions), retain (those of the other classes), anchor (the forget images under the name of a
neighbour), validation and test (other images with captions of their own). Class prompts are the class's name in all training wordings; `others` holds its other
name in wordings that no caption has.
"""

from __future__ import annotations

import functools
import itertools

import torch

from expunge.core.errors import SettingError
from expunge.core.types import Split
from expunge.modalities.contrastive.task import contrastive
from expunge.modalities.contrastive.tiny import clip_model
from expunge.modalities.diffusion.tiny import words
from expunge.modalities.diffusion.worlds import DIGITS, OTHERS, SYNONYMS, TEMPLATES, captioned
from expunge.modalities.pictures import Pictures
from expunge.modalities.worlds import World

GONE, INSTEAD = "seven", "eight"


def world(name: str) -> World:
    """The world of that name; raises SettingError for another."""
    if name != "clip-digits":
        raise SettingError(f"no world '{name}' of contrastive models; there is clip-digits")
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.as_tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    rows, _ = captioned(x, {"object": y}, {"object": DIGITS}, seed=0)
    own = [[t.format(w) for t in TEMPLATES] for w in DIGITS]
    other = [[t.format(SYNONYMS[w]) for t in OTHERS] for w in DIGITS]
    vocabulary = words([*(r["prompt"] for r in rows), *itertools.chain(*own, *other)])
    data = Pictures(x, vocabulary([r["prompt"] for r in rows]), torch.arange(len(x)), tuple(rows), vocabulary)
    train, validation, test = (data.take(range(*ends)) for ends in ((0, 1200), (1200, 1450), (1450, len(x))))
    has = torch.tensor([r["object"] == GONE for r in train.rows])
    forget, retain = train.take(has.nonzero().squeeze(1)), train.take((~has).nonzero().squeeze(1))
    said = (GONE, SYNONYMS[GONE])
    anchor = forget.prompted([" ".join(INSTEAD if w in said else w for w in p.split()) for p in forget.prompts])
    task = contrastive(DIGITS, torch.stack([vocabulary(p) for p in own]), others={"other": torch.stack([vocabulary(p) for p in other])})
    recipe = {"epochs": 30, "batch_size": 64, "lr": 2e-3, "optimizer": "adamw", "weight_decay": 1e-2, "schedule": "cosine", "warmup": 0.05, "clip": 1.0}
    asked = {"object": Split(forget, retain, test, validation, anchor, asked=f"object:{GONE}")}
    return World(name, task, functools.partial(clip_model, vocabulary.size), train, validation, test, recipe, asked=asked)
