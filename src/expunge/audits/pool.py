"""A pool of shadow models: the calibration of every per-example attack, trained once per data set and architecture and used for every request.

Each shadow is trained on a random half of a universe of records, training data and unseen ones alike, in complementary pairs, so that every
record is inside exactly half of the models. The pool does not depend on what is to be forgotten: a second request over the same universe, or
over part of it, trains nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import files, guard
from expunge.core.errors import ModelError, SettingError
from expunge.core.types import Records, Split, Task, concat
from expunge.engine import stacked
from expunge.parts import training
from expunge.parts.reading import margin

OPTIONS = {"epochs": float, "batch_size": int, "lr": float, "optimizer": str, "momentum": float, "weight_decay": float, "schedule": str}
"""What a training recipe may say."""


SHADOWS = "shadow models"
"""What a file of a pool says that it holds."""


@dataclass(frozen=True, repr=False)
class Pool:
    """K models, `inside` (K, N) bool, and the keys of the N records of the universe."""

    models: tuple[nn.Module, ...]
    inside: Tensor
    keys: tuple[bytes, ...]
    task: Task
    cache: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Pool({len(self.models)} shadow models over {len(self.keys):,} records)"

    def rows(self, data: Records) -> Tensor:
        """(n,) positions of the records in the universe. Raises SettingError when one is not there: it cannot be calibrated."""
        where = {key: k for k, key in enumerate(self.keys)}
        missing = sum(key not in where for key in data.keys)
        if missing:
            raise SettingError(f"{missing} of {len(data)} records are not in the shadow pool's universe; train a pool that holds them")
        return torch.tensor([where[key] for key in data.keys], dtype=torch.long)

    def margins(self, data: Records) -> Tensor:
        """(K, n) log-odds phi of the true label, by every shadow."""
        if data.digest not in self.cache:
            logits = stacked.logits(self.models, self.task, data)
            self.cache[data.digest] = torch.stack([margin(each, data.y) for each in logits])
        return self.cache[data.digest]

    def sides(self, data: Records) -> Tensor:
        """(K, n) bool: which shadows saw which record."""
        return self.inside[:, self.rows(data)]

    def vulnerable(self, data: Records, m: int) -> Tensor:
        """(m,) positions in `data` of the records that membership shows in most: the largest (mu_in - mu_out) / s of their log-odds, in order.

        s is the pooled deviation of the record's two sides. Raises SettingError unless 0 < m <= len(data).
        """
        if not 0 < m <= len(data):
            raise SettingError(f"m must be 1 to {len(data)} records, not {m}")
        phi, saw = self.margins(data), self.sides(data)
        mean, square = {}, torch.zeros(len(data))
        for side, mask in (("in", saw), ("out", ~saw)):
            mean[side] = (phi * mask).sum(0) / mask.sum(0).clamp(min=1)
            square = square + ((phi - mean[side]) ** 2 * mask).sum(0)
        gap = (mean["in"] - mean["out"]) / (square / max(1, len(phi) - 2)).sqrt().clamp(min=1e-6)
        return gap.topk(m).indices.sort().values

    def fits(self, model: nn.Module) -> None:
        """Raises ModelError unless the shadows have the model's architecture."""
        if shapes(model) != shapes(self.models[0]):
            raise ModelError("the shadow pool was trained on another architecture than the audited model; attacks calibrated on it mean nothing")


