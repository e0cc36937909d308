"""LoRA as a session: W x + (alpha / r) B A x with A (r, I) and B (O, r) trained and W never written. Built on peft, so that what comes out is what
other tools serve. Source: Hu et al., arXiv:2106.09685; FILA start: card loku, steps 3 to 5.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.edits import LowRank
from expunge.core.errors import Diverged, ScopeError
from expunge.core.patch import Patch
from expunge.core.session import Session

NAME = "expunge"


def linears(model: nn.Module, layers: str = "") -> list[str]:
    """Names of the linear layers that LoRA adapts: those whose name holds a match of the regular expression `layers`; all but the output head when "".

    Raises ScopeError when nothing fits, naming what there is.
    """
    output: Any = getattr(model, "get_output_embeddings", None)
    head = output() if output is not None else None
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        names = [n for n, m in found.items() if (re.search(layers, n) if layers else m is not head)]
    except re.error as error:
        raise ScopeError(f"layers '{layers}' is no regular expression: {error}") from None
    if not names:
        kinds = sorted({n.rsplit(".", 1)[-1] for n in found})
        raise ScopeError(f"no linear layer fits '{layers}'; the model's linear layers are named {', '.join(kinds) or 'nothing'}")
    return names


def exactly(names: Iterable[str]) -> str:
    """The layers of these names and no others, in peft's terms: given as a list, "0" would also name "x.0".

    >>> exactly(["a.0", "b"])
    'a\\\\.0|b'
    """
    return "|".join(re.escape(n) for n in names)


@dataclass(frozen=True)
class Adapted:
    """What LoRA adapts: names of linear layers (`turned`: those that hold their weight as (I, O), as GPT-2's Conv1D does) and of the stacks of matrices
    (E, O, I) that the experts of a mixture are fused into."""

    layers: tuple[str, ...]
    turned: frozenset[str] = frozenset()
    stacks: tuple[str, ...] = ()


FIXED = {"mamba": "out_proj", "mamba2": "out_proj", "falcon_mamba": "out_proj", "falcon_h1": "out_proj", "nemotron_h": "out_proj"}
"""Kind of model -> the layer whose weight its kernels read past any adapter, so that peft refuses to adapt it."""


def adaptable(model: nn.Module, layers: str = "", stacks: bool = True) -> Adapted:
    """What of the model LoRA adapts: linear layers, Conv1D and fused experts whose name holds a match of `layers`; for "" all but the output head, Mamba's
    out_proj (FIXED) and experts' routers. `stacks` False leaves out fused experts.

    Raises ScopeError when nothing fits, and for a name that fits but cannot be adapted: a layer whose weight is also another's (a tied head), and FIXED.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    turned = frozenset(n for n, m in kinds.items() if isinstance(m, Conv1D))
    fused = tuple(n for n, p in model.named_parameters() if stacks and p.ndim == 3 and p.is_floating_point() and _expert(model, n))
    fixed = FIXED.get(str(getattr(getattr(model, "config", None), "model_type", "")), "")
    own = dict(model.named_parameters())
    if not layers:
        output: Any = getattr(model, "get_output_embeddings", None)
        head = output() if output is not None else None
        found = tuple(n for n, m in kinds.items() if m is not head and n.rpartition(".")[2] != fixed and f"{n}.weight" in own)
    else:
        try:
            found, fused = tuple(n for n in kinds if re.search(layers, n)), tuple(n for n in fused if re.search(layers, n))
        except re.error as error:
            raise ScopeError(f"layers '{layers}' is no regular expression: {error}") from None
        for name in found:
            if f"{name}.weight" not in own:
                raise ScopeError(f"layers '{layers}' names {name}, whose weight is also another layer's (a tied head): an adapter cannot change one alone")
            if fixed and name.rpartition(".")[2] == fixed:
                raise ScopeError(f"layers '{layers}' names {name}: kernels of {model.config.model_type} read its weight past any adapter; name others")  # pyright: ignore
    if not (found or fused):
        names = sorted({n.rsplit(".", 1)[-1] for n in kinds})
        raise ScopeError(f"no linear layer fits '{layers}'; the model's linear layers are named {', '.join(names) or 'nothing'}")
    return Adapted(found, turned & frozenset(found), fused)


def _expert(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a stack of experts' matrices, no convolution or table of positions."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return "expert" in f"{name} {type(owner).__name__}".lower() and not isinstance(owner, nn.modules.conv._ConvNd)


TABLES = tuple(k for k, v in vars(nn.Module()).items() if isinstance(v, dict))
"""Where torch keeps a module's parameters, buffers, submodules and hooks."""


@contextlib.contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """At the end, also after an exception, the model has the submodules, parameters, buffers, attributes and hooks that it had, in their order, each the same
    object; gradients, flags and modes are what they were. What stands in the tensors is not its business."""
    kept = [(m, type(m), {k: dict(vars(m)[k]) for k in TABLES}, dict(vars(m))) for m in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, kind, tables, attributes in kept:
            if type(module) is not kind:
                module.__class__ = kind
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
            for name, table in tables.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)
        for p, required, grad in flags:
            p.requires_grad_(required)
            p.grad = grad


@contextlib.contextmanager
def lora(
    model: nn.Module, layers: str = "", *, rank: int = 8, alpha: float = 0.0, start: Mapping[str, tuple[Tensor, Tensor]] | None = None, stacks: bool = True
) -> Iterator[Session]:
    """A session whose parameters are new low-rank weights on what `adaptable` finds; alpha 0 means 2 * rank. Of fused experts each has a pair of its own.

    start   layer name -> (B, A) to begin with, of linear layers alone: the base of that layer loses (alpha / r) B A, so that the function is what it was

    On exit the model is bit for bit what it was, and `patch` holds one LowRank edit per layer whose B A is not zero (with a start: rank 2 r, the
    trained product minus the first). Adapters are float32 under half-precision weights. The global RNG draws A.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if rank < 1:
        raise ScopeError(f"rank must be 1 or larger, not {rank}")
    at = adaptable(model, layers, stacks) if start is None else Adapted(tuple(start))
    scale = (alpha or 2.0 * rank) / rank
    named = dict(model.named_parameters())
    weights = {**{n: model.get_submodule(n).weight for n in at.layers}, **{n: named[n] for n in at.stacks}}
    base = [(weights[n], weights[n].detach().clone()) for n in at.layers] if start else []
    base += [(b, b.detach().clone()) for b in model.buffers()]
    session = Session(model, {}, {})
    finished = False
    try:
        with intact(model):
            holder = nn.Module()  # without a config, by which peft renames layers of mixtures
            holder.held = model
            config = LoraConfig(
                r=rank, lora_alpha=scale * rank, lora_dropout=0.0, target_modules=exactly(f"held.{n}" for n in at.layers) if at.layers else None,
                target_parameters=[f"held.{n}" for n in at.stacks] or None,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")
                inject_adapter_in_model(config, holder, NAME)
            for p in named.values():
                p.grad = None
                p.requires_grad_(False)
            found = {n: m for m in model.modules() if isinstance(m, BaseTunerLayer) and NAME in m.lora_A for n in [_place(m, weights)]}  # pyright: ignore
            pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
            for name, weight in weights.items():
                down, up = (getattr(found[name], key)[NAME] for key in ("lora_A", "lora_B"))
                if weight.dtype in (torch.float16, torch.bfloat16):
                    down.float()
                    up.float()
                if start is not None:
                    with torch.no_grad():
                        up.weight.copy_(start[name][0])
                        down.weight.copy_(start[name][1])
                        weight.copy_(weight.to(up.weight) - scale * (up.weight @ down.weight))
                pairs[name] = (up.weight, down.weight)
                session.params |= {f"{name}.lora_A": down.weight, f"{name}.lora_B": up.weight}
            session.masks = dict.fromkeys(session.params)
            for p in session.params.values():
                p.requires_grad_(True)
            yield session
            guard.current().settle(session)
            for name, p in session.params.items():
                if not torch.isfinite(p).all():
                    raise Diverged(f"{name} holds values that are not finite; lower lr or set clip")
            moved = [n for n in weights if _moved(n, *pairs[n], start)]
            session.patch = Patch(tuple(
                stacked(n, found[n]) if n in at.stacks else _edit(n, *pairs[n], scale, start, n in at.turned) for n in moved
            ))  # fmt: skip
        finished = True
    finally:
        if not finished:
            session.patch = Patch(())
        with torch.no_grad():
            for tensor, value in base:
                tensor.copy_(value)


def _place(layer: Any, weights: Mapping[str, Tensor]) -> str:
    """Which of the weights an injected layer adapts."""
    mine = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return next(n for n, w in weights.items() if w is mine)


def stacked(name: str, layer: Any, adapter: str = NAME) -> LowRank:
    """The edit of a stack of matrices by peft's layer over it."""
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    a, b = a.reshape(layer.num_experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    up, down = (b, a) if outward(layer.get_base_layer()) else (a.mT, b.mT)
    return LowRank(name, up.contiguous().clone(), down.contiguous().clone(), float(layer.scaling[adapter]))


def outward(owner: nn.Module) -> bool:
    """Whether experts are stored as (E, O, I), as most are, and not as (E, I, O)."""
    return not getattr(owner, "is_transposed", False)


def factors(edit: LowRank, owner: nn.Module, turned: bool = False) -> tuple[Tensor, Tensor]:
    """peft's (A, B) of an edit: lora_A.weight and lora_B.weight of the layer over `owner`; of a stack of E matrices (E r, I) and (O, r E)."""
    if edit.up.ndim == 3:
        b, a = (edit.up, edit.down) if outward(owner) else (edit.down.mT, edit.up.mT)
        return a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return (edit.up.mT, edit.down.mT) if turned else (edit.down, edit.up)


def _moved(name: str, up: Tensor, down: Tensor, start) -> bool:
    if start is None:
        return bool(up.any()) and bool(down.any())
    return not (torch.equal(up, start[name][0].to(up)) and torch.equal(down, start[name][1].to(down)))


def _edit(name: str, up: Tensor, down: Tensor, scale: float, start, turned: bool = False) -> LowRank:
    b, a = up.detach().clone(), down.detach().clone()
    if start is not None:
        b, a = torch.cat([b, -start[name][0].to(b)], 1), torch.cat([a, start[name][1].to(a)], 0)
    return LowRank(f"{name}.weight", *((a.mT.contiguous(), b.mT.contiguous()) if turned else (b, a)), scale)


@contextlib.contextmanager
def off(model: nn.Module) -> Iterator[nn.Module]:
    """The same weights without their adapters: the reference of a LoRA run, at no memory."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    trainable = [p for m in layers for n, p in m.named_parameters() if ".lora_" in f".{n}"]
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p in trainable:
            p.requires_grad_(True)
