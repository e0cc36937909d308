"""The world of a class-conditional DDPM: a prompt is one word, the class, and nothing else of it is read.

    ddpm-digits     digits of scikit-learn, 8 x 8: always there

The model predicts the noise under the linear betas of DDPM (1e-4 to 0.02). Parts: forget (images of one class), retain (the other classes), anchor (the
forget records under the name of the next class, as SalUn and SFD redirect it), test and validation (images of all classes that nobody trained on).
Source: cards diffusion-salun and sfd, defaults.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from expunge.core.types import Split
from expunge.modalities.diffusion import worlds
from expunge.modalities.diffusion.task import Schedule, diffusion
from expunge.modalities.diffusion.tiny import Words, diffusion_model, words
from expunge.modalities.diffusion.worlds import DIGITS, RECIPE, digit_images, trained_judge
from expunge.modalities.pictures import Pictures
from expunge.modalities.worlds import World


def linear(first: float = 1e-4, last: float = 0.02) -> Tensor:
    """(1000,) abar of DDPM's linear betas.

    >>> [round(float(v), 4) for v in linear()[[0, 440, 999]]]
    [0.9999, 0.1377, 0.0]
    """
    return (1 - torch.linspace(first, last, 1000, dtype=torch.double)).cumprod(0).float()


def classes(x: Tensor, y: Tensor, vocabulary: Words, first: int) -> Pictures:
    """Images (N, C, H, W) with the word of their class; ids count from `first`."""
    names = [DIGITS[k] for k in y.tolist()]
    return Pictures(x, vocabulary(names), first + torch.arange(len(x)), tuple({"prompt": n, "object": n} for n in names), vocabulary)


def world(name: str, concept: str = "seven", anchor: str = "eight") -> World:
    """The picture or DDPM world of that name; of a DDPM the class `concept` must go, and `anchor` stands in for it."""
    if name != "ddpm-digits":
        return worlds.world(name)
    (x, y), (held_x, held_y) = digit_images()
    names = {"object": DIGITS}
    vocabulary = words(DIGITS, length=2)
    data, held = classes(x, y, vocabulary, 0), classes(held_x, held_y, vocabulary, len(x))
    judge = functools.cache(functools.partial(trained_judge, x, {"object": y}, held_x, {"object": held_y}, names))
    task = diffusion(Schedule("epsilon", linear()), shape=x.shape[1:], null=vocabulary([""])[0], drop=0.15, judge=judge)
    has = y == DIGITS.index(concept)
    forget = data.take(has.nonzero().squeeze(1))
    test, validation = held.take(range(200)), held.take(range(200, len(held)))
    split = Split(forget, data.take((~has).nonzero().squeeze(1)), test, validation, forget.prompted([anchor] * len(forget)), asked=f"object:{concept}")
    make = functools.partial(diffusion_model, vocabulary.size, channels=x.shape[1], length=vocabulary.length)
    return World(name, task, make, data, validation, test, {**RECIPE, "epochs": 60}, asked={"object": split})
