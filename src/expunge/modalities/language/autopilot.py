"""How the autopilot runs language methods, and the score that it tunes them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from expunge.core.types import Split, Task, spread
from expunge.parts.reading import Scores, score

FACTOR, TRIED = 2.0, 5
"""Between two step sizes that stand side by side in the search, and how many are tried at most; the first suits the model's width (`pace`)."""

RECIPE = {"batch_size": 8, "accumulate": 1, "retain_size": 32, "retain": "ce"}
"""How the autopilot runs language methods, whatever their papers say: four kept texts for each forgotten one, and never without them."""

LEAST_EPOCHS = 10.0
"""Passes over forget that it allows at least; validation ends them earlier."""

LONGER = 3.0
"""Times as many for a front-runner, whose kept texts come back meanwhile."""

SETTLE = 0.5
"""See `longer`: of steps after which nothing else is forgotten, what the next training on kept texts brings back is back, so that validation sees it."""

LORA = 3.0
"""The step size of LoRA in that of full weights."""

MOST = 64
"""Most retain records that a validation score reads."""

ALLOWED, STEEP = 0.04, 10.0
"""See `price`."""

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


def longer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is changed for a front-runner: LONGER times the epochs, and then SETTLE times as many steps in which what must stay is trained alone."""
    return {"epochs": LONGER * settings["epochs"], "settle": SETTLE} if tuned(settings) and {"epochs", "settle"} <= settings.keys() else {}


def stride(settings: Mapping[str, Any], task: Task, model: nn.Module) -> float:
    """The step size that suits the model's width, LORA times as large for LoRA: a search that goes both ways starts from it."""
    return pace(model)["lr"] * (LORA if settings.get("lora") else 1.0)


def kept(model: nn.Module, task: Task, split: Split) -> float | None:
    """Mean probability per token on retain, else on validation, at most READ records; None where there is neither. Retain comes first: of texts that no model
    saw, a model that refuses what it forgot may well refuse some, too."""
    data = split.retain if split.retain is not None else split.validation
    if data is None:
        return None
    return float((-score(model, task, data.take(spread(len(data), READ))).nll).exp().mean())


def validation(model: nn.Module, task: Task, split: Split) -> Callable[[nn.Module], float] | None:
    """A score for tuning and stopping, larger is better, 0 at best: reads forget, validation, retain and general, never test; None without validation. The
    general records that an audit reads must not be among these (`general.parts`).

    -(|mean loss of validation - mean loss of forget|, as a share of what it was), since the AUC of texts known by heart stays 1 nearly to the end; minus
    `price` of the share lost of the probability per token on MOST records of retain (of validation where there is no retain), and the same of general.
    """
    if split.validation is None:
        return None
    kept = [part.take(spread(len(part), MOST)) for part in (split.retain, split.general) if part is not None]
    start, known = score(model, task, split.validation), [utility(score(model, task, part)) for part in kept]
    apart = abs(float(start.nll.mean() - score(model, task, split.forget).nll.mean()))

    def validate(now: nn.Module) -> float:
        forget, unseen = score(now, task, split.forget), score(now, task, split.validation)
        remains = abs(float(unseen.nll.mean() - forget.nll.mean())) / max(apart, 1e-12)
        after = [utility(score(now, task, part)) for part in kept]
        both = list(zip(known, after, strict=True)) if split.retain is not None else [(utility(start), utility(unseen)), *zip(known, after, strict=True)]
        return -remains - sum(price(1 - b / max(a, 1e-12)) for a, b in both)

    return validate


def utility(s: Scores) -> float:
    """Probability per token."""
    return float((-s.nll).exp().mean())


def price(lost: float) -> float:
    """What a share lost of what must stay costs: twice the share, and STEEP times what is beyond ALLOWED, which no gate lets pass.

    >>> price(-0.1), round(price(0.02), 3), round(price(0.08), 3)
    (0.0, 0.04, 0.56)
    """
    return 2 * max(0.0, lost) + STEEP * max(0.0, lost - ALLOWED)
