"""Scopes of diffusion models by the names that diffusers gives their parts."""

from __future__ import annotations

import re

from torch import nn

from expunge.core.errors import ScopeError
from expunge.core.types import Scope

PARTS = {
    "xattn": r"unet\..*attn2\.",
    "xattn-kv": r"unet\..*attn2\.(to_k|to_v)\.",
    "noxattn": r"unet\.(?!.*attn2\.)",
    "unet": r"unet\.",
    "text": r"text_encoder",
}
"""xattn: cross-attention (ESD-x); xattn-kv: its keys and values (ESD-x-strict, UCE); noxattn: all else of the UNet (ESD-u); unet; text: the text encoder."""


def part(model: nn.Module, name: str) -> Scope:
    """The weights of a part (PARTS), or those whose name holds a match of the regular expression `name`. Raises ScopeError when there are none."""
    try:
        pattern = re.compile(PARTS.get(name, name))
    except re.error as error:
        raise ScopeError(f"'{name}' is none of {', '.join(PARTS)} and no regular expression: {error}") from None
    found = [n for n, p in model.named_parameters() if pattern.search(n) and p.is_floating_point()]
    if not found:
        raise ScopeError(
            f"no weight fits '{name}'; parts are {', '.join(PARTS)}, and the model has {', '.join(n for n, _ in list(model.named_parameters())[:6])} ..."
        )
    return Scope(dict.fromkeys(found))
