"""SPM: an adapter of rank 1 learns to point away from a concept, and acts on a prompt by as much as the prompt is about that concept.

Paper    Lyu et al., "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications", CVPR 2024, arXiv:2312.16145.
Code     Con6924/SPM, Apache-2.0.
Forgets  concept.          Needs    forget (its prompts alone); retain sets where the gate is closed, and gives real anchors (anchoring=retain).
Scope    new adapters W x + gamma (1 / r) B A x on linear and convolutional layers of the UNet; no weight of the model moves.
Forget   || e(x_t, t, c) - (e0 - eta (ec - e0)) ||^2 with the adapter on, on states x_t of the frozen model's own trajectories.
Retain   latent anchoring, la || e_on(x_t, t, c~) - e_off(x_t, t, c~) ||^2 on prompts c~ drawn likelier the less they resemble c; gamma = 0 at retained prompts.
Update   Adam.   Leaves  Hook (a filter, not a deletion: the weights still hold the concept, and whoever takes the guard off has it back).
Settings
    part          layers of the UNet that are adapted: attentions (whole transformer blocks, as published), xattn, noxattn, unet, or a pattern
    rank          r of the adapters
    eta           how far to point away; 0 redirects to the empty prompt
    la            weight of the anchoring; 0 leaves it out, 1000 is that of the code, at 30 times as many updates
    anchors       prompts c~ per state
    anchoring     c~: random (embeddings of the length of c's, as published) or retain (the different retained prompts)
    calibrate     the gate is closed for retained prompts: it opens above their largest cosine, and words they use are no words of the concept; false is the
                  published gate, the cosine as it is, which every prompt opens a little, with any word that all prompts of the concept share
    steps         updates
    batch_size    states per update
    lr            step size of Adam
    guidance      of the trajectories, other than 1
    trajectories  of the frozen model, over the concept's different prompts; 0: one for each of these, 20 to 256
    path          states per trajectory
Differs  The code samples some steps anew for each update with the adapter on; here all states are those of a few frozen trajectories, drawn once, and an
         update takes many, with one c~ each instead of four c~ for one state. Adam without warm-up or restarts. The code scales A, B and alpha of each adapter
         by gamma and adds them up, which squares gamma for one adapter and mixes several: here each adapter is gated once (the paper's operator). The
         concept's tokens are those that all its prompts share, padding left out; every prompt of it is a name that the cosine is taken to. The calibrated
         gate is open half way from the largest retained cosine to 1, since the adapter learns at gamma = 1 and half of it does little. The empty prompt
         beside a guided one is gated by itself. An adapter is trained with earlier guards off, so that each can be taken off alone.
Check
    >>> import torch
    >>> from torch import nn
    >>> from expunge.parts.adapters import product
    >>> x, up, down = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.1], [-0.2]]), torch.ones(1, 2)
    >>> torch.cat([x + g * product(nn.Linear(2, 2), x, up, down) for g in (0.0, 0.5, 1.0)])
    tensor([[1.0000, 2.0000],
            [1.1500, 1.7000],
            [1.3000, 1.4000]])
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.edits import Hook
from expunge.core.errors import Diverged, ScopeError, SettingError
from expunge.core.guard import quiet
from expunge.core.hooks import Guarded, bare
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Session
from expunge.core.types import Batch, Split, device_of, drawn
from expunge.methods.diffusion.esd import negated
from expunge.modalities.diffusion.guards.permeable import cosine
from expunge.modalities.diffusion.task import states
from expunge.modalities.diffusion.trajectory import distinct, lines, pool, worked
from expunge.parts.adapters import adapt
from expunge.parts.scopes import attention
from expunge.parts.updates.descend import HALF, descend

ANCHORING = ("random", "retain")
OPENS, OPEN = 0.05, 0.5
"""Shares of the way from the largest cosine of a retained prompt to 1 at which the gate begins to open, and is open."""
ON = {"weight": torch.ones(1)}


def _cost(n, s) -> tuple[float, float]:
    size = lines(n, s) * s["path"]
    seen, anchors = drawn(size, s["batch_size"], s["steps"]), s["anchors"] if s["la"] else 0
    return 2 * size + seen * (1 + 2 * anchors), seen * (1 + anchors)


def _asks(s) -> dict[str, str]:
    return {"retain": "anchoring=retain needs retain data; give some, or set anchoring=random"} if s["anchoring"] == "retain" and s["la"] else {}


@method(
    paper="arXiv:2312.16145", tasks=("diffusion",), needs=("forget",), forgets=("class",), cost=_cost, asks=_asks,
    toy={"steps": 60, "trajectories": 10}, assurance="suppression",
    published={"la": 1000.0, "anchors": 4, "calibrate": False, "steps": 3000, "batch_size": 1, "lr": 0.0001, "path": 30},
    place="code: yaml configurations and src/",
    lacks="on shapes it leaves four of ten of the erased objects (UA 58.9) and the style under its other names",
)  # fmt: skip
def spm(
    model: nn.Module, task: Any, split: Split, *, part: str = "attentions", rank: int = 1, eta: float = 1.0, la: float = 10.0, anchors: int = 1,
    anchoring: str = "random", calibrate: bool = True, steps: int = 100, batch_size: int = 32, lr: float = 1e-2, guidance: float = 3.0,
    trajectories: int = 0, path: int = 25, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if anchoring not in ANCHORING:
        raise SettingError(f"anchoring must be one of {', '.join(ANCHORING)}, not '{anchoring}'")
    if rank < 1 or anchors < 1:
        raise SettingError(f"rank and anchors must be 1 or larger, not {rank} and {anchors}")
    if task.null is None or guidance == 1:
        raise SettingError("spm points away from the concept, towards the empty prompt: the task needs its tokens, and guidance must not be 1")
    with bare(model):
        features, config = gate(model, task, split, calibrate)
        gone, pooled = pool(model, task, split.forget, trajectories, guidance=guidance, steps=path, seed=seed)
        worked(split.forget, gone.tokens, len(gone))
        with quiet(model):
            table = states(model, gone.tokens)
            others = states(model, distinct(split.retain)[0].tokens) if anchoring == "retain" and la else None
        with adapters(model, part, rank) as (e, it):

            def loss(b: Batch) -> Tensor:
                c = table[b["i"].to(table.device)]
                erase, anchor = losses(task, model, it, b, c, surrogates(c.repeat(anchors, 1, 1), others) if la else c[:0], eta)
                return erase + la * anchor

            e.eval()
            descend(e, loss, pooled.batches(gone, batch_size, steps, seed), lr=lr, optimizer="adam")
    tensors = {n: p.detach().clone() for n, p in e.params.items()}
    if not any(bool(t.any()) for n, t in tensors.items() if n.endswith(".up")):
        return Patch(())
    return Patch((Hook(f"spm-{split.forget.digest[:8]}", "permeable", {**tensors, "features": features}, {**config, "scale": 1 / rank}),))


def losses(task: Any, model: nn.Module, it: Guarded, b: Batch, c: Tensor, fake: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """L_erase of states under their prompts' c (B, L, D), and L_anchor of the same states under k prompts each, fake (k B, L, D); 0 without any."""
    n, k = len(c), len(fake) // len(c)
    again = {name: b[name].repeat(k, *[1] * (b[name].ndim - 1)) for name in ("xt", "t", "i")} | {"states": fake}
    off = fake.new_zeros(0)
    if k:
        it.now = {}
        with torch.no_grad():
            off = task.forward(model, again).pred
    it.now = ON
    on = task.forward(model, {name: torch.cat([c if name == "states" else b[name], again[name]]) for name in again}).pred
    it.now = {}
    erase = (on[:n] - negated(b["null"], b["cond"], eta).to(on)).square().mean()
    return erase, (on[n:] - off).square().mean() if k else erase.new_zeros(())


