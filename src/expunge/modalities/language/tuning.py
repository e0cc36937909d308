"""What all language methods share: the settings of a run, and `tune`, which pairs a forget loss with a retain loss on a scope.

A step takes one batch of forget data and one of retain data: loss = gamma * forget + alpha * retain. Each is its own part of the step, so
that only one forward pass is held at a time; small batches (JOINED) whose losses read nothing but the pass share one, which is faster.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ScopeError, SettingError, SplitError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.session import Session, edit
from expunge.core.types import IGNORE, Batch, Batches, Out, Scope, Split, Task, drawn
from expunge.modalities.language.remember import Top, top_logits
from expunge.modalities.language.task import padded, parted
from expunge.modalities.language.texts import Texts
from expunge.parts.losses.language import pooled, token_kl, top_kl
from expunge.parts.scopes.layers import everything
from expunge.parts.scopes.lora import lora, off
from expunge.parts.updates.descend import descend

RETAIN = ("ce", "kl", "none")


@dataclass(frozen=True)
class Tuning:
    """Settings that language methods share.

    epochs         passes over the forget set
    lr             step size
    batch_size     forget records per step (of each part of a step)
    retain_size    retain records per step; 0 means as many as forget records
    accumulate     parts that a step is put together from; a mean over tokens is that of the whole step
    retain         loss on retain data: ce, kl (to the model as it was), or none
    alpha          weight of the retain loss
    gamma          weight of the forget loss
    lora           rank of the LoRA adapters that are trained; 0 trains the weights themselves
    lora_alpha     LoRA's alpha; 0 means twice the rank
    layers         regular expression for the names of the layers that may move; all when empty
    top            teacher probabilities kept per token for retain=kl without LoRA; 0 keeps all
    optimizer      adamw, adam, sgd or nesterov
    weight_decay   of the optimizer
    schedule       of the step size: constant, linear, cosine or onecycle
    warmup         share of the steps over which lr rises from 0
    clip           largest gradient norm
    settle         share of as many steps again, after the last, in which retain alone is trained by ce: what comes back of itself does so here, and a guard's
                   validation scores these states alone
    checkpointing  recompute activations in the backward pass: less memory, more time
    """

    epochs: float = 5.0
    lr: float = 1e-5
    batch_size: int = 8
    retain_size: int = 0
    accumulate: int = 1
    retain: str = "ce"
    alpha: float = 1.0
    gamma: float = 1.0
    lora: int = 0
    lora_alpha: float = 0.0
    layers: str = ""
    top: int = 256
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.1
    clip: float = 1.0
    settle: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.retain not in RETAIN:
            raise SettingError(f"retain must be one of {', '.join(RETAIN)}, not '{self.retain}'")
        if self.accumulate < 1 or self.epochs <= 0:
            raise SettingError(f"accumulate must be 1 or larger and epochs above 0; found {self.accumulate} and {self.epochs:g}")


@dataclass(frozen=True)
class Scored:
    """A loss (out, batch) -> one number that needs one forward pass of its batch and nothing else of the model."""

    of: Callable[[Out, Batch], Tensor]


Loss = Callable[[Batch], Tensor] | Scored
"""A batch -> one number."""

JOINED = 1024
"""Tokens, padding included, up to which the parts of a step share a forward pass: it fills the processor, and holds little."""

HELD = 1 << 29
"""Most bytes of float32 logits of one part of a step of retain data: a larger batch is run slice by slice, to the same gradient."""


class Steps(Sequence):
    """Steps of `tune`: [k] is a list of parts {kind: batch} with their share of the step, each batch with `tokens`, the target tokens per part of its kind in
    the step. Batches of the kinds in `joint` stand in one part when they are small; those of retain of more than `most` tokens, padding included, in slices."""

    def __init__(self, streams: Mapping[str, Sequence], accumulate: int, joint: Sequence[str] = (), most: int = 0) -> None:
        self.streams, self.accumulate, self.joint, self.most = streams, accumulate, joint, most
        self.longest = max(len(s) for s in streams.values())
        self.steps = -(-self.longest // accumulate)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k):
        if not 0 <= k < self.steps:
            raise IndexError(k)
        parts = []
        for kind, stream in self.streams.items():
            found = [stream[j % len(stream)] for j in range(k * self.accumulate, min((k + 1) * self.accumulate, self.longest))]
            tokens = sum(int((b["y"] != IGNORE).sum()) for b in found) / len(found)
            whole = [({**b, "tokens": tokens}, 1 / len(found)) for b in found]
            parts += [({kind: b}, share) for part, n in whole for b, share in (sliced(part, n, self.most) if kind == "retain" and self.most else [(part, n)])]
        both = [p for p in parts if next(iter(p[0])) in self.joint]
        if not both or sum(len(b["x"]) for p, _ in both for b in p.values()) * max(b["x"].shape[1] for p, _ in both for b in p.values()) > JOINED:
            return parts
        rest = [p for p in parts if next(iter(p[0])) not in self.joint]
        n = len(both) // len(self.joint)
        return [({kind: batch for p, _ in both[j::n] for kind, batch in p.items()}, 1 / n) for j in range(n)] + rest


def sliced(batch: Batch, share: float, most: int) -> list[tuple[Batch, float]]:
    """The batch in slices of at most `most` tokens, padding included, one text at least, each with its share of the step: for a loss that is a mean over texts,
    and for one over the step's tokens, the shares add up to what the whole batch gives."""
    n, width = batch["x"].shape
    size = max(1, most // width)
    if size >= n:
        return [(batch, share)]
    keys, cuts = ("x", "y", "n", "i"), range(0, n, size)
    weights = [min(size, n - k) / n for k in cuts]
    return [
        ({**batch, **{key: batch[key][k : k + size] for key in keys}, "tokens": batch["tokens"] * w}, share * w) for k, w in zip(cuts, weights, strict=True)
    ]


class Settled(Sequence):
    """Steps, and then as many more of `tail`, each one part {"settle": batch} or slices of it."""

    def __init__(self, steps: Steps, tail: Sequence) -> None:
        self.steps, self.tail = steps, tail

    def __len__(self) -> int:
        return len(self.steps) + len(self.tail)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(k)
        if k < len(self.steps):
            return self.steps[k]
        batch = self.tail[k - len(self.steps)]
        whole = {**batch, "tokens": float((batch["y"] != IGNORE).sum())}
        return [({"settle": b}, share) for b, share in sliced(whole, 1.0, self.steps.most or len(batch["x"]) * batch["x"].shape[1])]


def settling(split: Split, tuning: Tuning, steps: int) -> int:
    """Steps on retain alone after so many; none without retain data."""
    return round(tuning.settle * steps) if split.retain is not None else 0


@contextlib.contextmanager
def opened(model: nn.Module, tuning: Tuning, scope: Scope | None = None, stacks: bool = True) -> Iterator[Session]:
    """The session that the settings ask for: LoRA of their rank (fused experts too, with `stacks`), the layers they name, a `scope` of the method's own, or all
    weights. Dropout is off."""
    if tuning.lora and scope is None:
        session = lora(model, tuning.layers, rank=tuning.lora, alpha=tuning.lora_alpha, stacks=stacks)
    else:
        session = edit(model, scope or named(model, tuning.layers))
    with session as e:
        e.eval()
        with recomputing(model, tuning.checkpointing):
            yield e


def named(model: nn.Module, layers: str) -> Scope:
    """All parameters whose name holds a match of the regular expression; everything for "". Raises ScopeError when none fits."""
    if not layers:
        return everything(model)
    try:
        names = [n for n, p in model.named_parameters() if re.search(layers, n) and p.is_floating_point()]
    except re.error as error:
        raise ScopeError(f"layers '{layers}' is no regular expression: {error}") from None
    if not names:
        raise ScopeError(f"no weight fits layers '{layers}'; the model has {', '.join(n for n, _ in list(model.named_parameters())[:12])} ...")
    return Scope(dict.fromkeys(names))


@contextlib.contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside, in the form that needs no gradient at the inputs, or as the model came. Blocks that have it on are in train mode,
    which it asks for, and their parts are not, so that dropout stays off."""
    if not wanted:
        for module in model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise SettingError(f"{type(model).__name__} has no gradient checkpointing")
    before = [(m, m.gradient_checkpointing, m.training) for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    functions = {m: vars(m).get("_gradient_checkpointing_func") for m, _, _ in before}
    hooked = bool(vars(model).get("_require_grads_hooks"))
    enable({"use_reentrant": False})
    if not hooked:
        model.disable_input_require_grads()  # pyright: ignore
    for module, _, _ in before:
        module.training = True
    try:
        yield
    finally:
        for module, was, mode in before:
            module.gradient_checkpointing, module.training = was, mode
            if functions[module] is None:
                vars(module).pop("_gradient_checkpointing_func", None)
            else:
                module._gradient_checkpointing_func = functions[module]


def retain_batches(task: Task, split: Split, tuning: Tuning, seed: int, steps: int = 0) -> Batches:
    """The retain batches that `tune` draws with these settings: without replacement, as many as forget has, or `steps`."""
    steps = steps or len(task.batches(split.forget, tuning.batch_size, epochs=tuning.epochs, seed=seed))
    size = tuning.retain_size or tuning.batch_size
    return task.batches(split.retain, size, epochs=steps / -(-len(split.retain) // size), seed=seed + 1)


def each_retained(model: nn.Module, task: Task, data: Texts, tuning: Tuning, batches: Batches) -> Callable[[Batch], tuple[Out, Tensor]]:
    """The forward pass of a batch of retain data and the loss per target token of each text (B,): CE, or KL(model as it was || model)."""
    if tuning.retain == "ce":
        return lambda batch: ((out := task.forward(model, batch)), out.mean)
    if tuning.lora:

        def view(batch: Batch) -> tuple[Out, Tensor]:
            with off(model), quiet(model):
                teacher = task.forward(model, batch).logits.log_softmax(-1)
            out = task.forward(model, batch)
            return out, token_kl(out, teacher)

        return view
    teacher: Top = top_logits(model, task, data, tuning.top, batches.positions())

    def cached(batch: Batch) -> tuple[Out, Tensor]:
        out = task.forward(model, batch)
        return out, top_kl(out, *teacher.at(batch, out))

    return cached


def retained(model: nn.Module, task: Task, split: Split, tuning: Tuning, keeps: Batches) -> Callable[[Batch], Tensor]:
    """The retain loss: the mean over the step's target tokens of what `each_retained` gives."""
    each = each_retained(model, task, split.retain, tuning, keeps)

    def pooling(batch: Batch) -> Tensor:
        out, value = each(batch)
        return pooled(value * out.count, out, batch)

    return pooling


def passes(model: nn.Module, task: Task, batches: Mapping[str, Batch]) -> dict[str, Out]:
    """The forward pass of each batch; several go through the model as one."""
    if len(batches) < 2:
        return {kind: task.forward(model, b) for kind, b in batches.items()}
    width = max(b["x"].shape[1] for b in batches.values())
    wide = [padded(b, width - b["x"].shape[1]) for b in batches.values()]
    out = task.forward(model, {key: torch.cat([b[key] for b in wide]) for key in ("x", "y", "n", "i")})
    return dict(zip(batches, parted(out, [len(b["x"]) for b in wide]), strict=True))


def tune(
    model: nn.Module, task: Task, split: Split, forget: Loss | None, tuning: Tuning, *, seed: int, data: Texts | None = None, scope: Scope | None = None,
    keep: Loss | None = None, more: Mapping[str, tuple[Sequence, Callable[[Batch], Tensor]]] | None = None,
    after: Callable[[int], None] | None = None, until: Callable[[Session, int], bool] | None = None, session: Any = None,
) -> Patch:  # fmt: skip
    """Descend on gamma * forget(batch) + alpha * retain over paired batches, and return the patch.

    forget    loss of a batch of `data` (the forget set when None), `Scored` where it can be; None trains on the rest alone
    scope     where weights may move, in place of the settings' own
    keep      a retain loss in place of the settings' own
    more      further parts of each step: name -> (batches, loss of one)
    after     called after each step; `until` ends the run when it says True
    session   an open session's context manager, in place of the one the settings ask for
    Raises SplitError when retain data is asked for and missing.
    """
    data = split.forget if data is None else data
    wants = tuning.retain != "none" and tuning.alpha != 0
    if wants and split.retain is None:
        raise SplitError(f"retain={tuning.retain} needs retain data; give some, or set retain=none (on the command line --METHOD.retain none)")
    streams: dict[str, Any] = {}
    losses: dict[str, Loss] = {}
    weights = {"forget": tuning.gamma, "retain": tuning.alpha}
    forgets = task.batches(data, tuning.batch_size, epochs=tuning.epochs, seed=seed)
    if forget is not None:
        streams["forget"], losses["forget"] = forgets, forget
    if wants:
        keeps = streams["retain"] = retain_batches(task, split, tuning, seed, len(forgets))
        plain = Scored(lambda out, batch: pooled(out.nll, out, batch))
        losses["retain"] = keep or (plain if tuning.retain == "ce" else retained(model, task, split, tuning, keeps))
    for name, (batches, loss) in (more or {}).items():
        streams[name], losses[name] = batches, loss
    scored = [kind for kind, loss in losses.items() if isinstance(loss, Scored)]

    def of(part: tuple[dict[str, Batch], float]) -> Tensor:
        batches, share = part
        outs = passes(model, task, {kind: b for kind, b in batches.items() if kind in scored})
        values = {kind: loss.of(outs[kind], b) if isinstance(loss := losses[kind], Scored) else loss(b) for kind, b in batches.items()}
        return share * torch.stack([weights.get(kind, 1.0) * value for kind, value in values.items()]).sum()

    vocabulary = int(getattr(model.config, "vocab_size", 0) or 1)  # pyright: ignore
    steps = Steps(streams, tuning.accumulate, scored if len(scored) > 1 else (), max(JOINED, HELD // (4 * vocabulary)))
    extra = settling(split, tuning, len(steps))
    if extra:
        size = tuning.retain_size or tuning.batch_size
        tail = task.batches(split.retain, size, epochs=extra / -(-len(split.retain) // size), seed=seed + 2)
        losses["settle"] = lambda batch: pooled((out := task.forward(model, batch)).nll, out, batch)
        steps = Settled(steps, tail)
    with session or opened(model, tuning, scope) as e:
        waits, own = bool(extra) and e.judged, after
        e.judged = e.judged and not waits

        def judged(step: int) -> None:
            e.judged = e.judged or (waits and step + 1 > len(steps) - extra)
            if own:
                own(step)

        descend(
            e, of, steps, lr=tuning.lr, optimizer=tuning.optimizer, weight_decay=tuning.weight_decay, clip=tuning.clip,
            schedule=tuning.schedule, warmup=tuning.warmup, after=judged if waits else after, until=until and (lambda step: until(e, step)),
        )  # fmt: skip
    return e.patch


def cost(*, forward: float = 1.0, backward: float = 1.0, once: float = 0.0, reference: bool = True) -> Callable:
    """What a method built on `tune` declares: (sizes, settings) -> (examples forward, examples backward).

    forward, backward    passes per forget record drawn;    once    passes over the whole forget set before the loop
    reference            the retain loss is the settings' own, so that retain=kl costs one more forward pass of what it needs
    """

    def of(n: Mapping[str, int], s: Mapping[str, Any]) -> tuple[float, float]:
        steps = max(1, round(-(-n["forget"] // s["batch_size"]) * s["epochs"]))
        f = drawn(n["forget"], s["batch_size"], steps)
        r = drawn(n["retain"], s["retain_size"] or s["batch_size"], steps) if "retain" in n and s["retain"] != "none" and s["alpha"] else 0
        teacher = 0.0 if s["retain"] != "kl" or not reference else r if s["lora"] else min(r, n["retain"])
        extra = round(s["settle"] * -(-steps // s["accumulate"])) if "retain" in n else 0
        tail = drawn(n["retain"], s["retain_size"] or s["batch_size"], extra) if extra else 0
        return forward * f + r + teacher + once * n["forget"] + tail, backward * f + r + tail

    return of


@contextlib.contextmanager
def aside(model: nn.Module, tuning: Tuning, here: dict[str, Session] | None = None) -> Iterator[Session]:
    """The LoRA session of the settings, put into `here`, for an adapter that never answers as it stands: a guard's validation does not score it. A guard cannot
    switch fused experts row by row: they are left as they are."""
    with opened(model, tuning, stacks=False) as e:
        e.judged = False
        if here is not None:
            here["session"] = e
        yield e
