"""Put tokens before every text, after its first token where that is `bos` (prompting, card guardrails). Logits come out at the places of the text.

config   tokens, bos (-1: none)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook
from expunge.core.errors import PatchError
from expunge.core.hooks import Guarded, root, wrap
from expunge.modalities.language.task import blocks


def put(x: Tensor, mask: Tensor, tokens: list[int], bos: int = -1) -> tuple[Tensor, Tensor]:
    """Rows (B, T) with the tokens put between left padding (and bos) and the text; ids and mask are (B, P + T).

    >>> put(torch.tensor([[0, 5, 6], [1, 5, 0]]), torch.tensor([[0, 1, 1], [1, 1, 0]]), [8, 9], bos=1)[0]
    tensor([[0, 8, 9, 5, 6],
            [1, 8, 9, 5, 0]])
    """
    P, T = len(tokens), x.shape[1]
    first = mask.long().argmax(1)
    start = first + (x.gather(1, first[:, None])[:, 0] == bos)
    place = torch.arange(P + T, device=x.device) - start[:, None]
    source = torch.arange(P + T, device=x.device).expand(len(x), -1)
    old = torch.where(place < 0, source, source - P).clamp(0, T - 1)
    new = (place >= 0) & (place < P)
    fixed = torch.tensor(tokens, device=x.device)[place.clamp(0, P - 1)]
    return torch.where(new, fixed, x.gather(1, old)), torch.where(new, torch.ones_like(old), mask.gather(1, old)).to(mask.dtype)


def check(model: nn.Module, hook: Hook) -> None:
    blocks(model)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    tokens = hook.config["tokens"]
    if not tokens or not all(isinstance(t, int) and 0 <= t < (size or 1 << 31) for t in tokens):
        raise PatchError(f"guard {hook.name}: tokens must be a list of the model's token numbers, found {str(tokens)[:60]}")


@wrap(config={"tokens": list, "bos": int}, tensors={}, check=check)
def prefix(model: nn.Module, it: Guarded) -> list[Any]:
    """See the module's docstring."""
    return root(model, it, before, after)


def before(model: nn.Module, it: Guarded, call: dict[str, Any]) -> dict[str, Any]:
    x, mask = put(call["input_ids"], call["attention_mask"], it.hook.config["tokens"], it.hook.config["bos"])
    it.now = {"columns": call["input_ids"].shape[1]}
    call = {**call, "input_ids": x, "attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    if isinstance(call.get("logits_to_keep"), Tensor):
        call["logits_to_keep"] = call["logits_to_keep"] + len(it.hook.config["tokens"])
    return call


def after(model: nn.Module, it: Guarded, now: dict[str, Any], logits: Tensor) -> Tensor:
    return logits[:, -now["columns"] :]