def surrogates(c: Tensor, others: Tensor | None = None) -> Tensor:
    """(B, L, D) prompts that stand for all others, likelier the less they resemble c (B, L, D): accepted by min(1, 1 - cosine). Random ones have 0.8 to 1.2
    times the norm of c; with `others` (P, L, D), they are rows of it."""
    if others is not None:
        return others[(1 - cosine(c, others)).clamp(1e-6, 1).multinomial(1).squeeze(1)]
    flat, left = c.detach().float().cpu().flatten(1), torch.arange(len(c))
    noise = torch.zeros_like(flat)
    while len(left):
        noise[left] = F.normalize(torch.randn(len(left), flat.shape[1]), dim=1)
        near = F.cosine_similarity(noise[left], flat[left], dim=1)
        left = left[torch.rand(len(left)) >= 1 - near]
    return (noise * flat.norm(dim=1, keepdim=True) * (0.8 + 0.4 * torch.rand(len(flat), 1))).view(c.shape).to(c)


def gate(model: nn.Module, task: Any, split: Split, calibrate: bool) -> tuple[Tensor, dict[str, Any]]:
    """(J, L, D) states of the concept's prompts, and the names and bounds of the cosine of `modalities.diffusion.guards.permeable`."""
    forget, _ = distinct(split.forget)
    special = set(task.null.tolist())
    own = [set(row) - special for row in forget.tokens.tolist()]
    neutral, top, bounds = task.null[None], 0.0, (0.0, 1.0)
    with quiet(model):
        features = states(model, forget.tokens)
        if calibrate:
            if split.retain is not None:
                neutral = torch.cat([neutral, distinct(split.retain)[0].tokens])
            own = [name - set(neutral.flatten().tolist()) for name in own]
            top = max(0.0, float(cosine(states(model, neutral), features).max()))
            if top > 1 - 1e-4:
                raise SettingError("a retained prompt, or the empty one, is a prompt of the concept: the gate cannot tell them apart")
            bounds = OPENS, OPEN
    shared = set.intersection(*own)
    names = sorted({tuple(sorted(name)) for name in ([shared] if shared else own) if name})
    threshold, full = (top + b * (1 - top) for b in bounds)
    return features, {"names": [list(name) for name in names], "threshold": threshold, "full": full}


