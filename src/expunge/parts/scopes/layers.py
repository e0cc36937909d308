"""Scopes by name: everything, glob patterns, the last layers."""

from __future__ import annotations

import fnmatch

from torch import nn

from expunge.core.errors import ScopeError
from expunge.core.types import Scope


def everything(model: nn.Module, buffers: str = "move") -> Scope:
    """All floating-point parameters that require a gradient. Raises ScopeError if there are none.

    >>> list(everything(nn.Linear(2, 1)).masks)
    ['weight', 'bias']
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
    if not names:
        raise ScopeError("the model has no trainable weight: no parameter requires a gradient")
    return Scope(dict.fromkeys(names), buffers)


def match(model: nn.Module, *globs: str, buffers: str = "move") -> Scope:
    """All parameters whose name fits one of the patterns, as `layer3.*` or `*.bias`. Raises ScopeError if none fits."""
    names = [n for n, _ in model.named_parameters() if any(fnmatch.fnmatchcase(n, g) for g in globs)]
    if not names:
        raise ScopeError(f"no parameter fits {', '.join(globs)}; the model has {', '.join(n for n, _ in model.named_parameters())}")
    return Scope(dict.fromkeys(names), buffers)


def last(model: nn.Module, k: int, buffers: str = "move") -> Scope:
    """The parameters of the last k linear or convolution layers, in order of registration."""
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    if not 1 <= k <= len(layers):
        raise ScopeError(f"k must be in 1..{len(layers)}, the number of linear and convolution layers, not {k}")
    return match(model, *(f"{n}.*" for n in layers[-k:]), buffers=buffers)
