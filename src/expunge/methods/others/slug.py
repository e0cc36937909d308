"""SLUG: one gradient step on one layer, the layer from a Pareto front and the step length from a search.

Paper    Cai et al., "Targeted Unlearning with Single Layer Unlearning Gradient", ICML 2025, arXiv:2407.11867.          Code     CSIPlab/SLUG, no licence.
Forgets  records, class, concept.          Needs    forget, retain.
Scope    one weight matrix from the front of large ||g_f|| / ||theta|| and small |cos(g_f, g_r)|; of diffusion models its whole group (widen).
Forget   theta + s * grad L_f, s > 0. L_f: CLIP 1 - cos(image, caption); classifiers CE; diffusion models the denoising loss under the concept's prompts.
Retain   by choice of layer and s; g_r is the gradient of the model's training loss.   Update  search of s by doubling and halving.   Leaves  Replace.
Settings
    evaluations  how many step lengths are tried per layer
    layers       how many layers of the front are tried: most important first, CLIP's two towers in turn, a diffusion model's deepest first
    drop         largest loss of accuracy on kept data that a step may cost
    sample       most retain examples for the gradient, and for the evaluations when there is no validation part
    batch_size   examples per step of the two gradient passes
    buffers      move, freeze or recompute: what happens to batch-norm statistics
    part         weights that the front may choose from: a part (see esd) or a pattern; empty is all of them, of diffusion models the text encoder
    widen        diffusion models: step along the whole group of the layer (q, k and v, or both maps of its MLP)
Differs  Classifiers use cross-entropy and the classifier's own accuracy instead of zero-shot CLIP accuracy. The script and the notebook
         store gradients of opposite sign; here the gradient of +L_f is stored and added. The published search evaluates on test-like
         data; here on validation, without the classes that are removed, or on the retain sample, never on test. Gradients are taken in
         eval mode. A step has forgotten when accuracy on forget is at most 0 for removed classes and, for other records, the model's
         accuracy on validation (without validation: on the retain sample, less `drop`).
         CLIP: top-1 of the task's class prompts instead of top-5 of names. Retained captions stay their own and the two gradients are apart:
         the published passes replace the captions and never clear gradients.
         Diffusion: the paper takes L_f and g_r from the CLIP whose text tower the pipeline shares, and judges drawings by CLIP or by the benchmark's judge.
         A diffusion model has no image tower: its own loss stands in for L_f and g_r. For accuracy stands the share of images that their prompts still
         explain, at the same times and noise: loss under the prompt, after, below loss under the empty prompt, before. No drawing, no judge.
Check
    >>> from expunge.parts.scopes.pareto import front
    >>> front({"A": (0.10, 5), "B": (0.05, 1), "C": (0.20, 6), "D": (0.15, 4)})
    ['C', 'A', 'B']
    >>> import torch; from expunge.parts.updates.oneshot import first_step
    >>> first_step(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))      # -0.25 along the script's gradient of -CE
    0.25
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Out, Split, Task, absent
from expunge.modalities.diffusion.task import emptied
from expunge.modalities.pictures import Pictures
from expunge.parts.reading import score
from expunge.parts.scopes.attention import part as part_of
from expunge.parts.scopes.layers import match
from expunge.parts.scopes.pareto import front, layer_points, matrices
from expunge.parts.scopes.saliency import gradient_sum
from expunge.parts.updates.oneshot import first_step, search

Gradients = dict[str, Tensor]
FEW = 50


def unlike(out: Out) -> Tensor:
    """mean(1 - cos) of images and captions, unit vectors (B, D).

    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.75**0.5]])
    >>> [round(float(unlike(Out(a, a, pred=a, target=t))), 4) for t in (a, b)]
    [0.0, 0.5]
    """
    assert out.pred is not None
    return (1 - (out.pred * out.target).sum(-1)).mean()


def gradients(model: nn.Module, task: Task, forget: Any, kept: Any, size: int) -> tuple[Gradients, Gradients]:
    """g_f and g_r, each summed over batches. Batches of a contrastive task are drawn by seed: its training loss is that of such batches."""
    if task.name != "contrastive":
        gone, held = (gradient_sum(model, task, task.batches(data, size)) for data in (forget, kept))
        return gone, held
    return gradient_sum(model, task, task.batches(forget, size, seed=0), unlike), gradient_sum(model, task, task.batches(kept, size, seed=0))


def kin(name: str) -> str:
    """What the weights of one group share.

    >>> [kin(f"l.0.{n}.weight") for n in ("attn.to_k", "self_attn.q_proj", "attn.to_out.0", "mlp.fc2", "ff.2", "ff.net.0.proj")]
    ['l.0.attn.qkv', 'l.0.self_attn.qkv', 'l.0.attn.to_out.0.weight', 'l.0.mlp.both', 'l.0.ff.both', 'l.0.ff.both']
    """
    name = re.sub(r"(?<=\.)(to_)?[qkv](_proj)?\.weight$", "qkv", name)
    return re.sub(r"(?<=\.)(fc[12]\.weight|(?<=ff\.)(net\.)?[02](\.proj)?\.weight)$", "both", name)


def candidates(task: Task, weights: Mapping[str, Tensor], gone: Gradients, held: Gradients, widen: bool) -> list[list[str]]:
    """What may be moved together, in the order in which it is tried."""
    points = layer_points(weights, gone, held)
    if task.name == "contrastive":
        towers = [front({n: p for n, p in points.items() if n.startswith("vis") == vision}) for vision in (True, False)]
        return [[n] for pair in itertools.zip_longest(*towers) for n in pair if n]
    if task.name != "diffusion":
        return [[n] for n in front(points)]
    deepest = sorted(front(points), key=list(weights).index, reverse=True)
    groups = {kin(n): [m for m in points if kin(m) == kin(n)] for n in deepest}
    return list(groups.values()) if widen else [[n] for n in deepest]


def removed(forget: Any, retain: Any) -> Callable[[Any], Tensor]:
    """data -> (N,) bool: shows a class (of pictures: a concept) that forget has and retain has not."""
    if not isinstance(forget, Pictures):
        classes = absent(forget.y, retain.y)
        return lambda data: torch.isin(data.y, classes)
    fields = [f for f in forget.rows[0] if f != "prompt"]
    gone = {f: {r.get(f) for r in forget.rows} - {r.get(f) for r in retain.rows} for f in fields}
    return lambda data: torch.tensor([any(r.get(f) in gone[f] for f in fields) for r in data.rows], dtype=torch.bool)


def knowing(model: nn.Module, task: Any, parts: Sequence[Any]) -> Callable[[Any], Tensor]:
    """One of `parts` -> (N,) bool of what the model still knows when asked: right answers; of a diffusion model, images that their prompts explain."""
    if task.name != "diffusion":
        return lambda data: score(model, task, data).correct
    if task.null is None:
        raise SettingError("the search compares with the empty prompt: the task needs its tokens (null)")
    before = {id(data): score(model, task, emptied(data, task.null)).nll for data in parts}
    return lambda data: score(model, task, data).nll < before[id(data)]


def _cost(n, s) -> tuple[float, float]:
    """An upper bound: the front may hold fewer than `layers` layers. Diffusion models take one pass more over what the search reads, and often have a
    validation part of a few prompts without images, in whose place the retain sample is read: a part of fewer than FEW records counts as one."""
    sample = min(s["sample"], n["retain"])
    probe = n["validation"] if n.get("validation", 0) >= FEW else sample
    return n["forget"] + sample + probe + s["layers"] * s["evaluations"] * (n["forget"] + probe), n["forget"] + sample


@method(
    paper="arXiv:2407.11867", tasks=("classification", "contrastive", "diffusion"), needs=("forget", "retain"), cost=_cost, toy={"drop": 0.1},
    published={"batch_size": 16}, place="code: src/clip/unlearn/calc_grad.py and src/clip/unlearn_slug.py",
    lacks="it forgets classes of digits and mnist, and fails on diffusion models (shapes, style: UA 2.22)",
)  # fmt: skip
def slug(
    model: nn.Module, task: Task, split: Split, *, evaluations: int = 10, layers: int = 2, drop: float = 0.05, sample: int = 1000, batch_size: int = 64,
    buffers: str = "freeze", part: str = "", widen: bool = True, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if evaluations < 1 or layers < 1 or sample < 1:
        raise SettingError(f"evaluations, layers and sample must be at least 1; found {evaluations}, {layers} and {sample}")
    if buffers == "recompute" and task.name != "classification":
        raise SettingError(f"buffers=recompute is for classifiers, not for {task.name}; use freeze or move")
    kept = split.retain.take(torch.randperm(len(split.retain), generator=torch.Generator().manual_seed(seed))[:sample])
    part = part or ("text" if task.name == "diffusion" else "")
    inside = part_of(model, part).masks if part else None
    weights = {n: p for n, p in matrices(model).items() if inside is None or n in inside}
    gone, held = gradients(model, task, split.forget, kept, batch_size)
    groups = candidates(task, weights, gone, held, widen)[:layers]
    if not groups:
        return Patch(())
    away = removed(split.forget, split.retain)
    shown = not isinstance(split.validation, Pictures) or split.validation.x is not None
    seen = split.validation is not None and shown and bool((~away(split.validation)).any())
    probe = split.validation if seen else kept
    counts = ~away(probe)
    knows = knowing(model, task, (split.forget, probe))

    def keeps() -> float:
        return float(knows(probe)[counts].float().mean())

    start = keeps()
    goal = float((~away(split.forget)).float().mean()) * (start if seen else start - drop)
    trials: dict[tuple[str, float], tuple[float, float]] = {}
    with edit(model, match(model, *itertools.chain(*groups), buffers=buffers), stats=task.batches(split.retain, 256)) as e:
        base = {n: p.detach().clone() for n, p in e.params.items()}

        def put(names: list[str], s: float) -> None:
            with torch.no_grad():
                for name in names:
                    e.params[name].copy_(base[name] + s * gone[name])

        def judge(names: list[str], s: float) -> tuple[bool, bool]:
            put(names, s)
            trials[names[0], s] = float(knows(split.forget).float().mean()), keeps()
            return trials[names[0], s][0] <= goal, trials[names[0], s][1] < start - drop

        chosen = []
        for names in groups:
            first = first_step(*(joined(each, names) for each in (base, gone)))
            s = search(first, lambda s, names=names: judge(names, s), evaluations=evaluations)
            put(names, 0.0)
            if s > 0:
                forget, utility = trials[names[0], s]
                chosen.append((max(0.0, forget - goal) + max(0.0, start - utility), names, s))
        if chosen:
            _, names, s = min(chosen, key=lambda c: c[0])
            put(names, s)
    return e.patch


def joined(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """The named tensors as one."""
    return tensors[names[0]] if len(names) == 1 else torch.cat([tensors[n].flatten() for n in names])
