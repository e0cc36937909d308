"""The tensors of a model, and the digest that names it in patches, caches and reports."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from expunge.core.edits import raw
from expunge.core.hooks import guards


def model_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, names included, and over the inference-time guards that stand on the model."""
    h = hashlib.sha256()
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
