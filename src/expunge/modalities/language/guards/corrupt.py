"""Corrupt the input embeddings of prompts that a classifier flags (ECO, card eco). Rows that are not flagged pass bit for bit.

config   layer, marker, threshold (the classifier's), corruption, strength, first, select
tensors  weight (D,), bias (); noise (L, first) of variance 1, token t of a prompt gets row t mod L
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.edits import Hook
from expunge.core.errors import PatchError
from expunge.core.hooks import Guarded, root, wrap
from expunge.modalities.language.guards.gate import ends, flush, linear_gate

CORRUPTIONS = ("zero_out_top_k", "flip_sign", "rand_noise_first_n")
SELECT = ("all_but_last", "all")


def corrupted(e: Tensor, corruption: str, strength: float, noise: Tensor | None = None) -> Tensor:
    """Embeddings (..., D) corrupted. zero_out_top_k, flip_sign: the share `strength` of dimensions with the largest |e|, token by token;
    rand_noise_first_n: strength times noise (..., n) on the first n dimensions.

    >>> e = torch.tensor([1.0, -3.0, 2.0])
    >>> corrupted(e, "zero_out_top_k", 1 / 3), corrupted(e, "flip_sign", 1 / 3)
    (tensor([1., 0., 2.]), tensor([1., 3., 2.]))
    >>> corrupted(e, "rand_noise_first_n", 10.0, torch.tensor([0.5]))
    tensor([ 6., -3.,  2.])
    """
    if corruption == "rand_noise_first_n":
        out = e.clone()
        out[..., : noise.shape[-1]] += strength * noise.to(e)
        return out
    k = min(e.shape[-1], round(max(0.0, strength) * e.shape[-1]))
    top = torch.zeros_like(e, dtype=torch.bool).scatter_(-1, e.abs().topk(k, -1).indices, True)
    return torch.where(top, torch.zeros_like(e) if corruption == "zero_out_top_k" else -e, e)


def check(model: nn.Module, hook: Hook) -> None:
    embed: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # pyright: ignore
    if embed is None:
        raise PatchError(f"guard {hook.name}: the model has no input embeddings to corrupt")
    for name, known in (("corruption", CORRUPTIONS), ("select", SELECT)):
        if hook.config[name] not in known:
            raise PatchError(f"guard {hook.name}: {name} must be one of {', '.join(known)}, not '{hook.config[name]}'")
    if hook.config["corruption"] == "rand_noise_first_n" and ("noise" not in hook.tensors or hook.tensors["noise"].ndim != 2):
        raise PatchError(f"guard {hook.name}: rand_noise_first_n needs a tensor noise of 2 dimensions")
    if hook.config["layer"] not in dict(model.named_modules()):
        raise PatchError(f"guard {hook.name}: the model has no module '{hook.config['layer']}'")


CONFIG = {"layer": str, "marker": list, "threshold": float, "corruption": str, "strength": float, "select": str}


@wrap(config=CONFIG, tensors={"weight": 1, "bias": 0}, gate=linear_gate, check=check)
def corrupt(model: nn.Module, it: Guarded) -> list[Any]:
    """See the module's docstring."""
    embed: Any = model.get_input_embeddings()  # pyright: ignore
    return [*root(model, it, before), embed.register_forward_hook(partial(embedded, it))]


def before(model: nn.Module, it: Guarded, call: dict[str, Any]) -> dict[str, Any]:
    x, n, first = flush(call["input_ids"], call["attention_mask"])
    flagged = linear_gate(model, it, x, n)[1].to(x.device)
    end = ends(x, n, it.hook.config["marker"]) - int(it.hook.config["select"] == "all_but_last")
    place = torch.arange(x.shape[1], device=x.device) - first[:, None]
    it.now = {"places": (place >= 0) & (place < end[:, None]) & flagged[:, None], "place": place.clamp(min=0)}
    return call


def embedded(it: Guarded, module: nn.Module, args: tuple, e: Tensor) -> Tensor | None:
    """The embeddings (B, T, D) with flagged places corrupted."""
    places = it.now.get("places")
    if places is None or not bool(places.any()):
        return None
    more = e.shape[1] - places.shape[1]  # tokens that a guard further inside has put before the text
    places, noise = F.pad(places, (more, 0)), None
    if it.hook.config["corruption"] == "rand_noise_first_n":
        table = it.tensor("noise", e)
        noise = table[F.pad(it.now["place"], (more, 0)) % len(table)]
    return torch.where(places[..., None], corrupted(e, it.hook.config["corruption"], float(it.hook.config["strength"]), noise), e)