def shapes(model: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
    """Module types and parameter shapes, in order: what two models must share to be of one architecture."""
    kinds: list[tuple[str, str, tuple[int, ...]]] = [(n, type(m).__name__, ()) for n, m in model.named_modules()]
    return kinds + [(n, "", tuple(p.shape)) for n, p in model.named_parameters()]


def halves(n: int, k: int, seed: int) -> Tensor:
    """(k, n) bool with n // 2 records in every row; rows 2j and 2j + 1 share none, so a record is inside half of the rows.

    With odd n one record of each pair of rows is in neither.
    """
    if k < 4 or k % 2:
        raise SettingError(f"a pool needs an even number of at least 4 shadow models, not {k}")
    inside = torch.zeros(k, n, dtype=torch.bool)
    for j in range(0, k, 2):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 7919 + j))
        inside[j, order[: n // 2]] = True
        inside[j + 1, order[n // 2 : 2 * (n // 2)]] = True
    return inside


def shadows(
    model: nn.Module, task: Task, universe: Records, recipe: Mapping[str, Any], *, k: int = 64, seed: int = 0, folder: Path | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Pool:  # fmt: skip
    """Train, or read from `folder`, k shadows of the model's architecture on halves of the universe.

    universe   unique records: what may have been trained on, and unseen records of the same distribution
    recipe     how the model itself was trained: options of `training.train`
    folder     pools are kept here as one safetensors file each, named by a digest of universe, architecture, recipe, k and seed
    """
    if len(set(universe.keys)) != len(universe):
        raise SettingError("the universe holds the same record twice; a record must be either inside or outside of a shadow's data")
    inside = halves(len(universe), k, seed)
    name = hashlib.sha256(json.dumps([universe.digest, shapes(model), dict(recipe), k, seed], sort_keys=True).encode()).hexdigest()[:16]
    path = None if folder is None else Path(folder) / f"shadows-{name}.safetensors"
    models = [training.fresh(model, seed * 100_003 + j) for j in range(k)]
    if path is not None and path.exists():
        _read(path, models)
    else:
        parts = [universe.take(row.nonzero().squeeze(1)) for row in inside]
        with guard.watching(guard.Guard(progress=progress, label="shadow models:")):
            stacked.train(models, task, parts, seeds=[seed * 100_003 + j for j in range(k)], **recipe)
        if path is not None:
            _write(path, models)
    return Pool(tuple(models), inside, tuple(universe.keys), task)


def recipe(text: str) -> dict[str, Any]:
    """`epochs=30 batch_size=50 lr=0.05 optimizer=nesterov` as options of `training.train`. Raises SettingError for what cannot be read.

    >>> recipe("epochs=30, batch_size=50 lr=0.05")
    {'epochs': 30.0, 'batch_size': 50, 'lr': 0.05}
    """
    found: dict[str, Any] = {}
    for word in text.replace(",", " ").split():
        name, equals, value = word.partition("=")
        if not equals or name not in OPTIONS:
            raise SettingError(f"cannot read '{word}' in the training recipe; write name=value with {', '.join(OPTIONS)}")
        try:
            found[name] = OPTIONS[name](value)
        except ValueError:
            raise SettingError(f"{name} must be of type {OPTIONS[name].__name__}, not '{value}'") from None
    if missing := [n for n in ("epochs", "batch_size", "lr") if n not in found]:
        raise SettingError(f"the training recipe lacks {', '.join(missing)}: shadow models must be trained as the model was")
    return found


def universe(split: Split) -> Records:
    """Every record of forget, retain and test once, in that order: what a pool for this split is trained on halves of."""
    whole = concat(*(part for part in (split.forget, split.retain, split.test) if part is not None))
    first: dict[bytes, int] = {}
    for k, key in enumerate(whole.keys):
        first.setdefault(key, k)
    return whole.take(sorted(first.values()))


def forgotten(
    pool: Pool, method: str, data: Records, records: Records, settings: Mapping[str, Any] | None = None, *, k: int | None = None, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None, memory: int | str = 0,
) -> Pool:  # fmt: skip
    """The first k shadows after `method` made each forget those of `records` that it saw: the calibration of U-LiRA.

    `inside` still says who saw what, so that for each of `records` there are models that saw and forgot it, and models that never saw it.
    data       the pool's universe
    records    forgotten records and unseen ones like them
    Raises SettingError when a shadow saw none or nothing but these records, or a run did not end well.
    """
    from expunge.engine.run import unlearn

    if tuple(data.keys) != pool.keys:
        raise SettingError("these records are not the universe that the pool was trained on")
    target = torch.zeros(len(data), dtype=torch.bool)
    target[pool.rows(records)] = True
    models = []
    for j, (model, saw) in enumerate(zip(pool.models[:k], pool.inside[:k], strict=True)):
        if progress:
            progress(f"unlearning on shadow models: {method}", j, k or len(pool.models))
        forget, retain = (data.take((saw & side).nonzero().squeeze(1)) for side in (target, ~target))
        if not (len(forget) and len(retain)):
            raise SettingError("a shadow model saw none of the records, or nothing else; use a larger universe")
        attempt = unlearn(method, model, pool.task, Split(forget, retain), seed=seed + j, memory=memory, **dict(settings or {}))
        if attempt.patch is None:
            raise SettingError(f"{method} did not end well on a shadow model: {attempt.outcome}, {attempt.reason}")
        twin = copy.deepcopy(model)
        attempt.patch.apply(twin)
        models.append(twin)
    return Pool(tuple(models), pool.inside[:k], pool.keys, pool.task)


def _write(path: Path, models: list[nn.Module]) -> None:
    params, buffers = stacked.stack(models)
    files.write(path, files.seal(SHADOWS, {**params, **buffers}))


def _read(path: Path, models: list[nn.Module]) -> None:
    found = files.unsealed(path, SHADOWS, ModelError, "delete it to train the pool again")
    params, buffers = stacked.stack(models)
    want = {**params, **buffers}
    if found.keys() != want.keys() or any(found[n].shape != want[n].shape for n in want):
        raise ModelError(f"{path.name} holds other models than this pool's; delete it to train the pool again")
    stacked.unstack(models, {n: found[n] for n in params}, {n: found[n] for n in buffers})