def adaptable(model: nn.Module, part: str) -> list[str]:
    """Names of the UNet's linear layers and convolutions whose weights a part holds. Raises ScopeError when there are none."""
    modules = dict(model.named_modules())
    found = [n.removesuffix(".weight") for n in attention.part(model, part).masks if n.startswith("unet.") and n.endswith(".weight")]
    plain = [n for n in found if isinstance(modules[n], nn.Linear) or (isinstance(m := modules[n], nn.Conv2d) and m.groups == 1 and m.padding_mode == "zeros")]
    if not plain:
        raise ScopeError(f"no linear layer and no convolution of the unet fits '{part}'")
    return plain


@contextlib.contextmanager
def adapters(model: nn.Module, part: str, rank: int) -> Iterator[tuple[Session, Guarded]]:
    """A session whose parameters are new adapters, A random and B zero, that act while `now` of the guard is ON; the model is left as it was. The global RNG
    draws A. Adapters are float32 under half-precision weights."""
    params: dict[str, nn.Parameter] = {}
    for name in adaptable(model, part):
        weight: Any = model.get_submodule(name).weight
        kind = torch.float32 if weight.dtype in HALF else weight.dtype
        down = nn.init.kaiming_uniform_(torch.empty(rank, weight[0].numel()), a=math.sqrt(5))
        for side, value in (("up", torch.zeros(len(weight), rank)), ("down", down)):
            params[f"{name}.{side}"] = nn.Parameter(value.to(device_of(model), kind))
    it = Guarded(Hook("spm", "permeable", params, {"scale": 1 / rank}))
    session = Session(model, params, dict.fromkeys(params), judged=False)
    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    handles: list[Any] = []
    try:
        model.requires_grad_(False)
        handles += adapt(model, it)
        yield session, it
        guard.current().settle(session)
        for name, p in params.items():
            if not torch.isfinite(p).all():
                raise Diverged(f"{name} holds values that are not finite; lower lr or set clip")
    finally:
        for handle in handles:
            handle.remove()
        for p, required in flags:
            p.requires_grad_(required)
        for module, mode in modes:
            module.training = mode
