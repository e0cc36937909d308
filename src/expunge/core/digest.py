"""The tensors of a model, and the digest that names it in patches, caches and reports."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from expunge.core.edits import raw
from expunge.core.errors import ModelError
from expunge.core.hooks import guards


def bare(model: nn.Module) -> nn.Module:
    """The model itself under `torch.compile`, DataParallel or DistributedDataParallel, which share its weights and name them otherwise."""
    while True:
        if isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def whole(model: nn.Module) -> nn.Module:
    """The model itself (`bare`), if all its weights are here as numbers that can be moved. Raises ModelError for weights that are on the meta device, offloaded
    or quantised, and says what to load instead."""
    model = bare(model)
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ModelError(f"{name} is on the meta device, offloaded or never loaded: load the model whole, without device_map and offloading")
        if not p.is_floating_point() or p.dtype.itemsize < 2:
            kind = str(p.dtype).removeprefix("torch.")
            raise ModelError(f"{name} is stored as {kind}: the model is quantised; load it unquantised, unlearn, and quantise what comes out")
    for name, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ModelError(f"the weights of {name or 'the model'} are offloaded by accelerate: load the model whole, without device_map and offloading")
    return model


def model_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, names included, and over the inference-time guards that stand on the model."""
    h, model = hashlib.sha256(), bare(model)
    for name, t in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        h.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        h.update(raw(t))
    for name, guarded in guards(model).items():
        h.update(f"{name}{guarded.hook.digest}".encode())
    return h.hexdigest()


def distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the second name of a tensor that has two, as tied embeddings do."""
    found: dict[str, torch.Tensor] = {}
    known: set[tuple[int, torch.Size]] = set()
    for name, t in model.state_dict().items():
        if t.numel() and (t.data_ptr(), t.shape) in known:
            continue
        known.add((t.data_ptr(), t.shape))
        found[name] = t.detach().cpu().contiguous()
    return found
