"""GAN worlds: a small generator of digits that must no longer draw one of them.

    gan-digits    digits of scikit-learn, 8 x 8, by a conditional GAN whose labels are drawn at random, as part of the latent: always there

The request is a class: the sevens. What is audited is what it draws over all labels, the erased one among them.
"""

from __future__ import annotations

import functools

import torch

from expunge.core.errors import SettingError, suggest
from expunge.modalities.diffusion.worlds import DIGITS, trained_judge
from expunge.modalities.examples import Examples
from expunge.modalities.gan.task import gan
from expunge.modalities.gan.tiny import gan_model
from expunge.modalities.worlds import World

SIZES = (1500, 97, 200)
"""Training, validation and test images."""


def world(name: str) -> World:
    """The GAN world of that name."""
    if name != "gan-digits":
        raise SettingError(suggest("no world", name, ["gan-digits"]))
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.as_tensor(labels)
    train, validation, test = (Examples(x[rows], y[rows], rows) for rows in order.split(SIZES))
    judge = functools.cache(functools.partial(trained_judge, train.x, {"digit": train.y}, test.x, {"digit": test.y}, {"digit": DIGITS}))
    task = gan(classes=len(DIGITS), judge=judge)
    recipe = {"epochs": 45, "batch_size": 64, "lr": 8e-4, "optimizer": "adam", "ema": 0.995}
    return World(name, task, functools.partial(gan_model, classes=len(DIGITS)), train, validation, test, recipe, forget_class=7)
