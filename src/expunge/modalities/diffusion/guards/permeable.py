"""A low-rank adapter on the UNet of a diffusion model, weighted by how much a prompt is about one concept (SPM, card spm): facilitated transport.

gamma   g(p) = max over the concept's names c of max( above(cos(vec E(p), vec E(c))), |tok(p) & tok(c)| / |tok(c)| )
above   (s - threshold) / (full - threshold), within 0 and 1
layer   W x + g scale up down x; g = 0 gives the row back bit for bit. Several guards add up, each by its own g: a stack of adapters with a diagonal gate
config  names (lists of tokens), threshold and full (the cosines from which the gate opens, and is open), scale
tensors features (J, L, D): states of the concept's prompts, and LAYER.up, LAYER.down

The UNet is given states, not tokens. So each state that the text encoder makes of a prompt with tokens of the concept is kept by its digest, which holds
through copies, batches and the empty prompt beside it. States that no prompt gave (soft prompts, weighted prompts) are judged by the cosine alone.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.edits import Hook, bits, raw
from expunge.core.errors import ModelError, PatchError
from expunge.core.hooks import Guarded, wrap
from expunge.modalities.diffusion.task import states
from expunge.parts.adapters import adapt, layers
from expunge.parts.adapters import check as fits

KEPT = 65536
"""States with tokens of the concept that a guard remembers."""


def cosine(x: Tensor, features: Tensor) -> Tensor:
    """(B, J) cosines of states (B, L, D) with features (J, M, D), all places flat; states are cut, or filled with zeros, to M places.

    >>> cosine(torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
    tensor([[0.6000]])
    """
    if x.shape[-1] != features.shape[-1]:
        raise ModelError(f"the gate compares states of width {features.shape[-1]}, this model's have {x.shape[-1]}")
    x = F.pad(x.float(), (0, 0, 0, max(0, features.shape[1] - x.shape[1])))[:, : features.shape[1]]
    return F.normalize(x.flatten(1), dim=1) @ F.normalize(features.float().flatten(1), dim=1).T


def overlap(tokens: Tensor, names: Sequence[Sequence[int]]) -> list[float]:
    """B times the share of a name's tokens that stand in a prompt of tokens (B, L), of the name that fits best.

    >>> overlap(torch.tensor([[1, 5, 0], [5, 6, 0], [2, 3, 0]]), [[5, 6], [7]])
    [0.5, 1.0, 0.0]
    """
    return [max((len(prompt.intersection(name)) / len(name) for name in names if name), default=0.0) for prompt in map(set, tokens.tolist())]


def opened(s: Tensor, threshold: float, full: float, shares: Tensor) -> Tensor:
    """(B,) gamma of the largest cosines (B,) and overlaps (B,). Check (card spm): cosine 0.3, one of two tokens there.

    >>> opened(torch.tensor([0.3, 0.3, 0.9, 0.2]), 0.0, 1.0, torch.tensor([0.5, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.3000, 0.9000, 0.2000])
    >>> opened(torch.tensor([0.3, 0.8, 0.9, 1.0]), 0.8, 1.0, torch.tensor([0.5, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.0000, 0.5000, 1.0000])
    """
    return torch.maximum(((s - threshold) / (full - threshold)).clamp(0, 1), shares)


def digests(x: Tensor) -> list[bytes]:
    """One digest per row of states (B, L, D)."""
    return [hashlib.blake2b(raw(row), digest_size=16).digest() for row in x.detach().cpu()]


def gamma(it: Guarded, x: Tensor) -> Tensor:
    """(B,) weights of the adapter for states (B, L, D)."""
    known = it.cache.get("overlap", {})
    shares = torch.tensor([known.get(key, 0.0) for key in digests(x)], device=x.device)
    return opened(cosine(x, it.tensor("features", x)).amax(1), float(it.hook.config["threshold"]), float(it.hook.config["full"]), shares)


def scored(model: nn.Module, it: Guarded, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """gamma (B,) of prompts of tokens (B, L), and whether the adapter has any weight there."""
    with torch.no_grad():
        g = gamma(it, states(model, x))
    return g, g > 0


def check(model: nn.Module, hook: Hook) -> None:
    for name in ("unet", "text_encoder"):
        if not isinstance(getattr(model, name, None), nn.Module):
            raise PatchError(f"guard {hook.name} stands between text_encoder and unet: {type(model).__name__} has no {name}")
    fits(model, hook)
    if outside := [name for name in layers(hook) if not name.startswith("unet.")]:
        raise PatchError(f"guard {hook.name} adapts {outside[0]}, which is no layer of the unet")
    if not 0 <= hook.config["threshold"] < hook.config["full"] <= 1:
        raise PatchError(f"guard {hook.name}: threshold must lie in 0..1, below full")
    if not all(isinstance(name, list) and all(isinstance(token, int) for token in name) for name in hook.config["names"]):
        raise PatchError(f"guard {hook.name}: names must be lists of tokens")


@wrap(config={"names": list, "threshold": float, "full": float, "scale": float}, tensors={"features": 3}, gate=scored, check=check)
def permeable(model: nn.Module, it: Guarded) -> list[Any]:
    """See the module's docstring."""
    unet, encoder = model.get_submodule("unet"), model.get_submodule("text_encoder")
    return [
        encoder.register_forward_hook(partial(read, it), with_kwargs=True),
        unet.register_forward_pre_hook(partial(enter, it), with_kwargs=True),
        unet.register_forward_hook(partial(leave, it), always_call=True),
        *adapt(model, it),
    ]


def read(it: Guarded, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """Keep the overlaps of prompts by the digests of their states; prompts without any token of the concept leave nothing."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        return
    shares = overlap(tokens, it.hook.config["names"])
    if not any(shares):
        return
    known = it.cache.setdefault("overlap", {})
    for key, share in zip(digests(out if isinstance(out, Tensor) else out[0]), shares, strict=True):
        if share:
            known.pop(key, None)
            known[key] = share
    while len(known) > KEPT:
        known.pop(next(iter(known)))


def enter(it: Guarded, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    it.now = {}
    if not it.on:
        return
    x = (dict(zip(inspect.signature(unet.forward).parameters, args, strict=False)) | kwargs).get("encoder_hidden_states")
    if x is None:
        raise ModelError(f"guard {it.hook.name} reads what the text says: give the unet encoder_hidden_states")
    with torch.no_grad():
        g = gamma(it, x)
    for row, value in zip(x, g.tolist(), strict=True):
        it.record(bits(row.contiguous()), value, value > 0)
    it.now = {"weight": g}


def leave(it: Guarded, unet: nn.Module, args: tuple, out: Any) -> None:
    it.now = {}
