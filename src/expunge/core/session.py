"""The session, `edit(model, scope)`: inside, weights move; outside, nothing happened.

    with edit(model, scope) as e:
        descend(e, loss, batches, lr=0.01)       # or any loop over e.params, or a direct write
    patch = e.patch

Contract (held by tests/test_wall.py for every optimiser):
 1. inside, a place outside the scope is bit-identical after every optimiser step, because the session holds a hook on all of them;
 2. outside, parameters, buffers, requires_grad, .grad and the mode of every submodule are what they were, also after an exception;
 3. buffers that moved are part of the patch: otherwise the audited model is not the trained one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook

from expunge.core import guard
from expunge.core.edits import bits
from expunge.core.errors import Diverged, ScopeError
from expunge.core.patch import Patch, difference
from expunge.core.types import Scope, each

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Session:
    """The weights that may move. `patch` is there once the session has closed; `judged` says whether a guard's validation scores its model."""

    model: nn.Module
    params: dict[str, nn.Parameter]
    masks: dict[str, Tensor | None]
    buffers: str = "move"
    patch: Patch = field(default_factory=lambda: Patch(()))
    judged: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: parameters in scope and all buffers."""
        return {**self.params, **dict(self.model.named_buffers())}

    def train(self) -> None:
        """Train mode under the buffer policy: with `freeze`, normalisation layers use and keep their old statistics."""
        self.model.train()
        if self.buffers == "freeze":
            for module in self.model.modules():
                if isinstance(module, NORMS) and module.running_mean is not None:
                    module.eval()

    def eval(self) -> None:
        """Eval mode: no dropout, running statistics used and kept."""
        self.model.eval()

    def mask_gradients(self) -> None:
        """Set gradients outside the scope to zero, so that clipping and adaptive steps never see them."""
        for name, mask in self.masks.items():
            grad = self.params[name].grad
            if mask is not None and grad is not None:
                grad.masked_fill_(~mask, 0)


def scratch(model: nn.Module) -> Session:
    """A session without walls over a network of one's own (a proxy, a teacher in training): all of it may move, nothing is restored,
    and validation, which is about the model that is edited, does not look at it."""
    params = dict(model.named_parameters())
    return Session(model, params, dict.fromkeys(params), judged=False)


@contextlib.contextmanager
def edit(model: nn.Module, scope: Scope, *, stats=None) -> Iterator[Session]:
    """Open a session on `model`; see the module's docstring for the contract.

    `stats`: batches over which `scope.buffers == "recompute"` recomputes running statistics at the end (required for it).
    Raises ScopeError for a scope without weights or with unknown names, Diverged for weights that are not finite at the end.
    """
    named = dict(model.named_parameters())
    _check(named, scope, stats)
    base = {n: named[n].detach().clone() for n in scope.masks}
    stored = {n: b.detach().clone() for n, b in model.named_buffers()}
    flags = [(p, p.requires_grad, p.grad) for p in named.values()]
    modes = [(m, m.training) for m in model.modules()]
    frozen = {n: (p, p._version) for n, p in named.items() if n not in scope.masks}
    for name, p in named.items():
        p.grad = None
        p.requires_grad_(name in scope.masks)
    session = Session(model, {n: named[n] for n in scope.masks}, dict(scope.masks), scope.buffers)
    rebuild = _wall(session.params, scope, base)

    def after_step(*_) -> None:
        with torch.no_grad():
            for p, keep, fixed in rebuild:
                bits(p).bitwise_and_(keep).bitwise_or_(fixed)
        for name, (p, version) in frozen.items():
            if p._version != version:
                raise ScopeError(f"the optimiser wrote to {name}, which is outside the scope; give it e.params only")

    hook = register_optimizer_step_post_hook(after_step)
    finished = False
    try:
        yield session
        hook.remove()
        if scope.buffers == "recompute":
            recompute(model, stats)
        guard.current().settle(session)
        with torch.no_grad():
            for p, keep, fixed in rebuild:
                bits(p).bitwise_and_(keep).bitwise_or_(fixed)
            session.patch = difference({**base, **stored}, session.tensors())
        for name, tensor in session.tensors().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise Diverged(f"{name} holds values that are not finite; lower lr or set clip")
        finished = True
    finally:
        hook.remove()
        if not finished:
            session.patch = Patch(())
        with torch.no_grad():
            for name, value in base.items():
                named[name].copy_(value)
            for name, buffer in model.named_buffers():
                if name in stored:
                    buffer.copy_(stored[name])
        for p, required, grad in flags:
            p.requires_grad_(required)
            p.grad = grad
        for module, mode in modes:
            module.training = mode


def _check(named: dict, scope: Scope, stats) -> None:
    if unknown := [n for n in scope.masks if n not in named]:
        raise ScopeError(f"scope names {unknown[0]}, which is no parameter of the model")
    for name, mask in scope.masks.items():
        if not named[name].is_floating_point():
            raise ScopeError(f"{name} is {named[name].dtype}: only floating-point weights can be unlearned")
        if mask is not None and mask.shape != named[name].shape:
            raise ScopeError(f"mask of {name} has shape {tuple(mask.shape)}, the weight has {tuple(named[name].shape)}")
    if not any(m is None or bool(m.any()) for m in scope.masks.values()):
        raise ScopeError("no weight in scope: the scope is empty or masks out everything; widen it")
    if scope.buffers == "recompute" and stats is None:
        raise ScopeError("buffers='recompute' needs retain data to recompute statistics on; use 'move' or 'freeze'")


def _wall(params: dict[str, nn.Parameter], scope: Scope, base: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per masked tensor: raw bits to keep (all ones inside the scope) and the frozen bits outside it."""
    out = []
    for name, mask in scope.masks.items():
        if mask is not None:
            keep = -mask.to(params[name].device, bits(base[name]).dtype)
            out.append((params[name], keep, bits(base[name]) & ~keep))
    return out


def recompute(model: nn.Module, batches) -> None:
    """Running statistics of batch norm as the plain average over `batches` ((B, ...) inputs under "x"), weights untouched."""
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    modes, momenta = [(m, m.training) for m in model.modules()], [m.momentum for m in norms]
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    with torch.no_grad():
        for batch in batches:
            parameter = next(model.parameters())
            x = each(lambda t: t.to(parameter.device, parameter.dtype if t.is_floating_point() else t.dtype), batch["x"])  # noqa: B023
            model(**x) if isinstance(x, Mapping) else model(x)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    for module, mode in modes:
        module.training = mode


class Bound(nn.Module):
    """A model with some tensors replaced, as a module that a task can call; parameters() yields the model's own, for device and type."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = [model]
        self.tensors = tensors

    def parameters(self, recurse: bool = True):
        return self.inner[0].parameters(recurse)

    def forward(self, *args: Any, **options: Any) -> Any:
        return functional_call(self.inner[0], self.tensors, args, options)


@contextlib.contextmanager
def remembering(opening: AbstractContextManager[Session], model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Session]:
    """The session that `opening` opens on the model, with these tensors among its buffers from then until it is closed: checkpoints and best states hold
    them, and the patch does not. What a method knows between two steps besides weights; write to them in place."""
    try:
        with opening as e:
            for name, tensor in tensors.items():
                model.register_buffer(name, tensor, persistent=False)
            yield e
    finally:
        for name in tensors:
            model._buffers.pop(name, None)
            model._non_persistent_buffers_set.discard(name)
