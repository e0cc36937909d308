"""MACE: the words around a concept forget it in closed form, a small adapter per concept turns attention away from its own words, and all are fused.

Paper    Lu et al., MACE, Mass Concept Erasure, CVPR 2024.
Code     Shilin-LU/MACE, NTUITIVE non-commercial.
Forgets  concept.          Needs    forget (of one concept: the cost is that of one, and k of them cost k times as much) and anchor (row by row, what to draw
         instead); retain where it is there.
Scope    keys and values of all cross-attention layers.
Forget   1. W' c = W g, c the states of all places of a concept's prompts but its own words, g those of the same words and end tokens of the anchor's prompt.
         2. LoRA B_i A_i for each concept i, on noised pictures of it: sum over the layers of || attention probabilities of its words, inside a mask ||_F.
         3. W'' c_i = (W' + B_i A_i) c_i, c_i the states of all places of the prompts of concept i.
Retain   in 1 and 3 W'' r = W r on all states of retained prompts, and lam times the squared distance from the weights before.
Update   closed form, Adam, closed form.   Leaves  Replace.
Settings
    preserve      weight of each state of a retained prompt, against 1 for a concept's; 0 leaves them out
    lam           weight of staying where the weights are
    most          retained prompts at most, drawn by seed
    rank          of the adapters
    mask          inside is where attention to the concept's words is at least this share of its peak; 0 is the whole picture, as published for styles
    focus         draw times by sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400)); off, all alike, as published for explicit content
    steps         updates of each adapter; 0 leaves the adapters out
    batch_size    noised pictures per update
    lr            step size of Adam
    guidance      of the trajectories that end in a concept's pictures
    trajectories  of the frozen model for each concept; 0: one for each of its different prompts, 8 to 256
    path          steps per trajectory
Differs  The code masks by a segmentation of its pictures: in its place stands the attention of the model before the adapter, layer by layer (mask). It makes 30
         wordings of each pair: here the prompts of the request are taken. Its preserved statistics are those of captions and of the concept's domain: here the
         retained prompts'. Concepts are told apart by the words that the anchor's prompts have not. The times of a flow hold less noise than those
         that focus was made for, and what is drawn is settled before: so it is off here. Published for objects: focus, lr
         1e-5, 50 steps, lam 1000, preserve 0; for people: focus, lr 1e-4, lam 0, preserve 1e-4 for each state of the captions.
Check
    >>> frobenius(torch.tensor([[0.3, 0.4], [0.0, 0.0]])[None, None], torch.tensor([[True, True]]), torch.tensor([[True, True]]))
    tensor([0.5000])
    >>> [round(float(v), 4) for v in importance(torch.tensor([200.0, 300.0, 400.0, 999.0]))]
    [0.5, 0.9866, 0.5, 0.0]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.edits import LowRank
from expunge.core.errors import ModelError, SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Batch, Batches, Scope, Split, device_of, drawn
from expunge.methods.diffusion.trce import beside
from expunge.methods.diffusion.uce import preserved
from expunge.modalities.diffusion.task import T
from expunge.modalities.diffusion.trajectory import MANY, lines, many, opened, pool, worked
from expunge.modalities.pictures import Pictures
from expunge.parts.scopes.attention import part
from expunge.parts.scopes.lora import off
from expunge.parts.updates.descend import descend
from expunge.parts.updates.ridge import Ridge, redirect

FEW = 8
"""Trajectories of a concept with fewer prompts."""


def importance(t: Tensor) -> Tensor:
    """Weight of a time: 0.9866 at 300, half at 200 and 400."""
    return (0.05 * (t - 200)).sigmoid() - (0.05 * (t - 400)).sigmoid()


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, each pass leaves the queries (B, N, C) and keys (B, L, C) of every cross-attention layer under its name. Raises ModelError without any."""
    seen: dict[str, list[Tensor]] = {}
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if n.endswith("attn2") and hasattr(m, "to_q") and hasattr(m, "to_k")}
    if not layers:
        raise ModelError(f"{type(model).__name__} has no cross-attention named attn2 with to_q and to_k")

    def keeper(name: str, place: int):
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen.setdefault(name, [output, output])[place] = output

        return keep

    hooks = [getattr(m, key).register_forward_hook(keeper(n, k)) for n, m in layers.items() for k, key in enumerate(("to_q", "to_k"))]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def probabilities(model: nn.Module, seen: dict[str, list[Tensor]]) -> list[Tensor]:
    """Per layer (B, heads, N, L): softmax of q k^T / sqrt(width of a head), in float32."""
    out = []
    for name, (q, k) in seen.items():
        layer: Any = model.get_submodule(name)
        q, k = (v.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for v in (q, k))
        out.append((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1))
    return out


