"""What guards share: where a prompt ends, its pooled states, a linear classifier on them with a calibrated threshold.

A prompt ends behind the last place where the marker stands: the tokens that all prompts of a format end with, as those of "Answer:". So a gate decides on
the question alone, and decides the same for the prompt, for every step of its answer, and for any answer that is scored. Without a marker, or where it
does not stand, the whole text counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.guard import quiet
from expunge.core.hooks import Guarded, bare
from expunge.core.types import Batch, Split, Task
from expunge.modalities.language.task import blocks, buckets, hidden
from expunge.modalities.language.texts import Texts

LONGEST = 16
"""Most tokens of a marker."""

SHUT = 0.5
"""Share of the forget prompts that a gate may miss before its run counts as partial."""


def marker(*parts: Texts | None) -> list[int]:
    """Tokens that all prompts of these texts end with, at most LONGEST; empty for raw texts, which have no prompt.

    A prompt is what stands before the first target; those of a few made-up questions keep out what the questions happen to share, as their "?".
    """
    rows = [(t, y, p.format) for p in parts if p is not None for t, y, row in zip(p.tokens, p.targets, p.rows, strict=True) if "question" in row]
    prompts = [t[: int(y.float().argmax())].tolist() for t, y, _ in rows]
    form = rows[0][2] if rows else None
    prompts += [form.prompt({"question": q}).tolist() for q in ("0", "Why", "so.")] if form is not None else []
    shortest = min((len(p) for p in prompts), default=0)
    n = 0
    while n < min(LONGEST, shortest - 1) and len({p[-n - 1] for p in prompts}) == 1:
        n += 1
    return prompts[0][len(prompts[0]) - n :] if n else []


def flush(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, T) moved to the left, so that padding of either side stands right; their lengths (B,), and the column (B,) at which each began."""
    first = mask.long().argmax(1)
    places = (torch.arange(x.shape[1], device=x.device) + first[:, None]).clamp(max=x.shape[1] - 1)
    return x.gather(1, places), mask.long().sum(1), first


def ends(x: Tensor, n: Tensor, found: Sequence[int]) -> Tensor:
    """(B,) tokens of each right-padded row that belong to its prompt: up to the last marker, or all n.

    >>> ends(torch.tensor([[5, 1, 2, 7, 1, 2, 9], [1, 3, 3, 3, 0, 0, 0]]), torch.tensor([7, 4]), [1, 2])
    tensor([6, 4])
    """
    width = len(found)
    if not width or x.shape[1] < width:
        return n
    same = (x.unfold(1, width, 1) == torch.tensor(list(found), device=x.device)).all(-1)
    stop = torch.arange(width, x.shape[1] + 1, device=x.device)
    last = torch.where(same & (stop <= n[:, None]), stop, 0).amax(1)
    return torch.where(last > 0, last, n)


def pooled(model: nn.Module, x: Tensor, n: Tensor, layer: str) -> Tensor:
    """(B, D) float32 mean over the first n tokens of each right-padded row of the states at the named module, of the input embeddings for "".

    The guards of the model are off, whatever they would do to these tokens.
    """
    x = x[:, : int(n.max())]
    with quiet(model), bare(model):
        embed: Any = model.get_input_embeddings()  # pyright: ignore
        states = hidden(model, {"x": x, "n": n}, layer) if layer else embed.forward(x)
    kept = (torch.arange(x.shape[1], device=x.device) < n[:, None]).to(states.device)
    return (states.float() * kept[..., None]).sum(1) / n.to(states.device)[:, None]


def features(model: nn.Module, task: Task, data: Texts, layer: str, found: Sequence[int], size: int = 32) -> Tensor:
    """(N, D) float32 pooled states of the prompts of `data`, on CPU."""
    out: list[Any] = [None] * len(data)
    for rows in buckets([len(t) for t in data.tokens], size):
        batch: Batch = task.collate(data, rows, None)
        device = next(model.parameters()).device
        x, n = batch["x"].to(device), batch["n"].to(device)
        for k, value in zip(rows.tolist(), pooled(model, x, ends(x, n, found), layer).cpu(), strict=True):
            out[k] = value
        guard.current().meter.add(forward=len(rows))
    return torch.stack(out)


@dataclass(frozen=True)
class Linear:
    """Flag x when weight x + bias > threshold; `false_positive` and `false_negative`: shares on held-out other prompts and on the forget prompts."""

    weight: Tensor
    bias: Tensor
    threshold: float
    measured: dict[str, Any]


