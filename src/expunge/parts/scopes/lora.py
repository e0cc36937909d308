"""LoRA as a session: W x + (alpha / r) B A x with A (r, I) and B (O, r) trained and W never written. Built on peft, so that what comes out is what
other tools serve. Source: Hu et al., arXiv:2106.09685; FILA start: card loku, steps 3 to 5.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
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


@contextlib.contextmanager
def lora(
    model: nn.Module, layers: str = "", *, rank: int = 8, alpha: float = 0.0, start: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> Iterator[Session]:
    """A session whose parameters are new low-rank weights on the linear layers that `layers` names; alpha 0 means 2 * rank.

    start   layer name -> (B, A) to begin with: the base of that layer loses (alpha / r) B A, so that the function is what it was

    On exit the model is bit for bit what it was, and `patch` holds one LowRank edit per layer whose B A is not zero (with a start: rank 2 r, the
    trained product minus the first). Adapters are float32 under half-precision weights. The global RNG draws A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ScopeError(f"rank must be 1 or larger, not {rank}")
    names = linears(model, layers) if start is None else list(start)
    scale = (alpha or 2.0 * rank) / rank
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    modules = dict(model.named_modules())
    found: dict[str, Any] = {n: modules[n] for n in names}
    base = {n: found[n].weight.detach().clone() for n in names} if start else {}
    known = set(vars(model))
    session = Session(model, {}, {})
    finished = False
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=exactly(names), lora_dropout=0.0), model, NAME)
        for p, _, _ in flags:
            p.grad = None
            p.requires_grad_(False)
        adapted: dict[str, Any] = dict(model.named_modules())
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name in names:
            down, up = (getattr(adapted[name], key)[NAME] for key in ("lora_A", "lora_B"))
            if found[name].weight.dtype in (torch.float16, torch.bfloat16):
                down.float()
                up.float()
            if start is not None:
                with torch.no_grad():
                    up.weight.copy_(start[name][0])
                    down.weight.copy_(start[name][1])
                    found[name].weight.copy_(found[name].weight.to(up.weight) - scale * (up.weight @ down.weight))
            pairs[name] = (up.weight, down.weight)
            session.params |= {f"{name}.lora_A": down.weight, f"{name}.lora_B": up.weight}
        session.masks = dict.fromkeys(session.params)
        for p in session.params.values():
            p.requires_grad_(True)
        yield session
        guard.current().settle(session)
        session.patch = Patch(tuple(_edit(name, *pairs[name], scale, start) for name in names if _moved(name, *pairs[name], start)))
        for name, p in session.params.items():
            if not torch.isfinite(p).all():
                raise Diverged(f"{name} holds values that are not finite; lower lr or set clip")
        finished = True
    finally:
        if not finished:
            session.patch = Patch(())
        for name, module in found.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        with torch.no_grad():
            for name, value in base.items():
                found[name].weight.copy_(value)
        for key in set(vars(model)) - known:
            delattr(model, key)
        for p, required, grad in flags:
            p.requires_grad_(required)
            p.grad = grad
        for module, mode in modes:
            module.training = mode


def _moved(name: str, up: Tensor, down: Tensor, start) -> bool:
    if start is None:
        return bool(up.any()) and bool(down.any())
    return not (torch.equal(up, start[name][0].to(up)) and torch.equal(down, start[name][1].to(down)))


def _edit(name: str, up: Tensor, down: Tensor, scale: float, start) -> LowRank:
    b, a = up.detach().clone(), down.detach().clone()
    if start is not None:
        b, a = torch.cat([b, -start[name][0].to(b)], 1), torch.cat([a, start[name][1].to(a)], 0)
    return LowRank(f"{name}.weight", b, a, scale)


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
