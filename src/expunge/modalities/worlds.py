"""Worlds: named data set + model + split + training recipe, on which methods are compared. Trained models are cached by digest.

Each modality brings its own (`worlds.py` in its folder); `worlds()` names them all.

A split is drawn once per scenario, from a fixed seed, and is the same for every model seed: forget + retain are exactly the records the
original was trained on. (The reference code of the field draws them from another split: 1 in 10 "forgotten" images was never seen.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.core import digest, files
from expunge.core.errors import DataError, SettingError, suggest
from expunge.core.machine.devices import reseeded
from expunge.core.modality import MODALITIES, Modality
from expunge.core.types import Split, Task, concat
from expunge.modalities.examples import Examples
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
    given: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    """Label of a model -> what loads it, for models that are not trained here."""
    plants: Any = None
    """Records of the kind that is asked to be forgotten, which no model saw: for planted controls. Where there are none, they are taken from validation."""
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
        return Split(self.train.take(rows[gone]), self.train.take(rows[~gone]), self.test, self.validation, plants=self.plants, asked=asked)

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

        with reseeded(seed):
            model = self.build()
            path = None if cache is None else Path(cache) / f"{self.name}-{self.digest}" / f"{label}.safetensors"
            if path is not None and path.exists():
                from safetensors.torch import load_file

                missing = model.load_state_dict(load_file(path), strict=False).missing_keys
                if set(missing) & set(digest.distinct(model)):
                    raise DataError(f"{path.name} in the cache lacks {missing[0]}; delete it")
                return model.eval()
            with guard.watching(guard.Guard(progress=progress, label=f"{self.name} {label}")):
                training.train(model, self.task, data, seed=seed, **self.recipe)
        if path is not None:
            from safetensors.torch import save

            files.write(path, save(digest.distinct(model)))
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


def _given(models: Mapping[str, Callable[[], nn.Module]], label: str) -> nn.Module:
    kind = "original" if label.startswith("original") else label
    if kind not in models:
        raise DataError(f"no folder for the model {label}; there are {', '.join(models)}")
    return models[kind]()


def worlds() -> dict[str, Modality]:
    """Name of each world -> its modality."""
    return {name: m for m in MODALITIES.values() for name in m.worlds}


def world(name: str) -> World:
    """The world of that name; raises SettingError for an unknown name and DataError when its data is not there."""
    found = worlds()
    if name not in found:
        raise SettingError(suggest("no world", name, found))
    return found[name].world(name)
