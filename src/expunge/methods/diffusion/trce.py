"""TRCE: the state at the end of a bad prompt is mapped to that of a safe one, then the first steps of drawing are steered from the bad to the safe.

Paper    Chen et al., "TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models", ICCV 2025.
Code     ddgoodgood/TRCE, no licence.
Forgets  concept.          Needs    forget (bad prompts), anchor (row by row the safe prompt) and retain (prompts whose keys and values stay).
Scope    first stage keys and values of cross-attention, second stage all self-attention and the queries of cross-attention.
Forget   first stage W' c = W g, c and g the states at the first end token of the bad and the safe prompt; second stage, with frozen predictions e*,
             pref = e*(safe) + G (e*(safe) - e*(""))     rej = e*(bad) + G (e*(bad) - e*(""))
             h(n) = max(0, beta (MSE(n, pref) - MSE(n, rej) + m))     (h(e(x, t, bad)) + h(e(x, t, ""))) / 2
Retain   first stage W' r = W r on all states of retained prompts; second stage keep || e(x', t', "") - e1(x', t', "") ||^2, e1 the model after the first
         stage, and alpha || e(x_r, t, r) - e1(x_r, t, r) ||^2 on trajectories of retained prompts r.   Update  closed form, then AdamW.   Leaves  Replace.
Settings
    start         weight of the state at place 0 (the start token, where a model has one) in the first stage
    end           weight of the state at the first end token; start, end, last and keyword all 0 leave the first stage out
    last          weight of the state at the last place, times the end tokens that it stands for
    keyword       weight of the states of the words that the safe prompt has not, each mapped to the safe prompt's last state
    preserve      weight of the retained prompts' states in the first stage: each prompt counts preserve / their number
    lam           weight of staying where the weights are, in the first stage; 0 as published, where texts must fill all directions
    most          retained prompts at most in the first stage, drawn by seed
    push          G, how far the preferred and the rejected prediction lie beyond the empty prompt's
    beta          scale of the hinge
    margin        m, by how much nearer to the preferred prediction is near enough
    early         share of a trajectory's steps, from pure noise on, that the second stage learns from
    keep          weight of the empty prompt's outputs
    alpha         weight of the retained prompts' outputs; 0 leaves them out, as published
    steps         updates of the second stage; 0 leaves it out
    batch_size    states per update (of each part)
    lr            step size of AdamW, weight decay 0.01
    guidance      of the trajectories; not 1
    trajectories  of the frozen model, over the bad prompts; as many of the empty prompt, and of retained ones; 0: one for each of these, 20 to 256
    path          states per trajectory
Differs  The code finds the first end token by counting words: here by the tokens. It keeps states one step apart from their times, never clears the gradients
         of the second stage, and adds 0.01 to the keep term, which has no gradient: here states and times belong together, and each update follows its own
         gradient. Its preserved statistics are 30,000 captions': here the retained prompts'. The empty prompt is kept at all times, not only at early ones.
         Retained prompts are unguarded in the published second stage (alpha=0). Published: preserve 1e-4 or 4e-4, lr 1e-6, trajectories of 50 steps.
         With a large push few hinges may be active: the patch's meta data name their share over all updates (active).
Check
    >>> import torch
    >>> n, pref, rej = torch.tensor([[3.2], [1.0], [9.6]]), torch.tensor([[3.2]]), torch.tensor([[16.0]])
    >>> hinge(n, pref, rej, 1.0, 0.01).round(decimals=4)
    tensor([0.0000, 0.0000, 0.0100])
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import SettingError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Session, edit, remembering
from expunge.core.types import Batch, Paired, Scope, Split, drawn
from expunge.methods.diffusion.uce import preserved
from expunge.modalities.diffusion.task import emptied, read, states
from expunge.modalities.diffusion.trajectory import Pool, counterparts, distinct, lines, pool, squared, under, worked
from expunge.modalities.pictures import Pictures
from expunge.parts.scopes.attention import part
from expunge.parts.updates.descend import descend
from expunge.parts.updates.ridge import redirect

ACTIVE = "expunge_active"
"""Buffer of a run: (2,) the sum of the shares of active hinges, and of how many updates."""

IDLE = 0.01
"""Share of active hinges below which the second stage counts as having taught nothing."""


def ends(tokens: Tensor) -> Tensor:
    """(N,) place of the first end token of each prompt (N, L): the first of the equal tokens that fill it up.

    >>> ends(torch.tensor([[5, 7, 0, 0], [7, 0, 0, 0]]))
    tensor([2, 1])
    """
    return torch.where(tokens != tokens[:, -1:], torch.arange(tokens.shape[1]), -1).amax(1) + 1


def matched(tokens: Tensor, anchors: Tensor) -> Tensor:
    """(N, L) for prompts and anchor prompts of tokens (N, L): the place in the anchor prompt of each shared word and end token, -1 for the concept's own.

    Words shared are those before the first difference and those after the last.
    >>> matched(torch.tensor([[5, 7, 9, 0, 0]]), torch.tensor([[5, 8, 8, 9, 0]]))
    tensor([[ 0, -1,  3,  4,  4]])
    """
    out = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    for k, (c, g, n, m) in enumerate(zip(tokens.tolist(), anchors.tolist(), ends(tokens).tolist(), ends(anchors).tolist(), strict=True)):
        least = min(n, m)
        first = next((j for j in range(least) if c[j] != g[j]), least)
        shared = next((j for j in range(least - first) if c[n - 1 - j] != g[m - 1 - j]), least - first)
        out[k, n - shared :] = (out[k, n - shared :] + m - n).clamp(max=tokens.shape[1] - 1)
        out[k, first : n - shared] = -1
    return out


class Beside(NamedTuple):
    """The P different prompts of a concept beside the anchor's of the same rows; all but `bad` at the L places that cross-attention reads.

    bad      the concept's records         c, g          (P, L, D) states of the concept's and the anchor's prompts
    to       (P, L) `matched`              words, safe   (P, L) tokens of both
    """

    bad: Pictures
    words: Tensor
    safe: Tensor
    c: Tensor
    g: Tensor
    to: Tensor


def beside(model: nn.Module, task: Any, split: Split) -> Beside:
    """The request's prompts beside their anchors. Raises SettingError where the anchor does not fit."""
    if len(split.anchor) != len(split.forget):
        raise SettingError(f"anchor must say row by row what to draw instead: it has {len(split.anchor)} rows, forget {len(split.forget)}")
    bad, rows = distinct(split.forget)
    instead = split.anchor.tokens[rows]
    words, safe = read(model, bad.tokens), read(model, instead)
    to = matched(words, safe)
    if not bool((to < 0).any()):
        raise SettingError("the anchor's prompts are those of the concept, or have more words alone: name another concept to draw instead")
    with quiet(model):
        c, g = (read(model, states(model, y)) for y in (task.collate(split.forget, rows, None)["y"], instead))
    return Beside(bad, words, safe, c, g, to)


