"""UMD: does a classifier hold a backdoor between some classes, and which? Reads a few clean examples of every class.

Paper    Xiang et al., "UMD: Unsupervised Model Detection for X2X Backdoor Attacks", ICML 2023. Source: card umd.

For every ordered pair (s, t) one perturbation v is found that sends clean examples of class s to t. A backdoor leaves a short cut: v of its
pairs is small, and v of one pair also sends the other sources to their own targets. So pairs are clustered by how far their v transfer to each
other, and the cluster's sizes are compared with those of all others.

    A[(s,t), (u,j)]   share of class-u examples that v_{s,t} sends to j; 0 for u = j, and for (u,j) = (s,t)
    score(core)       min_{i in core} mean_{j in core} (A + A')[i,j] / 2  -  max_{k not in core} mean_{i in core} A[i,k]
    S                 (median r of the core - median r of the N others) / (1.4826 * MAD of the others),  r = 1 / ||v||
    backdoor          S > theta(N) = sqrt2 * erfinv(2 * 0.95^(1/N) - 1), the 95 % quantile of the largest of N standard normals

The core is chosen on the same perturbations that S is read on, and the null is normal by assumption: `p` ranks models, it is no proven error rate.
Triggers are additive here; a patch over bright places needs another form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import SettingError, SplitError
from expunge.core.types import Task
from expunge.modalities.examples import Examples
from expunge.parts.reading import score

CHUNK = 1000
"""Most perturbed examples in one forward pass."""


@dataclass(frozen=True)
class Detection:
    """What UMD says of one model.

    pairs      (source, target) classes of the core: the putative backdoor
    backdoor   statistic > threshold
    statistic  S; threshold theta(N); p = 1 - Phi(S)^N
    scores     core-periphery score of the core
    sizes      (C, C) ||v_{s,t}||, nan on the diagonal
    reached    (C, C) share of class-s examples that v_{s,t} sends to t, nan on the diagonal
    patterns   (C, C, ...) the perturbations, in units of the model's input: synthetic triggers
    labels     the class that each of the C rows and columns stands for
    n          examples per class
    """

    pairs: tuple[tuple[int, int], ...]
    backdoor: bool
    statistic: float
    threshold: float
    p: float
    score: float
    sizes: Tensor
    reached: Tensor
    patterns: Tensor
    labels: tuple[int, ...]
    n: int


def umd(
    model: nn.Module, task: Task, clean: Examples, *, n: int = 10, success: float = 0.9, step: float = 0.05, steps: int = 500, limit: float = 20.0,
    starts: int = 5, seed: int = 0,
) -> Detection:  # fmt: skip
    """Look for a backdoor with up to `n` rightly classified examples of every class of `clean`; the model is not changed.

    success  share of class s at t at which a perturbation is finished
    step     length of one step, in units of the model's input; v is clipped with the input to the range of `clean`
    limit    a perturbation of this length is given up
    starts   how many pairs of pairs a core is grown from

    Published: up to 1,000 steps of SGD at 1e-5. Here the same descent at constant speed, v <- v - step * g / ||g||: as both steps shrink, the path is
    the same, and the number of steps is about ||v|| / step. Clipping is in the model's own input domain (the public re-implementation clips
    normalised inputs to 0..1). Raises SplitError when a class has no rightly classified example.
    """
    if n < 1 or steps < 1 or starts < 1 or not step > 0 or not limit > 0 or not 0 < success <= 1:
        raise SettingError(
            f"n, steps and starts must be at least 1, step and limit above 0, success in (0, 1]; found {n}, {steps}, {starts}, {step:g}, {limit:g}, {success:g}"
        )
    chosen, labels = rightly(model, task, clean, n, seed)
    c = len(labels)
    if c < 3:
        raise SplitError(f"umd compares pairs of classes and needs at least 3 classes; the clean examples have {c}")
    low, high = float(clean.x.min()), float(clean.x.max())
    pairs = [(s, t) for s in range(c) for t in range(c) if s != t]
    with guard.quiet(model), guard.current().meter.pause():
        v, hit = perturbations(model, task, chosen, labels, pairs, success, step, steps, limit, (low, high))
        a = transfers(model, task, chosen, labels, pairs, v, (low, high))
    core, value = core_periphery(a, pairs, starts)
    sizes = v.flatten(1).norm(dim=1)
    inside = torch.zeros(len(pairs), dtype=torch.bool)
    inside[core] = True
    s, theta, p = deviation(sizes[inside], sizes[~inside])
    table, reached, patterns = torch.full((c, c), math.nan), torch.full((c, c), math.nan), torch.zeros(c, c, *v.shape[1:])
    for k, (i, j) in enumerate(pairs):
        table[i, j], reached[i, j], patterns[i, j] = sizes[k], hit[k], v[k]
    named = tuple(sorted((labels[pairs[k][0]], labels[pairs[k][1]]) for k in core))
    return Detection(named, s > theta, s, theta, p, value, table, reached, patterns, tuple(labels), chosen.shape[1])


def rightly(model: nn.Module, task: Task, clean: Examples, n: int, seed: int) -> tuple[Tensor, list[int]]:
    """(C, n', ...) rightly classified inputs, n' = n or what the poorest class has, and the C labels in order."""
    right = score(model, task, clean).correct
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clean), generator=generator)
    order = order[right[order]]
    labels = clean.y.unique().tolist()
    rows = [order[clean.y[order] == c][:n] for c in labels]
    if lacking := [c for c, r in zip(labels, rows, strict=True) if not len(r)]:
        raise SplitError(f"no clean example of class {lacking[0]} is classified rightly; give more examples of it")
    least = min(map(len, rows))
    return torch.stack([clean.x[r[:least]] for r in rows]), labels


def logits(model: nn.Module, task: Task, x: Tensor) -> Tensor:
    """(B, C) logits of inputs (B, ...)."""
    none = torch.zeros(len(x), dtype=torch.long)
    return task.forward(model, {"x": x, "y": none, "i": none}).logits


def perturbations(model, task, chosen: Tensor, labels, pairs, success, step, steps, limit, bounds) -> tuple[Tensor, Tensor]:
    """(P, ...) one v per pair and (P,) the share of class s that it sends to t. All pairs move together; one that is finished moves no more."""
    n = chosen.shape[1]
    v = torch.zeros(len(pairs), *chosen.shape[2:], dtype=chosen.dtype)
    hit = torch.zeros(len(pairs))
    at_once = max(1, CHUNK // n)
    for first in range(0, len(pairs), at_once):
        alive = torch.arange(first, min(first + at_once, len(pairs)))
        for k in range(steps + 1):
            x = chosen[[pairs[i][0] for i in alive]]
            aim = torch.tensor([labels[pairs[i][1]] for i in alive])
            w = v[alive].requires_grad_(True)
            with torch.enable_grad():
                out = logits(model, task, (x + w[:, None]).clamp(*bounds).flatten(0, 1))
                value = F.cross_entropy(out, aim.repeat_interleave(n).to(out.device), reduction="sum") / n
                (g,) = torch.autograd.grad(value, w)
            hit[alive] = (out.argmax(-1).cpu().view(-1, n) == aim[:, None]).float().mean(1)
            going = (hit[alive] < success) & (w.detach().flatten(1).norm(dim=1) <= limit)
            alive, g = alive[going], g[going]
            if not len(alive) or k == steps:
                break
            v[alive] -= step * g / g.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (g.ndim - 1))
    return v, hit


def transfers(model, task, chosen: Tensor, labels, pairs, v: Tensor, bounds) -> Tensor:
    """A (P, P): row (s, t), column (u, j): share of class-u examples that v_{s,t} sends to j; 0 on the diagonal."""
    c, n = chosen.shape[:2]
    known = torch.tensor(labels)
    a = torch.zeros(len(pairs), len(pairs))
    columns = torch.tensor([u * c + j for u, j in pairs])
    for k in range(len(pairs)):
        out = torch.cat([logits(model, task, part).argmax(-1).cpu() for part in (chosen + v[k]).clamp(*bounds).flatten(0, 1).split(CHUNK)])
        share = (out.view(c, n)[:, :, None] == known).float().mean(1)
        a[k] = share.flatten()[columns]
        a[k, k] = 0
    return a


def core_periphery(a: Tensor, pairs: list[tuple[int, int]], starts: int = 5) -> tuple[list[int], float]:
    """Positions of the core of pairs with the best score, and that score. Each source is in the core once.

    From each of the `starts` pairs of pairs with the largest mutual transfer the core grows by the pair that leaves the best score, until no
    source is left; the best core over all sizes and starts wins, the first of equal ones.
    """
    mutual = (a + a.T) / 2
    source = torch.tensor([s for s, _ in pairs])
    upper = torch.triu(source[:, None] != source[None], 1)
    ranked = torch.where(upper, mutual, -torch.inf).flatten().argsort(descending=True, stable=True)
    best: tuple[list[int], float] = ([], -math.inf)
    for place in ranked[: min(starts, int(upper.sum()))].tolist():
        core = list(divmod(place, len(pairs)))
        value = rating(a, mutual, core)
        while True:
            if value > best[1]:
                best = list(core), value
            rest = [k for k in range(len(pairs)) if not (source[core] == source[k]).any()]
            if not rest:
                break
            grown = [rating(a, mutual, core + [k]) for k in rest]
            value = max(grown)
            core = core + [rest[grown.index(value)]]
    return best


def rating(a: Tensor, mutual: Tensor, core: list[int]) -> float:
    """min_{i in core} mean_{j in core} mutual[i,j] - max_{k not in core} mean_{i in core} a[i,k]; mutual is 0 on the diagonal.

    >>> a = torch.tensor([[0.0, 1.0, 0.2], [0.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> round(rating(a, (a + a.T) / 2, [0, 1]), 4)
    0.35
    """
    outside = torch.ones(len(a), dtype=torch.bool)
    outside[core] = False
    rim = float(a[core][:, outside].mean(0).max()) if bool(outside.any()) else 0.0
    return float(mutual[core][:, core].mean(1).min()) - rim


def deviation(core: Tensor, others: Tensor) -> tuple[float, float, float]:
    """S, theta(N) and p of the core's sizes (K,) against those of the N others (N,).

    >>> [round(v, 4) for v in deviation(torch.tensor([4.0, 5, 6]), torch.tensor([10.0, 11, 12, 13, 14]))]
    [10.3872, 2.3187, 0.0]
    """
    r, null = 1 / core.double().clamp(min=1e-12), 1 / others.double().clamp(min=1e-12)
    centre = null.quantile(0.5)
    gap, spread = float(r.quantile(0.5) - centre), 1.4826 * float((null - centre).abs().quantile(0.5))
    s = gap / spread if spread else math.copysign(math.inf, gap) if gap else 0.0
    return s, theta(len(others)), 1 - (0.5 * (1 + math.erf(s / math.sqrt(2)))) ** len(others)


def theta(n: int, level: float = 0.95) -> float:
    """The quantile `level` of the largest of n standard normals.

    >>> round(theta(80), 4), round(theta(10), 4)
    (3.22, 2.5679)
    """
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * level ** (1 / n) - 1, dtype=torch.double)))
