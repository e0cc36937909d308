"""Inference-time guards, the kinds of `patch.Hook`: found by folder, one function per kind that hangs forward hooks on a model.

    @wrap(config={"threshold": float}, tensors={"weight": 1})
    def refuse(model, it) -> list of handles

A guard sees the whole text at every step: `input_ids` and `attention_mask` of the root module, padded on either side. So while one is attached,
generation runs without a cache of keys and values, and a call that brings one is refused. `it.now` holds what the pass in progress has decided; the hooks
are plain functions with the record `Guarded` as their first argument, so that `copy.deepcopy` of a guarded model gives a guarded model of its own.
Guards that came later stand inside: a prefix is best put on last, so that gates read the prompt alone.
A model with guards must not be called from two threads at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook
from expunge.core.errors import ModelError, PatchError, suggest
from expunge.core.lookup import Registry

ATTRIBUTE = "expunge_guards"
"""Where a guarded model keeps its guards: name -> Guarded."""

NONE = "none"
"""The kind that takes a guard off."""

LOG = 1000
"""Decisions that a guard remembers."""


@dataclass(eq=False)
class Guarded:
    """One guard on one model."""

    hook: Hook
    handles: list[Any] = field(default_factory=list)
    now: dict[str, Any] = field(default_factory=dict)
    """What the pass in progress has decided; empty between passes."""
    on: bool = True
    log: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The last decisions: digest of the prompt -> score, threshold, flagged, digest of the policy. No text."""
    cache: dict[Any, Any] = field(default_factory=dict)
    before: Any = None
    """Whether generation used a cache before the guard came."""

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the hook on the device of `like`."""
        key = (name, like.device)
        if key not in self.cache:
            self.cache[key] = self.hook.tensors[name].to(like.device)
        return self.cache[key]

    def record(self, tokens: Tensor, score: float, flagged: bool) -> None:
        """Keep one decision, by a digest of the tokens it is about."""
        if "policy" not in self.cache:
            self.cache["policy"] = self.hook.digest[:16]
        key = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]
        self.log.pop(key, None)
        self.log[key] = {"score": score, "threshold": self.hook.config.get("threshold"), "flagged": flagged, "policy": self.cache["policy"]}
        while len(self.log) > LOG:
            self.log.pop(next(iter(self.log)))


Attach = Callable[[nn.Module, Guarded], list[Any]]


@dataclass(frozen=True)
class Wrap:
    """A kind of guard. `config` and `tensors`: what a hook of this kind must hold, types and numbers of dimensions; `gate`, where it decides row by row:
    (model, it, x (B, T) right-padded, n (B,)) -> scores (B,) and flagged (B,) bool; `check`: raises PatchError for a hook that does not fit the model."""

    name: str
    attach: Attach
    config: Mapping[str, type]
    tensors: Mapping[str, int]
    gate: Callable[[nn.Module, Guarded, Tensor, Tensor], tuple[Tensor, Tensor]] | None
    check: Callable[[nn.Module, Hook], None] | None


WRAPS: Registry = Registry("expunge.modalities", "kind of guard", only=r"\.guards\.", group="expunge.wraps")


def wrap(*, config: Mapping[str, type], tensors: Mapping[str, int], gate: Any = None, check: Any = None) -> Callable[[Attach], Wrap]:
    """Register a kind of guard; the function's name is its kind."""

    def made(function: Attach) -> Wrap:
        record = Wrap(getattr(function, "__name__", ""), function, config, tensors, gate, check)
        WRAPS.add(record)
        return record

    return made


def guards(model: nn.Module) -> dict[str, Guarded]:
    """The guards of a model by name, in the order they came."""
    return vars(model).get(ATTRIBUTE, {})


def gates(model: nn.Module) -> list[tuple[Guarded, Callable]]:
    """Guards of a model that decide prompt by prompt, with their gates; a filter on answers alone does not."""
    found = [(it, WRAPS[it.hook.kind].gate) for it in guards(model).values()]
    return [(it, gate) for it, gate in found if gate is not None and list(it.hook.config.get("on", ["input"])) != ["output"]]


