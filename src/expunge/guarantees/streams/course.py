"""How a stream of requests is played: what retains, what forgets, and with which settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expunge.core.errors import SettingError, suggest
from expunge.core.registry import METHODS

TERMS = ("none", "lwf", "ewc", "gem", "agem", "der", "derpp", "refresh")
REPLAY = ("gem", "agem", "der", "derpp", "refresh")
"""Terms that keep records."""


@dataclass(frozen=True)
class Course:
    """How a stream is played.

    term          what retains while learning and in repair, one of TERMS
    method        the registered method that forgets, with its `settings`
    retain        what the method gets as retain part: held (all records held) or memory (those of the memory)
    epochs, lr, momentum, batch_size    of learning, by SGD; clip: largest norm of a gradient
    memory        most records in memory          replay     records of the memory (gem: of each part) per step
    repair        passes over the memory after each forget request; terms without memory have none
    relabel       make logits anew that a model made which had seen what was forgotten
    alpha         weight of lwf's or der's distillation          beta       weight of derpp's replayed loss
    temperature   of lwf                                         strength   lambda of ewc
    gamma         weight of each older Fisher part, per part     weighted   Fisher terms times p_y
    margin, eps   of gem                                         delta      of refresh
    """

    term: str = "none"
    method: str = "salun"
    settings: Mapping[str, Any] = field(default_factory=dict)
    retain: str = "held"
    epochs: float = 10.0
    lr: float = 0.01
    momentum: float = 0.9
    clip: float = math.inf
    batch_size: int = 32
    memory: int = 200
    replay: int = 32
    repair: float = 1.0
    relabel: bool = True
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 2.0
    strength: float = 10.0
    gamma: float = 1.0
    weighted: bool = False
    margin: float = 0.5
    eps: float = 1e-3
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if self.term not in TERMS:
            raise SettingError(suggest("no retention term", self.term, TERMS))
        if self.retain not in ("held", "memory"):
            raise SettingError(f"retain must be held or memory, not '{self.retain}'")
        if self.retain == "memory" and self.term not in REPLAY:
            raise SettingError(f"retain=memory needs a term with a memory ({', '.join(REPLAY)}); {self.term} keeps no record")
        above = ("epochs", "clip", "batch_size", "memory", "replay", "temperature", "eps")
        for name in (*above, "lr", "momentum", "repair", "alpha", "beta", "strength", "gamma", "margin", "delta"):
            value = getattr(self, name)
            if not (value > 0 if name in above else value >= 0) or not (math.isfinite(value) or name == "clip"):
                raise SettingError(f"{name} must be a finite number {'above 0' if name in above else 'of 0 or more'}, not {value}")
        METHODS[self.method].settings(self.settings)
