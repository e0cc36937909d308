"""A low-rank adapter weighted by how much a prompt looks like one request's data (O3, card o3): w = 0 is the model itself, w = 1 the merged adapter.

whiten  z = C^(-1/2) (x - mean), C a shrunk covariance of prompts, so that |z - centre|^2 is a squared Mahalanobis distance
score   s = (near - c0) / c1 / 2 - (far - m0) / m1 / 2: near the largest cosine of z to a forget prompt, far the mean of (z - centre)^2 over the D directions
weight  w = clamp( (s - low) / (high - low), 0, 1 ): rises with s, without holes
config  layer, marker, low, high, threshold (the score above which w > 0: low), cosine [c0, c1], distance [m0, m1], floor, scale
tensors mean (D,), axes (R, D), spread (R,), centre (D,), prompts (N, D) of length 1, and LAYER.up, LAYER.down
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.edits import Hook
from expunge.core.errors import PatchError
from expunge.core.hooks import Guarded, root, wrap
from expunge.modalities.language.guards.gate import ends, flush, note, pooled
from expunge.parts.adapters import adapt
from expunge.parts.adapters import check as fits


def whiten(x: Tensor, mean: Tensor, axes: Tensor, spread: Tensor, floor: float) -> Tensor:
    """(B, D) C^(-1/2) (x - mean) of states (B, D) for C = sum_r spread_r v_r v_r' + floor I, rows v_r of axes (R, D) orthonormal.

    >>> import torch
    >>> v = torch.tensor([[1.0, 0.0]])
    >>> whiten(torch.tensor([[2.0, 1.0]]), torch.zeros(2), v, torch.tensor([3.0]), 1.0)
    tensor([[1., 1.]])
    """
    d = x - mean
    return d * floor**-0.5 + ((d @ axes.T) * ((spread + floor) ** -0.5 - floor**-0.5)) @ axes


def likeness(z: Tensor, prompts: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """near (B,) and far (B,) of whitened states (B, D)."""
    return (F.normalize(z, dim=1) @ prompts.T).amax(1), (z - centre).square().mean(1)


def score(near: Tensor, far: Tensor, config: Mapping[str, Any]) -> Tensor:
    """(B,) s, each half in units of what separates the request's own prompts from others.

    >>> import torch
    >>> score(torch.tensor([0.5]), torch.tensor([4.0]), {"cosine": [1.0, 0.5], "distance": [2.0, 1.0]})      # ((.5 - 1) / .5 - (4 - 2) / 1) / 2
    tensor([-1.5000])
    """
    (c0, c1), (m0, m1) = config["cosine"], config["distance"]
    return ((near - c0) / c1 - (far - m0) / m1) / 2


def weights(s: Tensor, low: float, high: float) -> Tensor:
    """(B,) w: 0 up to low, 1 from high on, straight in between.

    >>> import torch
    >>> weights(torch.tensor([-1.0, 0.0, 0.25, 1.0, 9.0]), 0.0, 1.0)
    tensor([0.0000, 0.0000, 0.2500, 1.0000, 1.0000])
    """
    return ((s - low) / (high - low)).clamp(0, 1)


def scored(model: nn.Module, it: Guarded, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B,) of right-padded rows, and whether the adapter has any weight there."""
    config = it.hook.config
    end = ends(x, n, config["marker"])
    states = pooled(model, x, end, config["layer"])
    z = whiten(states, it.tensor("mean", states), it.tensor("axes", states), it.tensor("spread", states), float(config["floor"]))
    s = score(*likeness(z, it.tensor("prompts", z), it.tensor("centre", z)), config)
    flagged = s > config["low"]
    note(it, x, end, s, flagged)
    return s, flagged


def check(model: nn.Module, hook: Hook) -> None:
    fits(model, hook)
    if not (hook.config["high"] > hook.config["low"] and hook.config["floor"] > 0):
        raise PatchError(f"guard {hook.name}: high must lie above low, and floor above 0")
    if any(len(hook.config[k]) != 2 for k in ("cosine", "distance")):
        raise PatchError(f"guard {hook.name}: cosine and distance are pairs of numbers")
    if hook.config["layer"] not in dict(model.named_modules()):
        raise PatchError(f"guard {hook.name}: the model has no module '{hook.config['layer']}'")


CONFIG = {"layer": str, "marker": list, "low": float, "high": float, "threshold": float, "cosine": list, "distance": list, "floor": float, "scale": float}


@wrap(config=CONFIG, tensors={"mean": 1, "axes": 2, "spread": 1, "centre": 1, "prompts": 2}, gate=scored, check=check)
def gated(model: nn.Module, it: Guarded) -> list[Any]:
    """See the module's docstring."""
    return [*root(model, it, before), *adapt(model, it)]


def before(model: nn.Module, it: Guarded, call: dict[str, Any]) -> dict[str, Any]:
    x, n, _ = flush(call["input_ids"], call["attention_mask"])
    s, _ = scored(model, it, x, n)
    it.now = {"weight": weights(s, float(it.hook.config["low"]), float(it.hook.config["high"]))}
    return call
