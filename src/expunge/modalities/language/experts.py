"""Experts: the mixture-of-experts layers of a model, how much a data set is routed to each expert, and the scope of one of them. Card uoe-moe, steps 1 to 3.

A layer is a module that holds a child with `expert` in its name and, beside it, a router: a weight with one row per expert. The experts are a list of
modules, or tensors with one slice per expert on the first axis. Shared experts, which all tokens pass, are none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ModelError, ScopeError
from expunge.core.types import Batch, Scope, Task
from expunge.modalities.language.remember import passes
from expunge.modalities.language.texts import Texts


@dataclass(frozen=True)
class Layer:
    """One mixture-of-experts layer.

    name      the module that holds router and experts
    router    the module whose weight (E, D) scores the experts
    experts   E times: parameter name -> the expert's place on the first axis, or None where the parameter is the expert's own
    """

    name: str
    router: str
    experts: tuple[Mapping[str, int | None], ...]


def layers(model: nn.Module) -> list[Layer]:
    """The mixture-of-experts layers in order. Raises ModelError for a model without, or whose experts have no router beside them."""
    found = []
    for name, module in model.named_modules():
        for child, held in module.named_children():
            if "expert" in child and "shared" not in child:
                slices = _slices(f"{name}.{child}".lstrip("."), held)
                if slices:
                    found.append(Layer(name, _router(name, module, len(slices)), slices))
    if not found:
        raise ModelError(f"{type(model).__name__} has no experts: a mixture-of-experts model is needed")
    return found


def _slices(name: str, held: nn.Module) -> tuple[Mapping[str, int | None], ...]:
    """Parameters of each expert; empty where `held` is no bank of experts (one row, as the gate of a shared expert, or rows of unlike number)."""
    if isinstance(held, nn.ModuleList):
        return tuple({f"{name}.{k}.{n}": None for n, _ in one.named_parameters()} for k, one in enumerate(held))
    sizes = {p.shape[0] if p.ndim > 1 else 0 for p in held.parameters()}
    count = sizes.pop() if len(sizes) == 1 else 0
    return tuple({f"{name}.{n}": k for n, _ in held.named_parameters()} for k in range(count)) if count > 1 else ()


def _router(name: str, module: nn.Module, count: int) -> str:
    """The part beside the experts that owns a weight of `count` rows; one called gate or router goes first."""
    rows = []
    for child, held in module.named_children():
        for inner, part in held.named_modules(prefix=child):
            weight = part._parameters.get("weight")
            if "expert" not in inner and weight is not None and weight.ndim == 2 and weight.shape[0] == count:
                rows.append(inner)
    if not rows:
        raise ModelError(f"{name or 'the model'} holds {count} experts, but no router with a weight of {count} rows beside them")
    rows.sort(key=lambda inner: not ("gate" in inner or "router" in inner))
    return f"{name}.{rows[0]}".lstrip(".")


@contextlib.contextmanager
def watched(model: nn.Module, picked: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """Inside, every forward pass leaves the inputs of these layers' routers in the dict, by layer name."""
    caught: dict[str, Tensor] = {}

    def catch(name: str):
        def hook(_, args, kwargs) -> None:
            caught[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    handles = [model.get_submodule(layer.router).register_forward_pre_hook(catch(layer.name), with_kwargs=True) for layer in picked]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def probabilities(model: nn.Module, layer: Layer, x: Tensor, batch: Batch) -> Tensor:
    """(B, T, E) softmax over all experts of the router's logits for its inputs x, in float32 or wider; not the renormalised weights of the top k.

    Recomputed from weight and bias, since routers return logits, scores and choices in orders of their own.
    """
    own = model.get_submodule(layer.router)._parameters
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight, bias = (own[n].to(wide) if own.get(n) is not None else None for n in ("weight", "bias"))  # pyright: ignore
    return F.linear(x.to(wide), weight, bias).softmax(-1).view(*batch["x"].shape, -1)


def real_mean(values: Tensor, n: Tensor) -> Tensor:
    """(B, ...) mean of values (B, T, ...) over the first n (B,) tokens of each row: what stands in padding never counts.

    >>> real_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2]))
    tensor([[2.]])
    """
    n = n.to(values.device)
    real = torch.arange(values.shape[1], device=values.device) < n[:, None]
    shape = (*real.shape, *[1] * (values.ndim - 2))
    return values.masked_fill(~real.view(shape), 0).sum(1) / n.view(-1, *[1] * (values.ndim - 2))


def affinity(model: nn.Module, task: Task, data: Texts, size: int = 16) -> Tensor:
    """(L, E) share of the data that each router gives to each expert: the mean over records of the mean over their tokens. One pass."""
    found = layers(model)
    total: list[Tensor] = [torch.zeros(len(layer.experts), dtype=torch.float64) for layer in found]
    with watched(model, found) as caught:
        for _, batch, _ in passes(model, task, data, size):
            for k, layer in enumerate(found):
                total[k] += real_mean(probabilities(model, layer, caught[layer.name], batch), batch["n"]).sum(0).double().cpu()
    return torch.stack(total) / len(data)


def expert(model: nn.Module, layer: int, index: int, buffers: str = "move") -> Scope:
    """One expert and the router of its layer; layers and experts are counted from 0. Raises ScopeError for one that is not there."""
    found = layers(model)
    if not (0 <= layer < len(found) and 0 <= index < len(found[layer].experts)):
        raise ScopeError(f"there is no expert {index} in layer {layer}; layers are 0..{len(found) - 1} and experts 0..{len(found[0].experts) - 1}")
    masks: dict[str, Tensor | None] = {}
    for name, place in found[layer].experts[index].items():
        masks[name] = None
        if place is not None:
            mask = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
            mask[place] = True
            masks[name] = mask
    router = found[layer].router
    masks |= {f"{router}.{n}": None for n, _ in model.get_submodule(router).named_parameters(recurse=False)}
    return Scope(masks, buffers)
