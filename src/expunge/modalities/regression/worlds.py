"""Worlds of regressors: diabetes, scikit-learn's data, always there."""

from __future__ import annotations

import functools

import torch

from expunge.modalities import nets
from expunge.modalities.regression.task import regression
from expunge.modalities.worlds import World, _examples, _thirds


def world(name: str) -> World:
    """The world of that name."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x = torch.as_tensor(x / x.std(0), dtype=torch.float32)
    y = torch.as_tensor((y - y.mean()) / y.std(), dtype=torch.float32)
    train, validation, test = (_examples(x[i], y[i], i) for i in _thirds(len(y), (260, 72, 110), 0))
    recipe = {"epochs": 60, "batch_size": 32, "lr": 0.03, "optimizer": "nesterov", "momentum": 0.9, "schedule": "onecycle"}
    return World("diabetes", regression(), functools.partial(nets.mlp, 10, 1), train, validation, test, recipe)
