"""Causal language models: nll is the sum over target tokens of -log p(token | what stands before it).

The shift between logits and labels happens here and nowhere else. Sequences are padded on the right, so that in a causal model no token
that counts can see padding; the attention mask is made from lengths, never from `ids != pad`, which would hide real end-of-turn tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ModelError, SplitError
from expunge.core.guard import quiet
from expunge.core.machine.devices import reseeded
from expunge.core.types import IGNORE, Batch, Out, Task, device_of
from expunge.modalities.language.texts import Texts


def causal_lm(tokenizer: Any = None) -> Task:
    """The task of any causal model of transformers, on Texts. `tokenizer` is needed for `sample` alone, and then that of the data's format will do.

    Batch: x (B, T) tokens, padded on the right; y (B, T) labels, IGNORE where a token is no target; n (B,) lengths; i (B,) positions.
    Out: logits (B, T', V) in float32 and labels (B, T') aligned, T' from the first target of the batch on; units (B, T') losses.
    """
    return Task("causal_lm", collate, _forward, features, partial(sample, tokenizer=tokenizer))


def collate(data: Texts, index: Tensor, generator: torch.Generator | None) -> Batch:
    """Rows of Texts as a batch, as wide as its longest row."""
    if not isinstance(data, Texts):
        raise SplitError(f"a language task works on Texts, not on {type(data).__name__}")
    rows = index.tolist()
    lengths = torch.tensor([len(data.tokens[k]) for k in rows])
    x = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    y = torch.full_like(x, IGNORE)
    for r, k in enumerate(rows):
        tokens, targets = data.tokens[k], data.targets[k]
        x[r, : len(tokens)] = tokens
        y[r, : len(tokens)][targets] = tokens[targets]
    y[:, 0] = IGNORE
    return {"x": x, "y": y, "n": lengths, "i": index}


def inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What a model of transformers takes: token ids and the attention mask of the lengths, on its device."""
    device = device_of(model)
    x = batch["x"].to(device)
    return {"input_ids": x, "attention_mask": (torch.arange(x.shape[1], device=device) < batch["n"].to(device)[:, None]).long()}


def _forward(model: nn.Module, batch: Batch) -> Out:
    """Logits from the position before the first target of the batch on; the head is spared the prompts."""
    x = inputs(model, batch)
    y = batch["y"].to(x["input_ids"].device)
    first = max(1, int((y != IGNORE).any(0).float().argmax()))
    keep = y.shape[1] - first + 1
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(**x, use_cache=False, **options).logits
    return aligned(logits[:, -keep:-1], y[:, first:])


