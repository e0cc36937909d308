"""Worlds: named data set + model + split + training recipe, on which methods are compared. Trained models are cached by digest.

    world("digits")      1,797 8x8 digits from scikit-learn: always there
    world("mnist")       10,000 + 2,000 images, small CNN: reads EXPUNGE_DATA/vision/mnist
    world("cifar10")     5,000 + 2,000 JPEG images, ResNet-20: reads EXPUNGE_DATA/vision/cifar10
    world("diabetes")    scikit-learn's regression data: always there
    world("authors")     generated authors and a small Llama that knows them by heart: always there; "authors-moe" is its mixture-of-experts twin
    world("tofu-tiny")   a slice of TOFU and a small Llama: reads EXPUNGE_DATA/llm/tofu; "tofu-moe" is its twin
    world("tofu")        all of TOFU and a checkpoint of one's own: EXPUNGE_TOFU names its folder, EXPUNGE_TOFU_RETAINED the folders of gold models
    world("text2digit")  digits drawn by name (8 x 8): always there; "text2digit-mnist" at 16 x 16: reads EXPUNGE_DATA/vision/mnist
    world("shapes")      6 objects x 6 styles, drawn here: always there; "shapes-small" has 4 x 4 of them
    world("clip-digits") digits and their captions in one space (CLIP): always there
    world("ddpm-digits") digits drawn by class, without sentences, as a class-conditional DDPM (8 x 8): always there
    world("gan-digits")  digits drawn by a GAN (8 x 8): always there
    world("inpaint-digits"), world("mri-digits")    digits with a hole, and digits and shapes with part of their spectrum, to complete: always there
    world("digits-wrong"), world("mnist-wrong")    the same with 5 % wrong labels, which is what must go: a model knows them by heart alone

A split is drawn once per scenario, from a fixed seed, and is the same for every model seed: forget + retain are exactly the records the
original was trained on. (The reference code of the field draws them from another split: 1 in 10 "forgotten" images was never seen.)
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.core import files
from expunge.core.errors import DataError, SettingError
from expunge.core.types import Split, Task, concat
from expunge.modalities import models, nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.regression.task import regression
from expunge.parts import training

RECIPE_VERSION = 1
SCENARIOS = ("class", "random")


@dataclass(frozen=True)
class World:
    """What is needed to train an original, retrain references, and unlearn between them."""

    name: str
    task: Task
    build: Callable[[], nn.Module]
    train: Any
    validation: Any
    test: Any
    recipe: dict[str, Any]
    forget_class: int = 3
    wrong: torch.Tensor | None = None
    """(N,) bool: rows of train whose label is wrong."""
    asked: Mapping[str, Split] = field(default_factory=dict)
    """scenario -> split, for a world whose requests are given with its data."""
    given: Mapping[str, Path] = field(default_factory=dict)
    """Label of a model -> folder that save_pretrained wrote, for models that are not trained here."""
    extra: Any = None
    """What every model is trained on besides, but no method is given: the general knowledge of a language world."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """What can be asked for here."""
        return tuple(self.asked) or (SCENARIOS if self.wrong is None else ("wrong",))

    @property
    def digest(self) -> str:
        """Names the cache folder: data, architecture and recipe."""
        shapes = {n: list(p.shape) for n, p in self.build().named_parameters()}
        doc = json.dumps(
            [
                self.name,
                self.train.digest,
                self.test.digest if self.test is not None else "",
                shapes,
                self.recipe,
                RECIPE_VERSION,
                *([] if self.extra is None else [self.extra.digest]),
            ],
            sort_keys=True,
        )
        return hashlib.sha256(doc.encode()).hexdigest()[:12]

    def split(self, scenario: str) -> Split:
        """`class` forgets one class (regression: the lowest fifth of targets), `random` 10 % of the records, `wrong` those with wrong labels; the
        same for every seed."""
        if scenario not in self.scenarios:
            raise SettingError(f"scenario must be one of {', '.join(self.scenarios)}, not '{scenario}'")
        if self.asked:
            return self.asked[scenario]
        n = len(self.train)
        if scenario == "wrong":
            gone, asked = self.wrong, f"{int(self.wrong.sum())} records with wrong labels"
        elif scenario == "random":
            gone = torch.zeros(n, dtype=torch.bool)
            gone[torch.randperm(n, generator=torch.Generator().manual_seed(7))[: n // 10]] = True
            asked = f"random 10 % of {n} records"
        elif self.task.name == "regression":
            limit = self.train.y.quantile(0.2)
            gone, asked = self.train.y <= limit, f"targets up to {float(limit):.3g}"
        else:
            gone, asked = self.train.y == self.forget_class, f"class:{self.forget_class}"
        rows = torch.arange(n)
        return Split(self.train.take(rows[gone]), self.train.take(rows[~gone]), self.test, self.validation, asked=asked)

    def original(self, seed: int, cache: Path | None = None, progress=None) -> nn.Module:
        """The model trained on everything, from cache if it is there."""
        return self._model(self.train, f"original-{seed}", seed, cache, progress)

    def retrained(self, scenario: str, seed: int, cache: Path | None = None, progress=None) -> nn.Module:
        """A model trained on the retain set alone with the same recipe; seeds are apart from those of originals."""
        return self._model(self.split(scenario).retain, f"retrained-{scenario}-{seed}", 1000 + seed, cache, progress)

    def _model(self, data, label: str, seed: int, cache: Path | None, progress) -> nn.Module:
        from expunge.core import guard

        if self.given:
            return _given(self.given, label)
        data = data if self.extra is None else concat(data, self.extra)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            path = None if cache is None else Path(cache) / f"{self.name}-{self.digest}" / f"{label}.safetensors"
            if path is not None and path.exists():
                from safetensors.torch import load_file

                missing = model.load_state_dict(load_file(path), strict=False).missing_keys
                if set(missing) & set(models.distinct(model)):
                    raise DataError(f"{path.name} in the cache lacks {missing[0]}; delete it")
                return model.eval()
            with guard.watching(guard.Guard(progress=progress, label=f"{self.name} {label}")):
                training.train(model, self.task, data, seed=seed, **self.recipe)
        if path is not None:
            from safetensors.torch import save

            files.write(path, save(models.distinct(model)))
        return model.eval()


def data_folder() -> Path:
    """EXPUNGE_DATA, or ../shared/data."""
    return Path(os.environ.get("EXPUNGE_DATA", "../shared/data"))


def cache_folder() -> Path:
    """EXPUNGE_CACHE, or .cache/expunge in the working folder."""
    return Path(os.environ.get("EXPUNGE_CACHE", ".cache/expunge"))


def _examples(x: torch.Tensor, y: np.ndarray | torch.Tensor, ids: np.ndarray) -> Examples:
    return Examples(x, torch.as_tensor(y), torch.as_tensor(ids))


def _thirds(n: int, sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    order, cuts = np.random.default_rng(seed).permutation(n), np.cumsum(sizes)
    return [np.sort(part) for part in np.split(order, cuts)[: len(sizes)]]


def _digits() -> World:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, validation, test = (_examples(images[i], y[i].astype(np.int64), i) for i in _thirds(len(y), (1000, 297, 500), 0))
    recipe = {"epochs": 30, "batch_size": 50, "lr": 0.05, "optimizer": "nesterov", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "onecycle"}
    return World("digits", classification(), functools.partial(nets.small_cnn, 8), train, validation, test, recipe)


def _diabetes() -> World:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x = torch.as_tensor(x / x.std(0), dtype=torch.float32)
    y = torch.as_tensor((y - y.mean()) / y.std(), dtype=torch.float32)
    train, validation, test = (_examples(x[i], y[i], i) for i in _thirds(len(y), (260, 72, 110), 0))
    recipe = {"epochs": 60, "batch_size": 32, "lr": 0.03, "optimizer": "nesterov", "momentum": 0.9, "schedule": "onecycle"}
    return World("diabetes", regression(), functools.partial(nets.mlp, 10, 1), train, validation, test, recipe)


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
    y = torch.where(wrong, (w.train.y + torch.randint(1, classes, (n,), generator=g)) % classes, w.train.y)
    return replace(w, name=f"{w.name}-wrong", train=replace(w.train, y=y), wrong=wrong)


def _given(folders: Mapping[str, Path], label: str) -> nn.Module:
    from expunge.modalities.language import checkpoints

    kind = "original" if label.startswith("original") else label
    if kind not in folders:
        raise DataError(f"no folder for the model {label}; there are {', '.join(folders)}")
    return checkpoints.load(folders[kind])[0]


def _from(module: str, name: str) -> World:
    return importlib.import_module(f"expunge.modalities.{module}").world(name)


PICTURES = tuple(f"{name}{kind}" for name in ("text2digit", "text2digit-mnist", "shapes", "shapes-small") for kind in ("", "-epsilon", "-v"))
ELSEWHERE = {
    "language.worlds.build": ("authors", "authors-moe", "tofu-tiny", "tofu-moe", "tofu"),
    "diffusion.worlds": PICTURES, "diffusion.ddpm": ("ddpm-digits",), "contrastive.worlds": ("clip-digits",), "gan.worlds": ("gan-digits",),
    "image_to_image.worlds": ("inpaint-digits", "mri-digits"),
}  # fmt: skip
"""Module of `expunge.modalities` -> worlds that its `world(name)` builds."""
WORLDS: dict[str, Callable[[], World]] = {"digits": _digits, "diabetes": _diabetes, "mnist": _mnist, "cifar10": _cifar10}
WORLDS |= {name: functools.partial(_from, module, name) for module, names in ELSEWHERE.items() for name in names}
WORLDS |= {"digits-wrong": lambda: with_wrong_labels(_digits()), "mnist-wrong": lambda: with_wrong_labels(_mnist(10_000))}


def world(name: str) -> World:
    """The world of that name; raises SettingError for an unknown name and DataError when its data is not there."""
    from expunge.core.errors import suggest

    if name not in WORLDS:
        raise SettingError(suggest("no world", name, WORLDS))
    return WORLDS[name]()