def inside(probs: Tensor, own: Tensor, share: float) -> Tensor:
    """(B, N) bool: where attention (B, heads, N, L) to the words own (B, L) is at least `share` of its largest.

    >>> inside(torch.tensor([[0.4, 0.6], [0.1, 0.9]])[None, None], torch.tensor([[True, False]]), 0.5)
    tensor([[ True, False]])
    """
    found = (probs.mean(1) * own[:, None]).sum(2)
    return found >= share * found.amax(1, keepdim=True)


def frobenius(probs: Tensor, own: Tensor, where: Tensor) -> Tensor:
    """(B,) norm of the probabilities (B, heads, N, L) of the words own (B, L) at the places where (B, N), all heads together."""
    return (probs * own[:, None, None] * where[:, None, :, None]).flatten(1).norm(dim=1)


def concepts(tokens: Tensor, own: Tensor) -> list[Tensor]:
    """Rows of prompts (N, L) for each concept, told apart by its own words (N, L) bool.

    >>> concepts(torch.tensor([[1, 7], [2, 7], [1, 8]]), torch.tensor([[False, True]] * 3))
    [tensor([0, 1]), tensor([2])]
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for k, (row, mine) in enumerate(zip(tokens, own, strict=True)):
        if bool(mine.any()):
            found.setdefault(tuple(row[mine].tolist()), []).append(k)
    return [torch.tensor(rows) for rows in found.values()]


def pictured(model: nn.Module, task: Any, data: Pictures, n: int, guidance: float, path: int, seed: int) -> Pictures:
    """n pictures that the model draws for the prompts of `data`: where its trajectories end."""
    named, at = pool(model, task, data, many(n, data.different, FEW), guidance=guidance, steps=path, seed=seed)
    rows = (at.t == at.t.min()).nonzero().squeeze(1)
    x, _ = task.schedule.parted(at.xt[rows], at.null[rows] + guidance * (at.cond[rows] - at.null[rows]), at.t[rows])
    i = at.i[rows]
    return Pictures(x, named.tokens[i], named.ids[i], tuple(named.rows[k] for k in i.tolist()))


def suppressed(model: nn.Module, task: Any, batches: Sequence[Batch], names: Sequence[str], rank: int, mask: float, lr: float) -> dict[str, Tensor]:
    """Weight name -> B A (O, I) in float64 of the adapter that turns attention away from the words `own` of each batch."""

    def loss(batch: Batch) -> Tensor:
        own, before = batch["own"].to(device_of(model)), []
        if mask:
            with off(model), torch.no_grad():
                task.forward(model, batch)
                before = probabilities(model, seen)
        task.forward(model, batch)
        guard.current().meter.add(backward=len(batch["i"]))  # the loss reads attention, not the prediction, where passes are counted
        found = probabilities(model, seen)
        where = [inside(p, own, mask) for p in before or found]
        return torch.stack([frobenius(p, own, w) for p, w in zip(found, where, strict=True)]).sum(0).mean()

    with opened(model, Scope(dict.fromkeys(names)), rank, alpha=float(rank)) as e, watched(model) as seen:
        e.eval()
        descend(e, loss, batches, lr=lr, optimizer="adam")
    return {x.name: x.scale * x.up.double() @ x.down.double() for x in e.patch.edits if isinstance(x, LowRank)}


def cost(n, s) -> tuple[float, float]:
    """Passes for one concept: its trajectories, and the updates, each with one pass more for a mask."""
    if not s["steps"]:
        return 0, 0
    each = lines(n, s, least=FEW)
    seen = drawn(each, s["batch_size"], s["steps"])
    return (1 if s["guidance"] == 1 else 2) * each * s["path"] + seen * (2 if s["mask"] else 1), seen


@method(
    paper="CVPR 2024", tasks=("diffusion",), needs=("forget", "anchor"), forgets=("class",), cost=cost, toy={},
    published={"preserve": 0.0, "lam": 1000.0, "focus": True, "steps": 50, "batch_size": 1, "lr": 1e-05}, place="code: configs, objects",
    lacks="on shapes it erases the style on one seed of three (UA 3.33 to 100)",
)  # fmt: skip
def mace(
    model: nn.Module, task: Any, split: Split, *, preserve: float = 0.3, lam: float = 0.1, most: int = 1000, rank: int = 1, mask: float = 0.5,
    focus: bool = False, steps: int = 100, batch_size: int = 8, lr: float = 1e-2, guidance: float = 3.0, trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if not 0 <= mask < 1:
        raise SettingError(f"mask must be at least 0 and below 1, not {mask:g}")
    bad, tokens, _, c, g, to = beside(model, task, split)
    own, each = to < 0, concepts(tokens, to < 0)
    g = g.gather(1, to.clamp(min=0).to(g.device)[..., None].expand_as(g))
    kept = preserved(model, split.retain, most if preserve else 0, seed)
    stay = [] if kept is None else [(kept, kept, preserve)]
    drawings = [pictured(model, task, bad.take(k), trajectories, guidance, path, seed + j) if steps else bad.take(k) for j, k in enumerate(each)]
    worked(split.forget, torch.cat([d.tokens for d in drawings]) if drawings else bad.tokens[:0], len(drawings[0]) if drawings and steps else MANY)
    words = {row.numpy().tobytes(): mine for row, mine in zip(bad.tokens, own, strict=True)}
    times = importance(torch.arange(T)) if focus else torch.ones(T)

    def collate(data: Pictures, index: Tensor, generator: torch.Generator) -> Batch:
        """Pictures with noise, and which of their prompts' words are the concept's."""
        x, y = data.x[index], data.tokens[index]  # pyright: ignore[reportOptionalSubscript]
        t = torch.multinomial(times, len(index), replacement=True, generator=generator).float()
        noise = torch.randn(x.shape, generator=generator)
        return {"xt": task.schedule.noised(x, noise, t), "t": t, "y": y, "i": index, "own": torch.stack([words[row.numpy().tobytes()] for row in y])}

    with edit(model, part(model, "xattn-kv")) as e:
        was = {n: W.detach().clone() for n, W in e.params.items()}
        redirect(e.params.values(), [(c[~own], g[~own], 1.0), *stay], lam)
        if steps:
            runs = [Batches(collate, x, batch_size, epochs=steps / -(-len(x) // batch_size), seed=seed) for x in drawings]
            moved = [suppressed(model, task, b, list(e.params), rank, mask, lr) for b in runs]
            inputs = [c[k].flatten(0, 1) for k in each]
            ridge = Ridge([(x, 1.0) for x in inputs] + [(r, w) for r, _, w in stay], lam)
            with torch.no_grad():
                for n, W in e.params.items():
                    values = [x.double() @ (W.double() + d.get(n, 0)).T for x, d in zip(inputs, moved, strict=True)]
                    W.copy_(ridge.edit(W, values + [r.double() @ was[n].double().T for r, _, _ in stay]))
    return e.patch