def aligned(logits: Tensor, labels: Tensor) -> Out:
    """Out of logits (B, T, V) and the labels (B, T) that they predict; half-precision logits are scored in float32."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    units = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE).view(labels.shape)
    count = (labels != IGNORE).sum(1)
    if bool((count == 0).any()):
        raise SplitError("a record has no target token")
    return Out(nll=units.sum(1), count=count.to(units.dtype), logits=wide, labels=labels, units=units)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the decoder blocks in order: the longest list of modules in the model. Raises ModelError if there is none."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError("the model has no list of decoder blocks")
    name, found = max(lists, key=lambda pair: (len(pair[1]), -pair[0].count(".")))
    return [(f"{name}.{k}", block) for k, block in enumerate(found)]


def hidden(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, T, D) output of the named module (the last decoder block when ""); the forward pass ends there: later blocks are not computed."""
    module = dict(model.named_modules()).get(layer or blocks(model)[-1][0])
    if module is None:
        raise ModelError(f"the model has no module '{layer}'; its blocks are {blocks(model)[0][0]} to {blocks(model)[-1][0]}")
    caught: list[Tensor] = []

    def catch(_, args, out):
        caught.append(out[0] if isinstance(out, tuple) else out)
        raise _Reached

    handle = module.register_forward_hook(catch)
    try:
        model(**inputs(model, batch), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


class _Reached(Exception):
    """The layer that was asked for has been computed."""


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, D) state of the last token before the first target (the end of the question) at the named module, the last block when ""."""
    states = hidden(model, batch, layer)
    last = (batch["y"] != IGNORE).float().argmax(1) - 1
    return states[torch.arange(len(states)), last.clamp(min=0).to(states.device)]


def buckets(lengths: Sequence[int], size: int) -> list[Tensor]:
    """Positions in batches of at most `size`, like lengths together: for passes whose results are put back in place."""
    order = torch.tensor(lengths).argsort(stable=True)
    return list(order.split(size))


def generate(
    model: nn.Module, prompts: Sequence[Tensor], *, new: int = 64, eos: int | Sequence[int] | None = None, temperature: float = 0.0,
    generator: torch.Generator | None = None, size: int = 32,
) -> list[Tensor]:  # fmt: skip
    """At most `new` tokens after each prompt, and no more than the model's context holds, without prompt and end token. Greedy at temperature 0, else sampled
    with `generator`.

    Runs the model's own `generate` on prompts of like length, padded on the left. Raises ModelError for a model that has none.
    """
    if not hasattr(model, "generate"):
        raise ModelError(f"{type(model).__name__} cannot generate: a causal model of transformers is needed")
    config: Any = model.config
    ends = eos if eos is not None else getattr(config, "eos_token_id", None)
    stops = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    found: dict[int, Tensor] = {}
    context = getattr(config, "max_position_embeddings", None)
    options: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": next(iter(stops), 0), "eos_token_id": sorted(stops) or None}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    device = device_of(model)
    room = [new if context is None else max(0, min(new, context - len(p))) for p in prompts]
    for rows in _alike(prompts, room, size):
        width, least = max(len(prompts[k]) for k in rows.tolist()), room[int(rows[0])]
        if least == 0:
            found |= {k: prompts[k][:0] for k in rows.tolist()}
            continue
        x, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for r, k in enumerate(rows.tolist()):
            x[r, width - len(prompts[k]) :] = prompts[k]
            mask[r, width - len(prompts[k]) :] = 1
        with quiet(model), reseeded(int(torch.randint(2**31, (1,), generator=generator)) if temperature > 0 else None):
            out = model.generate(input_ids=x.to(device), attention_mask=mask.to(device), max_new_tokens=least, **options)[:, width:].cpu()  # pyright: ignore
        for r, k in enumerate(rows.tolist()):
            cut = [t for t, token in enumerate(out[r].tolist()) if token in stops]
            found[k] = out[r, : cut[0]] if cut else out[r]
    return [found[k] for k in range(len(prompts))]


def _alike(prompts: Sequence[Tensor], room: Sequence[int], size: int) -> list[Tensor]:
    """Batches of prompts that have the same number of tokens left, like lengths together: what one is given never depends on the others."""
    found = []
    for left in sorted({*room}):
        index = torch.tensor([k for k, of in enumerate(room) if of == left])
        found += [index[rows] for rows in buckets([len(prompts[k]) for k in index.tolist()], size)]
    return found


def sample(
    model: nn.Module, data: Texts, *, new: int = 64, temperature: float = 0.0, generator: torch.Generator | None = None, tokenizer: Any = None
) -> list[str]:
    """Answers of the model to each row's prompt, decoded and stripped."""
    tokenizer = tokenizer or data.format.tokenizer
    prompts = [data.format.prompt(row) for row in data.rows]
    answers = generate(model, prompts, new=new, eos=tokenizer.eos_token_id, temperature=temperature, generator=generator)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def padded(batch: Batch, extra: int, token: int = 0) -> Batch:
    """The batch with `extra` more columns of padding that hold `token`: what a result must never depend on."""
    x, y = (F.pad(batch[n], (0, extra), value=v) for n, v in (("x", token), ("y", IGNORE)))
    return {**batch, "x": x, "y": y}


def parted(out: Out, sizes: Sequence[int]) -> list[Out]:
    """The pass of a batch as the passes of its rows' groups, `sizes` rows each."""
    pieces = [t.split(list(sizes)) for t in (out.nll, out.count, out.logits, out.labels, out.units)]
    return [Out(nll, count, logits, labels, units) for nll, count, logits, labels, units in zip(*pieces, strict=True)]


def with_targets(data: Texts, targets: Sequence[Tensor]) -> Texts:
    """The same texts with other target masks."""
    return replace(data, targets=tuple(targets))
