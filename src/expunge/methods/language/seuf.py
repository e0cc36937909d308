"""SEUF (UOE): forget in the one expert that the forget set is routed to most, while the router is held to it.

Paper    Zhuang et al., "SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?", ACL 2025, arXiv:2411.18797.
Code     zhmzm/SEUF, Apache-2.0, commit 5a5fdee.
Forgets  records.          Needs    forget; retain unless retain=none. A mixture-of-experts model.
Scope    the expert with the highest affinity (mean router probability of the forget set) of all layers, and the router of its layer.
Forget   ga or npo, + pin * mean over forget tokens of || g - a ||^2, g the router's probabilities, a one at the expert and zero elsewhere.
Retain   ce, kl or none.   Update  AdamW on paired batches, all other experts and routers bitwise frozen.   Leaves  Replace.
Settings
    loss    ga (-CE) or npo
    beta    of npo
    pin     weight of the anchor || g - a ||^2, inside what `gamma` weighs
    anchor  sum: over the experts (the paper); mean: over the experts, E times smaller (the code)
Differs  The code has layer and expert as constants and no affinity pass; `layers` names mixture-of-experts layers to choose from. It averages the anchor
         over padding too; here forget tokens alone count, each record alike. Its NPO takes the current model as reference, which is ga; here the
         reference is the model as it was. Affinity is that of the full softmax, also for routers that gate by sigmoid. Several experts at once,
         which the paper finds worse, are left out, and so is stopping at a target: use validation. Affinity wants 100,000 forget tokens or more.
         Layer, expert and affinity stand in the patch's meta data.
Check
    >>> import torch
    >>> logits = torch.zeros(1, 1, 4, requires_grad=True)
    >>> value = pinned(logits.softmax(-1), torch.tensor([1]), 1)
    >>> value, torch.autograd.grad(value, logits)[0].flatten(), pinned(logits.softmax(-1), torch.tensor([1]), 1, "mean")
    (tensor([0.7500], grad_fn=<DivBackward0>), tensor([ 0.1250, -0.3750,  0.1250,  0.1250]), tensor([0.1875], grad_fn=<DivBackward0>))
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ScopeError, SettingError, suggest
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.experts import Layer, affinity, expert, layers, probabilities, real_mean, watched
from expunge.modalities.language.remember import sequence_nll
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.losses import language as losses

LOSSES, ANCHORS = ("ga", "npo"), ("sum", "mean")


def pinned(g: Tensor, n: Tensor, target: int, anchor: str = "sum") -> Tensor:
    """(B,) mean over the first n tokens of the sum (or mean) over experts of (g - a)^2, for router probabilities g (B, T, E)."""
    a = F.one_hot(n.new_tensor(target), g.shape[-1]).to(g)
    off = (g - a).square()
    return real_mean(off.sum(-1) if anchor == "sum" else off.mean(-1), n)


def chosen(found: list[Layer], scores: Tensor, pattern: str) -> tuple[int, int]:
    """(layer, expert) of the highest affinity (L, E) among the layers whose name holds a match of the pattern; ties go to the first."""
    try:
        open_ = [k for k, layer in enumerate(found) if re.search(pattern, layer.name)]
    except re.error as error:
        raise ScopeError(f"layers '{pattern}' is no regular expression: {error}") from None
    if not open_:
        raise ScopeError(f"no mixture-of-experts layer fits layers '{pattern}'; they are {found[0].name} to {found[-1].name}")
    k, index = divmod(int(scores[open_].argmax()), scores.shape[1])
    return open_[k], index


def _cost(n, s) -> tuple[float, float]:
    return cost(once=2.0 if s["loss"] == "npo" else 1.0)(n, s)


@method(
    paper="arXiv:2411.18797",
    tasks=("causal_lm",),
    needs=("forget",),
    cost=_cost,
    toy={"lr": 2e-3, "epochs": 10, "batch_size": 4},
    forgets=("records",),
    twin="moe",
    accepts=layers,
    published={"accumulate": 4},
    place="code: zhmzm/SEUF, GA (the anchor's form is the paper's)",
    lacks="it stands in no committed table of a valid world: it needs a mixture of experts",
)
def seuf(
    model: nn.Module, task: Task, split: Split, *, loss: str = "ga", beta: float = 0.1, pin: float = 1.0, anchor: str = "sum",
    tuning: Tuning = Tuning(epochs=10.0, lr=2e-4, batch_size=32, warmup=0.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    for what, value, known in (("loss", loss, LOSSES), ("anchor", anchor, ANCHORS)):
        if value not in known:
            raise SettingError(suggest(f"seuf has no {what}", value, known))
    if tuning.lora:
        raise SettingError(f"seuf moves one expert's own weights, which LoRA never writes: set lora to 0, not {tuning.lora}")
    found = layers(model)
    scores = affinity(model, task, split.forget)
    number, index = chosen(found, scores, tuning.layers)
    layer, reference = found[number], sequence_nll(model, task, split.forget) if loss == "npo" else None

    def forget(batch) -> Tensor:
        with watched(model, [layer]) as caught:
            out = task.forward(model, batch)
        g = probabilities(model, layer, caught[layer.name], batch)
        away = -losses.pooled(out.nll, out, batch) if reference is None else losses.npo(out, reference[batch["i"]], beta=beta).mean()
        return away + pin * pinned(g, batch["n"], index, anchor).mean()

    patch = tune(model, task, split, forget, tuning, seed=seed, scope=expert(model, number, index))
    return replace(patch, meta={**patch.meta, "layer": layer.name, "expert": index, "affinity": round(float(scores[number, index]), 6)})
