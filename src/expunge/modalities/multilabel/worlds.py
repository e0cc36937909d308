"""Worlds of multi-label classifiers: digits-multi, five answers to each of scikit-learn's digits, always there."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from expunge.core.types import Split
from expunge.modalities import nets
from expunge.modalities.multilabel.task import multilabel
from expunge.modalities.worlds import World, _examples, _thirds

ANSWERS = ("even", "prime", "loop", "five or more", "dark upper half")
"""The labels: of the digit (a loop have 0, 6, 8 and 9), and of the image, whose upper half has more ink than its lower."""
WRONG = 0.06
"""Share of the answers that are turned round, in every part: what a model can know by heart alone."""


def answers(digits: Tensor, images: Tensor) -> Tensor:
    """(N, 5) answers, 0 or 1, for digits (N,) and their images (N, 1, 8, 8).

    >>> answers(torch.tensor([2, 9]), torch.ones(2, 1, 8, 8)).tolist()
    [[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0]]
    """
    ink = images.flatten(1).unflatten(1, (2, 32)).sum(2)
    found = [
        digits % 2 == 0,
        torch.isin(digits, torch.tensor([2, 3, 5, 7])),
        torch.isin(digits, torch.tensor([0, 6, 8, 9])),
        digits >= 5,
        ink[:, 0] > ink[:, 1],
    ]
    return torch.stack(found, 1).float()


def world(name: str) -> World:
    """The world of that name: 1,000 digits to train on, of which 100 drawn at random must go, or all that show a three (`digit`)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    turned = torch.rand(len(y), len(ANSWERS), generator=torch.Generator().manual_seed(4)) < WRONG
    labels = (answers(torch.as_tensor(y.astype(np.int64)), images) - turned.float()).abs()
    train, validation, test = (_examples(images[i], labels[i], i) for i in _thirds(len(y), (1000, 297, 500), 0))
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(7))[:100]
    places = {"random": torch.isin(torch.arange(len(train)), drawn), "digit": torch.as_tensor(y[train.ids.numpy()] == 3)}
    words = {"random": f"random 10 % of {len(train)} records", "digit": f"the {int(places['digit'].sum())} records that show a three"}
    rows = torch.arange(len(train))
    asked = {k: Split(train.take(rows[gone]), train.take(rows[~gone]), test, validation, asked=words[k]) for k, gone in places.items()}
    recipe = {"epochs": 60, "batch_size": 25, "lr": 0.2, "optimizer": "nesterov", "momentum": 0.9, "schedule": "onecycle"}
    build = functools.partial(nets.small_cnn, 8, len(ANSWERS))
    return World(name, multilabel(), build, train, validation, test, recipe, asked=asked)
