"""AdvUnlearn: before each update an attack looks for words that bring the concept back, and the update makes the model point away from it under these.

Paper    Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models", NeurIPS 2024.
Code     OPTML-Group/AdvUnlearn, CC-BY 4.0.
Forgets  concept.          Needs    forget and retain (their prompts alone).
Scope    the text encoder, or another part of the model (`part`).   Forget  || e(x_t, t, [delta; c]) - (e0 - eta (ec - e0)) ||^2 at words delta before the
         prompt that an attack found: delta minimises || e(x_t, t, [delta; c]) - ec ||^2.   Retain  alpha || e(x_t, t, r) - e*(x_t, t, r) ||^2.
Update   min-max: `inner` steps on delta with the weights at rest, one of Adam on the weights (see `bilevel`).   Leaves  Replace.
Settings
    part          text (the text encoder, which fits into other models that share it), xattn, unet, or a pattern
    eta           how far to point away, as in esd
    alpha         weight of the retained prompts' outputs
    tokens        words that the attack puts before the prompt
    attack        adam; sign (Adam on the sign of the gradient, fast_at); nearest (adam, and then each embedding becomes that of the nearest word)
    start         where an attack starts: random (at random words) or latest (where the last one ended)
    copies        attacks at a time, each on its share of the batch
    inner         steps of an attack
    inner_lr      their step size
    every         updates per attack
    warmup        share of the updates at the start that have no attack
    steps         updates
    batch_size    states per update (of each part) and per step of an attack
    lr            step size of Adam
    guidance      of the trajectories
    trajectories  of the frozen model, over the concept's different prompts (and as many over retained ones); 0: one for each of these, 20 to 256
    path          states per trajectory
Differs  The code draws up to 50 guided states anew for every step of attack and update; here both take theirs from a few frozen trajectories. Its attack
         sums gradients over all of its steps and leaves the last one out, here each step has its own. Times are paired rightly (see esd). The code has one
         attack at a time; here `copies` of them share the batch. Separate steps for retained prompts (its mode iter) are left out. It guards the encoder
         that was trained alone: with the old encoder put back the concept is back.
         Published: 1 token, alpha 0.3 (1 in its code), 30 steps of 1e-3 per attack, 1000 updates.
Check
    >>> import torch
    >>> e0, ec = torch.tensor([0.0]), torch.tensor([1.0])
    >>> [float((w * (1.0 + d) - negated(e0, ec, 1.0)) ** 2) for w, d in ((1.0, 0.0), (1.0, -0.5), (-1.0, 0.0))]
    [4.0, 2.25, 0.0]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Paired, Split, drawn
from expunge.methods.diffusion.esd import negated
from expunge.modalities.diffusion.task import embedded_states, roomy, word_table
from expunge.modalities.diffusion.trajectory import cost as followed
from expunge.modalities.diffusion.trajectory import lines, pool, squared, worked
from expunge.parts.scopes import attention
from expunge.parts.updates.bilevel import attacked, attacks, bilevel, seek

ATTACKS, STARTS = ("adam", "sign", "nearest"), ("random", "latest")


def cost(n, s) -> tuple[float, float]:
    """Passes of the pools and updates, and of the attacks."""
    forward, backward = followed(n, s)
    inner = drawn(lines(n, s) * s["path"], s["batch_size"], s["inner"] * attacks(s["steps"], round(s["warmup"] * s["steps"]), s["every"]))
    return forward + inner, backward + inner


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Embeddings (..., W) replaced by the nearest row of (V, W).

    >>> nearest(torch.tensor([[0.9, 0.2]]), torch.eye(2))
    tensor([[1., 0.]])
    """
    flat = x.flatten(0, -2)
    return table[torch.cdist(flat, table.to(flat)).argmin(1)].to(x).view_as(x)


@method(
    paper="NeurIPS 2024", tasks=("diffusion",), needs=("forget", "retain"), forgets=("class",), cost=cost,
    toy={"steps": 40, "trajectories": 10},
    published={"alpha": 0.3, "tokens": 1, "start": "random", "inner": 30, "inner_lr": 0.001, "steps": 1000, "lr": 1e-05, "path": 50},
    place="code: README and train-scripts/AdvUnlearn.py",
    lacks="at its defaults it costs 9 to 27 points of what must stay; with part=xattn it holds on text2digit and costs 15 to 28 points on shapes",
)  # fmt: skip
def advunlearn(
    model: nn.Module, task: Any, split: Split, *, part: str = "text", eta: float = 1.0, alpha: float = 1.0, tokens: int = 2, attack: str = "adam",
    start: str = "latest", copies: int = 4, inner: int = 4, inner_lr: float = 0.1, every: int = 1, warmup: float = 0.2, steps: int = 120,
    batch_size: int = 32, lr: float = 1e-3, guidance: float = 3.0, trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    for name, value, known in (("attack", attack, ATTACKS), ("start", start, STARTS)):
        if value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, not '{value}'")
    if tokens < 1 or copies < 1 or inner < 0 or not 0 <= warmup <= 1:
        raise SettingError(f"tokens and copies must be at least 1, inner at least 0, warmup in 0..1; found {tokens}, {copies}, {inner} and {warmup:g}")
    if not bool(roomy(split.forget.tokens, tokens).all()):
        raise SettingError(f"{tokens} words more do not fit into every prompt of forget: choose fewer tokens, or shorter prompts")
    scope, table, idle = attention.part(model, part), word_table(model), round(warmup * steps)
    gone, states = pool(model, task, split.forget, trajectories, guidance=guidance, steps=path, seed=seed)
    worked(split.forget, gone.tokens, len(gone))
    streams = [states.batches(gone, batch_size, steps, seed)]
    if alpha:
        kept, others = pool(model, task, split.retain, len(gone), guidance=guidance, steps=path, seed=seed + 1)
        streams.append(others.batches(kept, batch_size, steps, seed + 1))
    tries = states.batches(gone, batch_size, max(1, inner * attacks(steps, idle, every)), seed + 2)

    def under(batch: Batch, delta: Tensor | None) -> Batch:
        """The batch with the attacks' words before its prompts, in turn."""
        if delta is None:
            return batch
        return {**batch, "states": embedded_states(model, batch["y"], delta[torch.arange(len(batch["y"])) % copies])}

    def attacking(delta: Tensor, number: int) -> Tensor:
        if start == "random" or number == 0:
            delta = table.weight.detach()[torch.randint(len(table.weight), (copies, tokens))].float()

        def regained(d: Tensor, k: int) -> Tensor:
            batch = tries[number * inner + k]
            return squared(task, model, under(batch, d), batch["cond"]).mean()

        found = seek(regained, delta, steps=inner, lr=inner_lr, sign=attack == "sign")
        return nearest(found, table.weight.detach()) if attack == "nearest" else found

    def loss(parts: tuple[Batch, ...], delta: Tensor | None) -> Tensor:
        f, *rest = parts
        value = squared(task, model, under(f, delta), negated(f["null"], f["cond"], eta)).mean()
        for r in rest:
            value = value + alpha * squared(task, model, r, r["cond"]).mean()
        return value

    delta = torch.zeros(copies, tokens, table.embedding_dim, device=table.weight.device)
    with attacked(model, scope, delta) as e:
        e.eval()
        bilevel(e, attacking, loss, Paired(*streams), delta, idle=idle, every=every, lr=lr, optimizer="adam")
    return e.patch
