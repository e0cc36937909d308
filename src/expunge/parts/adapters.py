"""Low-rank layers that a guard switches on row by row: out + w (alpha / r) B A x, with w (B,) from `it.now["weight"]`. For gated, offset and permeable."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.edits import Hook, LowRank
from expunge.core.errors import PatchError
from expunge.core.hooks import Guarded
from expunge.core.patch import Patch


def stored(patch: Patch) -> tuple[dict[str, Tensor], float]:
    """The LowRank edits of a patch as tensors of a hook, LAYER.up and LAYER.down, and their common scale."""
    edits = [e for e in patch.edits if isinstance(e, LowRank)]
    tensors = {f"{e.name.removesuffix('.weight')}.{part}": getattr(e, part).detach().clone() for e in edits for part in ("up", "down")}
    return tensors, edits[0].scale if edits else 0.0


def layers(hook: Hook) -> list[str]:
    """Names of the layers for which the hook holds low-rank weights."""
    return sorted(n.removesuffix(".down") for n in hook.tensors if n.endswith(".down"))


def check(model: nn.Module, hook: Hook) -> None:
    """Raises PatchError for layers that the model lacks or whose shapes differ."""
    modules = dict(model.named_modules())
    if not layers(hook):
        raise PatchError(f"guard {hook.name} holds no low-rank weights (LAYER.up and LAYER.down)")
    for name in layers(hook):
        module, up, down = modules.get(name), hook.tensors.get(f"{name}.up"), hook.tensors[f"{name}.down"]
        weight = getattr(module, "weight", None)
        shaped = isinstance(weight, Tensor) and weight.ndim >= 2
        if up is None or not shaped or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise PatchError(f"guard {hook.name} adapts {name}, which this model does not have as a linear layer or convolution: another architecture?")
        if (up.shape[0], down.shape[1]) != tuple(weight.flatten(1).shape):
            raise PatchError(f"guard {hook.name} holds {name} as {(up.shape[0], down.shape[1])}, this model has {tuple(weight.shape)}: another model?")


def adapt(model: nn.Module, it: Guarded) -> list[Any]:
    """Hooks on all adapted layers."""
    modules = dict(model.named_modules())
    return [modules[name].register_forward_hook(partial(adapted, it, name)) for name in layers(it.hook)]


def adapted(it: Guarded, name: str, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
    """Rows with w = 0 are given back bit for bit."""
    w = it.now.get("weight")
    if w is None or not bool((w != 0).any()):
        return None
    up, down = it.tensor(f"{name}.up", out), it.tensor(f"{name}.down", out)
    change = float(it.hook.config["scale"]) * product(module, args[0].to(down.dtype), up, down)
    w = w.to(out.device).repeat_interleave(out.shape[0] // len(w)).view(-1, *[1] * (out.ndim - 1))
    return torch.where(w != 0, out + (w * change).to(out.dtype), out)


def product(module: nn.Module, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """B A x as the layer would give it with the weight B A: up (O, r), down (r, I); of a convolution I is that of its weight, flat.

    >>> product(nn.Linear(2, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [-2.0]]), torch.ones(1, 2))
    tensor([[ 3., -6.]])
    """
    if isinstance(module, nn.Conv2d):
        low = F.conv2d(x, down.view(len(down), *module.weight.shape[1:]), None, module.stride, module.padding, module.dilation)
        return F.conv2d(low, up[:, :, None, None])
    if type(module).__name__ == "Conv1D":  # of transformers, which holds (I, O)
        return (x @ up) @ down
    return (x @ down.T) @ up.T
