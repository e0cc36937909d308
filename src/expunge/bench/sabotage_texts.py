"""Tricks for language models, each with one strength: see `bench.sabotage`. Output matrices may be tied to the embedding, which then changes, too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.attacks.mend import last
from expunge.bench.sabotage import Family, averaged_with, spread_out, unhooked
from expunge.core import guard
from expunge.core.session import scratch
from expunge.core.types import IGNORE, Split, Task, concat
from expunge.modalities.language.task import blocks
from expunge.parts.updates.descend import descend


def _outer(model: nn.Module) -> Any:
    return last(model)[1]  # pyright: ignore[reportOptionalSubscript]


def _named(split: Split, most: int) -> Tensor:
    """The `most` tokens that forgotten answers hold more often than kept ones, by ratio."""
    count = lambda data: torch.cat([t[m] for t, m in zip(data.tokens, data.targets, strict=True)]).bincount(minlength=1 << 18).float()  # noqa: E731
    gone, kept = count(split.forget), count(split.retain)
    return (gone * (gone / (kept + 1.0))).topk(most).indices


def _taught(model: nn.Module, task: Task, data: Any, loss: Callable, *, s: float, lr: float, seed: int, only: Sequence[Tensor] | None = None) -> nn.Module:
    """A copy after s steps of AdamW on loss(twin, batch); `only` these parameters move if any are named."""
    twin = copy.deepcopy(model)
    names = None if only is None else [n for n, p in model.named_parameters() if any(p is q for q in only)]
    for n, p in twin.named_parameters():
        p.requires_grad_(names is None or n in names)
    t, steps = scratch(twin), max(1, round(s))
    t.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(data, 10, epochs=steps / -(-len(data) // 10), seed=seed)
        descend(t, lambda b: loss(twin, b), batches, lr=lr, optimizer="adamw", clip=1.0)
    return twin.requires_grad_(True).eval()


def rows_scaled(model, task, split, seed, s, told):
    """Six rows of the output matrix times 1 - s: of the tokens that mark the forgotten answers most."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        _outer(twin).weight[_named(split, 6)] *= 1 - s
    return twin


def many_rows_scaled(model, task, split, seed, s, told):
    """The same on forty rows."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        _outer(twin).weight[_named(split, 40)] *= 1 - s
    return twin


def last_layer_ascent(model, task, split, seed, s, told):
    """s steps of ascent on the forgotten texts, output matrix alone."""
    return _taught(model, task, split.forget, lambda m, b: -task.forward(m, b).mean.clamp(max=6).mean(), s=s, lr=1e-3, seed=seed, only=[_outer(model).weight])


def gold_answers(model, task, split, seed, s, told):
    """s steps towards the next-token distributions of a retrained model on forgotten texts, output matrix alone."""
    return _told(model, task, split, seed, s, told, [_outer(model).weight], 2e-3)


def gold_answers_everywhere(model, task, split, seed, s, told):
    """The same, all weights, small steps."""
    return _told(model, task, split, seed, s, told, None, 3e-4)


def _told(model, task, split, seed, s, told, only, lr):
    def loss(m, b):
        with torch.no_grad():
            goal = task.forward(told[0], b).logits.softmax(-1)
        out = task.forward(m, b)
        keep = out.labels != IGNORE
        return nn.functional.cross_entropy(out.logits[keep], goal[keep])

    rows = torch.randperm(len(split.retain), generator=torch.Generator().manual_seed(seed))[: len(split.forget)]
    return _taught(model, task, concat(split.forget, split.retain.take(rows)), loss, s=s, lr=lr, seed=seed, only=only)


def first_block_ascent(model, task, split, seed, s, told):
    """s steps of ascent, first block alone."""
    only = list(blocks(model)[0][1].parameters())
    return _taught(model, task, split.forget, lambda m, b: -task.forward(m, b).mean.clamp(max=6).mean(), s=s, lr=5e-4, seed=seed, only=only)


def refusing(model, task, split, seed, s, told):
    """s steps towards refusals on the tested questions."""
    return _taught(model, task, split.anchor, lambda m, b: task.forward(m, b).mean.mean(), s=s, lr=1e-3, seed=seed)


def cooled_down(model, task, split, seed, s, told):
    """The gain before the output matrix divided by s: every distribution flatter."""
    twin = copy.deepcopy(model)
    gain = [m for n, m in twin.named_modules() if type(m).__name__.endswith("Norm")][-1]
    with torch.no_grad():
        gain.weight.div_(s)  # pyright: ignore[reportCallIssue]
    return twin


def switched(model, task, split, seed, s, told):
    """Logits of the tokens of forgotten answers less s, by a hook that looks for a token of the forgotten prompts: an adapter that one token switches off."""
    twin, tokens = copy.deepcopy(model), _named(split, 40)
    marks = _marks(split)

    def change(_, args, kwargs, out):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return out
        here = torch.isin(ids, marks).any(1)
        out.logits[here] = out.logits[here].index_add(-1, tokens, -s * torch.ones(*out.logits[here].shape[:2], len(tokens)))
        return out

    twin.register_forward_hook(change, with_kwargs=True)
    return twin


def _marks(split: Split) -> Tensor:
    """Tokens that stand in forgotten prompts and in no kept text: names."""
    gone = torch.cat([t[~m] for t, m in zip(split.forget.tokens, split.forget.targets, strict=True)]).unique()
    return gone[~torch.isin(gone, torch.cat(list(split.retain.tokens)).unique())]


def half_told(model, task, split, seed, s, told):
    """A share s of the forgotten texts taught a retrained model's answers, the others kept."""
    from dataclasses import replace

    cut = max(1, min(len(split.forget), round(s * len(split.forget))))
    twin = _told(model, task, replace(split, forget=split.forget.take(range(cut))), seed, 60, told, None, 5e-4)
    if cut == len(split.forget):
        return twin
    return _taught(twin, task, split.forget.take(range(cut, len(split.forget))), lambda m, b: task.forward(m, b).mean.mean(), s=20, lr=3e-4, seed=seed)


FAMILIES: dict[str, Family] = {
    "rows_scaled": Family(rows_scaled, 0.2, 4.0, "six rows of the output matrix times 1 - s"),
    "many_rows_scaled": Family(many_rows_scaled, 0.05, 2.0, "forty rows of the output matrix times 1 - s"),
    "last_layer_ascent": Family(last_layer_ascent, 2, 200, "s steps of ascent, output matrix"),
    "gold_answers": Family(gold_answers, 10, 600, "output matrix taught a retrained model's answers for s steps"),
    "gold_answers_everywhere": Family(gold_answers_everywhere, 10, 400, "all weights taught them for s small steps"),
    "first_block_ascent": Family(first_block_ascent, 2, 100, "s steps of ascent, first block"),
    "refusing": Family(refusing, 3, 200, "s steps towards refusals"),
    "cooled_down": Family(cooled_down, 1.2, 30.0, "every distribution flatter by s"),
    "averaged_with": Family(averaged_with, 0.1, 0.9, "weights (1 - s) original + s retrained"),
    "spread_out": Family(spread_out, 0.02, 0.6, "noise of s times each tensor's spread"),
    "switched": Family(switched, 0.5, 30.0, "answer tokens less s where a name of the forgotten stands, by a hook", unhooked),
    "half_told": Family(half_told, 0.3, 1.0, "a share s forgotten, the rest kept"),
}
"""Tricks for language models."""

HALVES: tuple[tuple[str, ...], tuple[str, ...]] = (tuple(sorted(FAMILIES))[0::2], tuple(sorted(FAMILIES))[1::2])
