"""What a component may move: everything, or one group of LoRA adapters and the head over weights that never move. Card: s3t, step 2."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, ScopeError
from expunge.core.machine.devices import reseeded
from expunge.modalities.classification.task import head
from expunge.parts.scopes.lora import exactly

ADAPTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Start:
    """The model from which components start, and the names of the parameters of each adapter block; without blocks everything moves."""

    model: nn.Module
    blocks: tuple[tuple[str, ...], ...] = ()
    head: tuple[str, ...] = ()

    def names(self, block: int) -> list[str]:
        """Parameters that a component of this block moves."""
        return [n for n, _ in self.model.named_parameters()] if block < 0 else [*self.blocks[block], *self.head]

    def held(self, block: int) -> list[str]:
        """Tensors that its checkpoint holds: these parameters, and the buffers of a model that moves as a whole."""
        return self.names(block) + ([n for n, _ in self.model.named_buffers()] if block < 0 else [])


def groups(layers: list[str], blocks: int) -> list[list[str]]:
    """The layers in `blocks` groups of like size, from the top layer downward.

    >>> groups(["a", "b", "c", "d"], 2)
    [['c', 'd'], ['a', 'b']]
    """
    n = len(layers)
    return [layers[n - (i + 1) * n // blocks : n - i * n // blocks] for i in range(blocks)]


def start(model: nn.Module, blocks: int, *, rank: int = 16, alpha: float = 16.0, seed: int = 0) -> Start:
    """A copy of `model` with rank-stabilised LoRA (W x + alpha / sqrt(r) B A x) on every linear layer and convolution but the head, in `blocks` groups, top
    first.

    A is drawn from `seed`, B is zero: an adapter that was never trained does nothing. Weights of the model itself do not move; the head does. The result is
    in eval mode: no dropout, batch norm by its stored statistics. Source: card s3t, defaults (its query and value projections become all layers, which small
    models need). Raises ModelError without peft or without a linear head, ScopeError when there are fewer layers than blocks.
    """
    if not blocks:
        return Start(copy.deepcopy(model))
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ModelError("adapters need peft: pip install 'expunge[text]'") from None
    last = head(model)[0]
    layers = [n for n, m in model.named_modules() if isinstance(m, ADAPTED) and n != last]
    if len(layers) < blocks:
        raise ScopeError(f"{blocks} blocks need as many linear layers or convolutions below the head; the model has {len(layers)}")
    ours = copy.deepcopy(model).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly(layers), lora_dropout=0.0, use_rslora=True)
    with reseeded(seed):
        inject_adapter_in_model(config, ours, "expunge")
    ours.eval()
    named = [n for n, _ in ours.named_parameters()]
    parts = tuple(tuple(n for n in named if ".lora_" in n and n.partition(".lora_")[0] in group) for group in (set(g) for g in groups(layers, blocks)))
    return Start(ours, parts, tuple(n for n in named if n.startswith(f"{last}.") and ".lora_" not in n))


def load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint's tensors into the module. Raises ModelError for names or shapes that do not fit."""
    mine = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in tensors.items():
        if name not in mine or mine[name].shape != value.shape:
            raise ModelError(f"a checkpoint holds {name} of shape {tuple(value.shape)}, which the model does not have")
        with torch.no_grad():
            mine[name].copy_(value)
