"""Worlds of classifiers.

digits       1,797 8x8 digits from scikit-learn: always there
mnist        10,000 + 2,000 images, small CNN: reads EXPUNGE_DATA/vision/mnist
cifar10      5,000 + 2,000 JPEG images, ResNet-20: reads EXPUNGE_DATA/vision/cifar10
digits-wrong, mnist-wrong    the same with 5 % wrong labels, which is what must go: a model knows them by heart alone
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from expunge.core.errors import DataError
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.records import mislabelled
from expunge.modalities.worlds import World, _examples, _thirds, data_folder


def _digits() -> World:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, validation, test = (_examples(images[i], y[i].astype(np.int64), i) for i in _thirds(len(y), (1000, 297, 500), 0))
    recipe = {"epochs": 30, "batch_size": 50, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}
    return World("digits", classification(), functools.partial(nets.small_cnn, 8), train, validation, test, recipe)


def _mnist(n: int = 4000) -> World:
    path = data_folder() / "vision" / "mnist" / "mnist.npz"
    if not path.exists():
        raise DataError(f"world mnist needs {path}; set EXPUNGE_DATA to the folder that holds vision/mnist/mnist.npz")
    with np.load(path, allow_pickle=False) as z:
        x_train, y_train, x_test, y_test = z["x_train"], z["y_train"], z["x_test"], z["y_test"]
    train, validation = _thirds(len(y_train), (n, 1000), 0)
    (test,) = _thirds(len(y_test), (2000,), 0)

    def part(x, y, i):
        return _examples((torch.as_tensor(x[i], dtype=torch.float32)[:, None] / 255 - 0.1307) / 0.3081, y[i].astype(np.int64), i)

    recipe = {"epochs": 15, "batch_size": 64, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}
    parts = part(x_train, y_train, train), part(x_train, y_train, validation), part(x_test, y_test, test)
    return World("mnist", classification(), functools.partial(nets.small_cnn, 28), *parts, recipe, forget_class=4)


def decode_jpegs(path: Path, rows: np.ndarray) -> np.ndarray:
    """uint8 (n, 32, 32, 3) images at the given rows of a packed JPEG file (`jpeg`, `offsets`, `labels`)."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as z:
        joined, offsets = z["jpeg"], z["offsets"]
    return np.stack([np.asarray(Image.open(io.BytesIO(joined[offsets[i] : offsets[i + 1]].tobytes()))) for i in rows])


def normalise(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) -> float32 (n, 3, H, W) with the ImageNet mean and deviation that the CIFAR-10 weights were trained with."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - mean) / deviation


def cifar10_part(part: str, rows: np.ndarray) -> Examples:
    """Rows of the JPEG set's `train` or `test` part, normalised; ids are positions in the file."""
    path = data_folder() / "vision" / "cifar10" / f"cifar10_{part}_jpeg.npz"
    if not path.exists():
        raise DataError(f"world cifar10 needs {path}; set EXPUNGE_DATA to the folder that holds vision/cifar10")
    with np.load(path, allow_pickle=False) as z:
        labels = z["labels"]
    return _examples(normalise(decode_jpegs(path, rows)), labels[rows].astype(np.int64), rows)


def _cifar10() -> World:
    train, validation = _thirds(50_000, (5000, 1000), 0)
    (test,) = _thirds(10_000, (2000,), 0)
    recipe = {"epochs": 12, "batch_size": 50, "lr": 0.1, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}
    parts = cifar10_part("train", train), cifar10_part("train", validation), cifar10_part("test", test)
    return World("cifar10", classification(), nets.resnet20, *parts, recipe)


def with_wrong_labels(w: World, share: float = 0.05, seed: int = 5) -> World:
    """The world with `share` of its training labels changed to another class, each other class as likely; validation and test stay right."""
    g = torch.Generator().manual_seed(seed)
    n, classes = len(w.train), int(w.train.y.max()) + 1
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=g)[: round(share * n)]] = True
    y = torch.where(wrong, mislabelled(w.train, classes, g).y, w.train.y)
    return replace(
        w, name=f"{w.name}-wrong", train=replace(w.train, y=y), wrong=wrong, plants=mislabelled(w.validation.take(range(0, len(w.validation), 2)), classes, g)
    )


def world(name: str) -> World:
    """The world of that name."""
    if name.endswith("-wrong"):
        return with_wrong_labels(_digits() if name.startswith("digits") else _mnist(10_000))
    make: dict[str, Callable[[], World]] = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}
    return make[name]()