def linear(forget: Tensor, other: Tensor, held: Tensor, *, target: float, strength: float = 1.0) -> Linear:
    """Logistic regression of forget (N, D) against other (M, D) prompts, class-weighted, on standardised features folded back into the weights; the
    threshold is the lowest that flags at most a share `target` of the held-out other prompts (K, D)."""
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([forget, other]).double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    y = torch.cat([torch.ones(len(forget)), torch.zeros(len(other))]).numpy()
    found = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000).fit(((x - mean) / scale).numpy(), y)
    weight = torch.as_tensor(found.coef_[0]) / scale
    bias = torch.as_tensor(found.intercept_[0]) - (weight * mean).sum()
    weight, bias = weight.float(), bias.float()
    scores = [(part @ weight + bias) for part in (held, forget)]
    threshold = quantile(scores[0], target)
    measured = {
        "false_positive": float((scores[0] > threshold).float().mean()), "false_negative": float((scores[1] <= threshold).float().mean()),
        "held": len(held), "forget": len(forget),
    }  # fmt: skip
    return Linear(weight, bias, threshold, measured)


def admit(measured: dict[str, Any], way: str) -> None:
    """Tell the guard of a run of a gate that stays shut for more than SHUT of the forget prompts, by its own measurement, and what can be done."""
    if measured["false_negative"] > SHUT:
        guard.current().doubt(
            f"the gate stays shut for {measured['false_negative']:.1%} of the {measured['forget']} forget prompts that it was made for: {way}"
        )


def quantile(scores: Tensor, share: float) -> float:
    """The lowest of the scores (N,) that at most a share of them lies above.

    >>> quantile(torch.tensor([1.0, 4.0, 2.0, 3.0]), 0.25), quantile(torch.tensor([1.0, 4.0, 2.0, 3.0]), 0.01)
    (3.0, 4.0)
    """
    ranked = scores.double().sort(descending=True).values
    return float(ranked[min(len(ranked) - 1, math.floor(share * len(ranked) + 1e-9))])


def place(model: nn.Module, layer: int) -> str:
    """Name of the module whose output is pooled: "" (the input embeddings) for 0, else the block of that number, counted from 1."""
    known = blocks(model)
    if not 0 <= layer <= len(known):
        raise SettingError(f"layer must be in 0..{len(known)} (0: the input embeddings), not {layer}")
    return known[layer - 1][0] if layer else ""


def trained(model: nn.Module, task: Task, split: Split, layer: int, *, target: float, seed: int) -> tuple[Linear, dict[str, Any]]:
    """The classifier of forget against retain prompts and what a hook's config needs of it. A quarter of the retain prompts and all validation prompts are
    held out, and set the threshold."""
    if not 0 <= target < 1:
        raise SettingError(f"false_positives must be a share in 0..1, not {target:g}")
    found, name = marker(split.forget, split.retain), place(model, layer)
    forget, retain = (features(model, task, part, name, found) for part in (split.forget, split.retain))
    fitted, held = halves(len(retain), seed)
    others = [retain[held]] if split.validation is None else [retain[held], features(model, task, split.validation, name, found)]
    line = linear(forget, retain[fitted], torch.cat(others), target=target)
    admit(line.measured, "raise false_positives, or read another layer")
    return line, {"layer": name, "marker": found, "threshold": line.threshold, "measured": line.measured}


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions 0..n-1 drawn into three quarters to fit on and one quarter, at least one, held out; both all of them when n is 1."""
    if n < 2:
        return torch.arange(n), torch.arange(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cut = min(n - 1, round(0.75 * n))
    return order[:cut], order[cut:]


def linear_gate(model: nn.Module, it: Guarded, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B,) and flagged (B,) of a hook that holds `weight`, `bias`, `layer`, `marker` and `threshold`; decisions go to the log."""
    end = ends(x, n, it.hook.config["marker"])
    states = pooled(model, x, end, it.hook.config["layer"])
    scores = states @ it.tensor("weight", states) + it.tensor("bias", states)
    flagged = scores > it.hook.config["threshold"]
    note(it, x, end, scores, flagged)
    return scores, flagged


def note(it: Guarded, x: Tensor, end: Tensor, scores: Tensor, flagged: Tensor) -> None:
    """Log the decision on every row's prompt."""
    for row, stop, score, flag in zip(x, end.tolist(), scores.tolist(), flagged.tolist(), strict=True):
        it.record(row[:stop], score, flag)