def targets(c: Tensor, g: Tensor, bad: Tensor, safe: Tensor, to: Tensor, weights: tuple[float, float, float, float]) -> list[tuple[Tensor, Tensor, float]]:
    """(inputs, what they become, weight) of the first stage, for states c and g (P, L, D) and tokens (P, L) of bad and safe prompts; weights of the start,
    the first end token, the last place (times the end tokens after the first) and the keywords, all shared by the P pairs."""
    P, L, _ = c.shape
    start, end, last, keyword = (w / P for w in weights)
    rows, n = torch.arange(P), ends(bad)
    tail = (L - 1 - n).clamp(min=0).sqrt().to(c)[:, None]  # both sides of a squared error scaled by the root of its weight
    own = to < 0
    groups = [
        (c[:, 0], g[:, 0], start),
        (c[rows, n], g[rows, ends(safe)], end),
        (tail * c[:, -1], tail * g[:, -1], last),
        (c[own], g[:, -1:].expand_as(c)[own], keyword),
    ]
    return [group for group in groups if group[2]]


def hinge(n: Tensor, pref: Tensor, rej: Tensor, beta: float, margin: float) -> Tensor:
    """(B,) max(0, beta (MSE(n, pref) - MSE(n, rej) + margin)), means over the elements of each n (B, ...)."""
    near, far = ((n - other).square().flatten(1).mean(1) for other in (pref, rej))
    return (beta * (near - far + margin)).clamp(min=0)


def contrasts(model: nn.Module, task: Any, split: Split, push: float, early: float, guidance: float, n: int, path: int, seed: int) -> tuple[Pictures, Pool]:
    """Early states of the bad prompts' trajectories, with the preferred prediction in the place of `cond` and the rejected one in that of `null`."""
    gone, at = pool(model, task, split.forget, n, guidance=guidance, steps=path, seed=seed)
    worked(split.forget, gone.tokens, len(gone))
    rows = (at.t >= task.schedule.path(path)[first(early, path) - 1]).nonzero().squeeze(1)
    at = Pool(at.xt[rows], at.t[rows], at.i[rows], at.cond[rows], at.null[rows])
    good = under(model, task, at, counterparts(gone, split.forget, split.anchor))
    return gone, replace(at, cond=good + push * (good - at.null), null=at.cond + push * (at.cond - at.null))


def first(early: float, path: int) -> int:
    """Steps of a trajectory that the second stage learns from."""
    return max(1, round(early * path))