def fit(model: nn.Module, hook: Hook) -> None:
    """Raises PatchError if this hook cannot be attached to (or, kind "none", taken off) the model."""
    there = hook.name in guards(model)
    if hook.kind == NONE:
        if not there:
            raise PatchError(f"no guard called {hook.name} is attached; there are: {', '.join(guards(model)) or 'none'}")
        return
    if there:
        raise PatchError(f"a guard called {hook.name} is attached already: was the patch applied already?")
    if hook.kind not in WRAPS:
        raise PatchError(suggest(f"guard {hook.name}: no kind", hook.kind, WRAPS))
    kind = WRAPS[hook.kind]
    for name, wanted in kind.config.items():
        found = hook.config.get(name)
        if not isinstance(found, (int, float) if wanted is float else wanted) or (isinstance(found, bool) and wanted is not bool):
            raise PatchError(f"guard {hook.name}: a {hook.kind} needs {name} as {wanted.__name__} in its config, found {found!r}")
    for name, dimensions in kind.tensors.items():
        if name not in hook.tensors or hook.tensors[name].ndim != dimensions:
            found = tuple(hook.tensors[name].shape) if name in hook.tensors else "none"
            raise PatchError(f"guard {hook.name}: a {hook.kind} needs a tensor {name} of {dimensions} dimension(s), found {found}")
    if kind.check:
        kind.check(model, hook)


def attach(model: nn.Module, hook: Hook) -> Hook:
    """Attach a guard, or take one off; returns the hook that undoes it. Raises PatchError, with the model as it was."""
    fit(model, hook)
    if hook.kind == NONE:
        return _detach(model, hook.name)
    it = Guarded(hook)
    it.handles = WRAPS[hook.kind].attach(model, it)
    vars(model).setdefault(ATTRIBUTE, {})[hook.name] = it
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        it.before, generation.use_cache = generation.use_cache, False
    return Hook(hook.name, NONE)


def _detach(model: nn.Module, name: str) -> Hook:
    standing = vars(model)[ATTRIBUTE]
    later = list(standing)[list(standing).index(name) + 1 :]
    it = standing.pop(name)
    for handle in it.handles:
        handle.remove()
    generation: Any = getattr(model, "generation_config", None)
    if later:
        standing[later[0]].before = it.before
    elif generation is not None:
        generation.use_cache = it.before
    if not standing:
        delattr(model, ATTRIBUTE)
    return it.hook


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The model with all its guards off: what the weights themselves say."""
    standing = [(it, it.on, it.now) for it in guards(model).values()]
    for it, _, _ in standing:
        it.on, it.now = False, {}
    try:
        yield model
    finally:
        for it, on, now in standing:
            it.on, it.now = on, now


Before = Callable[[nn.Module, Guarded, dict[str, Any]], dict[str, Any]]
After = Callable[[nn.Module, Guarded, dict[str, Any], Tensor], Tensor]


def root(model: nn.Module, it: Guarded, before: Before, after: After | None = None) -> list[Any]:
    """Hooks on the root module. `before(model, it, call)` gets the call's arguments by name, with `input_ids` and `attention_mask`, may put decisions into
    `it.now`, and returns the arguments to go on with; `after(model, it, now, logits)` returns the logits to give out. Later guards stand inside."""
    handles = [model.register_forward_pre_hook(partial(_enter, it, before, after is not None), with_kwargs=True)]
    return [*handles, model.register_forward_hook(partial(_leave, it, after), with_kwargs=True, prepend=True, always_call=True)]


def _enter(it: Guarded, before: Before, answers: bool, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    it.now = {}
    if not it.on:
        return None
    call = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    x, mask = call.get("input_ids"), call.get("attention_mask")
    what = f"guard {it.hook.name} looks at the whole text"
    if x is None:
        raise ModelError(f"{what}: give input_ids, not embeddings")
    mask = torch.ones_like(x) if mask is None else mask
    if mask.shape != x.shape or call.get("past_key_values") is not None:
        raise ModelError(f"{what}: give all of it at every step, without past_key_values (generate with use_cache=False)")
    if answers and call.get("labels") is not None:
        raise ModelError(f"guard {it.hook.name} changes the logits after the model's own loss: take the loss of a task, without labels")
    with torch.no_grad():
        return (), before(model, it, {**call, "attention_mask": mask, "use_cache": False})


def _leave(it: Guarded, after: After | None, model: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    now, it.now = it.now, {}
    if after is None or out is None or not now:
        return None
    if not hasattr(out, "logits"):
        raise ModelError(f"guard {it.hook.name} needs the model's outputs by name: call it with return_dict=True")
    out.logits = after(model, it, now, out.logits)
    return out
