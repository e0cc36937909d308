"""How the autopilot runs language methods, and the score that it tunes them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from expunge.core.types import Split, Task, spread
from expunge.parts.reading import Scores, score

SCALES = (1.0, 0.3)
"""Multiples of the step size that suits the model's width (`pace`) that are tried."""

RECIPE = {"batch_size": 8, "accumulate": 1, "retain_size": 32, "retain": "ce"}
"""How the autopilot runs language methods, whatever their papers say: four kept texts for each forgotten one, and never without them."""

LEAST_EPOCHS = 10.0
"""Passes over forget that it allows at least; validation ends them earlier."""

MOST = 64
"""Most retain records that a validation score reads."""

READ = 32
"""Most records on which `kept` reads what a run left."""


def pace(model: nn.Module) -> dict[str, Any]:
    """AdamW with lr 0.1 / (features of a token), 1e-3 for a width of 100."""
    return {"lr": 0.1 / int(getattr(model.config, "hidden_size", 100)), "optimizer": "adamw", "clip": 1.0}  # pyright: ignore


def tuned(settings: Mapping[str, Any]) -> bool:
    """Whether `lr` is the step size of a language method's loop (`tuning.Tuning`); a search of its own may have a setting of that name, too."""
    return {"lr", *RECIPE} <= settings.keys()


def recipe(settings: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """RECIPE for a language method with these settings: of its settings, those that the method has, and retain only where there is retain data."""
    changes: dict[str, Any] = {k: v for k, v in RECIPE.items() if k in settings and (k != "retain" or (settings[k] == "none" and split.retain is not None))}
    return {**changes, "epochs": max(settings["epochs"], LEAST_EPOCHS)} if "epochs" in settings else changes


def stride(settings: Mapping[str, Any], task: Task, model: nn.Module) -> float:
    """The step size that suits the model's width, ten times as large for LoRA."""
    return pace(model)["lr"] * (10.0 if settings.get("lora") else 1.0)


def kept(model: nn.Module, task: Task, split: Split) -> float | None:
    """Mean probability per token on retain, else on validation, at most READ records; None where there is neither. Retain comes first: of texts that no model
    saw, a model that refuses what it forgot may well refuse some, too."""
    data = split.retain if split.retain is not None else split.validation
    if data is None:
        return None
    return float((-score(model, task, data.take(spread(len(data), READ))).nll).exp().mean())


def validation(model: nn.Module, task: Task, split: Split) -> Callable[[nn.Module], float] | None:
    """A score for tuning and stopping, larger is better, 0 at best: reads forget, validation and retain, never test; None without validation.

    -(|mean loss of validation - mean loss of forget|, as a share of what it was), since the AUC of texts known by heart stays 1 nearly to the end; minus twice
    the share lost of the probability per token on MOST records of retain, or on validation where there is no retain.
    """
    if split.validation is None:
        return None
    some = None if split.retain is None else split.retain.take(spread(len(split.retain), MOST))
    start, known = score(model, task, split.validation), some and score(model, task, some)
    apart = abs(float(start.nll.mean() - score(model, task, split.forget).nll.mean()))

    def utility(s: Scores) -> float:
        return float((-s.nll).exp().mean())

    def validate(now: nn.Module) -> float:
        forget, unseen = score(now, task, split.forget), score(now, task, split.validation)
        remains = abs(float(unseen.nll.mean() - forget.nll.mean())) / max(apart, 1e-12)
        before, after = (start, unseen) if some is None else (known, score(now, task, some))
        return -remains - 2 * max(0.0, 1 - utility(after) / max(utility(before), 1e-12))

    return validate