def cost(n, s) -> tuple[float, float]:
    """Passes: trajectories of bad, empty and retained prompts, what safe prompts and the model after the first stage say there, and the updates."""
    if not s["steps"]:
        return 0, 0
    size, others = lines(n, s) * s["path"], 2 if s["alpha"] else 1
    short = lines(n, s) * first(s["early"], s["path"])
    seen = 2 * drawn(short, s["batch_size"], s["steps"]) + others * drawn(size, s["batch_size"], s["steps"])
    return seen + 2 * size + short + 2 * size + (3 * size if s["alpha"] else 0), seen


@method(
    paper="ICCV 2025", tasks=("diffusion",), needs=("forget", "anchor", "retain"), forgets=("class",), cost=cost,
    toy={"steps": 60, "trajectories": 10, "early": 1.0, "keep": 1.0},
    published={"lam": 0.0, "lr": 1e-06, "path": 50}, place="code: yaml configurations, sexual content",
    lacks="it costs 19 points of the other styles on shapes",
)  # fmt: skip
def trce(
    model: nn.Module, task: Any, split: Split, *, start: float = 0.0, end: float = 1.0, last: float = 0.0, keyword: float = 0.0, preserve: float = 1e-4,
    lam: float = 1e-6, most: int = 1000, push: float = 15.0, beta: float = 1.0, margin: float = 0.01, early: float = 0.5, keep: float = 100.0,
    alpha: float = 0.0, steps: int = 100, batch_size: int = 32, lr: float = 1e-3, guidance: float = 3.0, trajectories: int = 0, path: int = 25,
    seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if guidance == 1 and steps:
        raise SettingError("guidance 1 draws without the empty prompt, which the contrast needs: choose another")
    if not 0 < early <= 1:
        raise SettingError(f"early must be above 0 and at most 1, not {early:g}")
    asked = beside(model, task, split)
    pairs = targets(asked.c, asked.g, asked.words, asked.safe, asked.to, (start, end, last, keyword))
    kept = preserved(model, split.retain, most if preserve else 0, seed)
    if kept is not None:
        pairs.append((kept, kept, preserve * asked.c.shape[1] / len(kept)))
    streams, active = [], torch.zeros(2, dtype=torch.double)
    if steps:
        streams.append(contrasts(model, task, split, push, early, guidance, trajectories, path, seed))
        many = len(streams[0][0])
        streams.append(pool(model, task, emptied(split.retain, task.null), many, guidance=1.0, steps=path, seed=seed + 1))
        if alpha:
            streams.append(pool(model, task, split.retain, many, guidance=guidance, steps=path, seed=seed + 2))

    def loss(batches: tuple[Batch, ...]) -> Tensor:
        """(h(bad) + h("")) / 2 + keep || e("") - e1("") ||^2 + alpha || e(r) - e1(r) ||^2, the two h in one pass."""
        b, *rest = batches
        both = {k: torch.cat([b[k], b[k]]) for k in ("xt", "t", "i", "cond", "null")}
        n = task.forward(model, {**both, "y": torch.cat([b["y"], task.null.expand_as(b["y"])])}).pred
        h = hinge(n, both["cond"].to(n.device), both["null"].to(n.device), beta, margin)
        active.add_(active.new_tensor([float((h > 0).float().mean()), 1.0]))
        value = h.mean()
        for r, weight in zip(rest, (keep, alpha), strict=False):
            value = value + weight * squared(task, model, r, r["cond"]).mean()
        return value

    one, two = part(model, "xattn-kv"), part(model, r"unet\..*(attn1\.|attn2\.to_q\.)")
    with remembering(edit(model, Scope({**one.masks, **two.masks})), model, {ACTIVE: active}) as e:
        e.eval()
        if any((start, end, last, keyword)):
            redirect([e.params[n] for n in one.masks], pairs, lam)
        if streams:
            after = [(data, replace(at, cond=under(model, task, at, data.tokens))) for data, at in streams[1:]]
            batches = [at.batches(data, batch_size, steps, seed + k) for k, (data, at) in enumerate([streams[0], *after])]
            for n in one.masks:
                e.params[n].requires_grad_(False)
            steered = Session(model, {n: e.params[n] for n in two.masks}, dict(two.masks), e.buffers)
            descend(steered, loss, Paired(*batches), lr=lr, optimizer="adamw", weight_decay=0.01)
    if not active[1]:
        return e.patch
    share = round(float(active[0] / active[1]), 4)
    if share < IDLE:
        guard.current().doubt(f"the second stage taught nothing in {1 - share:.1%} of its states: lower push or raise margin")
    return replace(e.patch, meta={**e.patch.meta, "active": share})
