"""Training from scratch: what worlds, the retrained reference and proxies share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from expunge.core.errors import ModelError
from expunge.core.machine.devices import reseeded
from expunge.core.modality import of
from expunge.core.session import scratch
from expunge.core.types import Task, device_of, float_of
from expunge.parts.updates.descend import descend


def _configured(model: nn.Module) -> nn.Module | None:
    """A model of transformers or diffusers made anew from its configuration; None for any other."""
    config: Any = getattr(model, "config", None)
    if config is None or not (hasattr(model, "post_init") or hasattr(type(model), "from_config")):
        return None
    made: Any = type(model)(copy.deepcopy(config)) if hasattr(model, "post_init") else type(model).from_config(config)  # pyright: ignore
    if float_of(made) != float_of(model):
        made = made.to(float_of(model))
    return made.to(device_of(model)).train(model.training)


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy with newly drawn weights and reset buffers, from `seed` alone; the global RNG is left as it was.

    Every module that owns parameters or buffers must have `reset_parameters`, as all of PyTorch's layers do; otherwise ModelError. An
    initialisation that the model's own constructor added on top (kaiming, say) is not repeated. A model of transformers or diffusers, also one inside
    the model, is made anew from its configuration.
    """
    with reseeded(seed):
        if (made := _configured(model)) is not None:
            return made
        twin = copy.deepcopy(model)
        done = []
        for name, child in model.named_children():
            if (made := _configured(child)) is not None:
                setattr(twin, name, made)
                done.append(f"{name}.")
        for name, module in twin.named_modules():
            if f"{name}.".startswith(tuple(done)):
                continue
            if not any(True for _ in module.parameters(recurse=False)) and not any(True for _ in module.buffers(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            if reset is None:
                raise ModelError(f"module '{name}' ({type(module).__name__}) has weights but no reset_parameters(); add one to give fresh weights")
            reset()
    for p in twin.parameters():
        p.requires_grad_(True)
        p.grad = None
    return twin


def train(model: nn.Module, task: Task, data, *, epochs: float, batch_size: int, seed: int, ema: float = 0.0, **options: Any) -> list[float]:
    """Train `model` in place on the mean loss; options are those of `parts.updates.descend.alternate`. Leaves it in eval mode.

    ema    decay per step of the average of the weights that the model ends with, min(ema, (1 + k) / (10 + k)) at step k; 0 ends with the last weights
    """
    session = scratch(model)
    session.train()
    average = {n: p.detach().clone() for n, p in session.params.items()} if ema else {}

    def after(step: int) -> None:
        with torch.no_grad():
            for n, p in session.params.items():
                average[n].lerp_(p, 1 - min(ema, (1 + step) / (10 + step)))

    losses = descend(
        session, lambda b: task.forward(model, b).mean.mean(), task.batches(data, batch_size, epochs=epochs, seed=seed), after=after if ema else None, **options
    )
    with torch.no_grad():
        for n, value in average.items():
            session.params[n].copy_(value)
    model.eval()
    return losses


def pace(task: Task, model: nn.Module) -> dict[str, Any]:
    """How attackers train: SGD with momentum 0.9 and lr 0.01, unless the modality says otherwise."""
    return of(task).pace(model)
