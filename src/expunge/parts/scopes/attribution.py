"""Attribution: the weights that matter to what must go and not to what must stay. Source: card wagle, steps 1 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError, suggest
from expunge.core.types import Data, Out, Scope, Task
from expunge.parts.scopes.saliency import gradient_sum, top

FORMS = ("paper", "published")
PUBLISHED = 1e-6
"""The released value of mu."""


def attributed(
    theta: Mapping[str, Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], *, form: str = "paper", mu: float = 0.0
) -> dict[str, Tensor]:
    """Score of each weight from g_f and g_r, its gradients of the loss on forget and on retain data, in float32.

    paper       s = theta g_f - (1 / mu) g_r g_f      signed: where both gradients point the same way, the second term lowers the score
    published   s = | (theta - g_r / mu) g_f |        with mu = 1e-6 the order is that of |g_r g_f|: what both sets need comes first
    mu          the paper's gamma, a curvature. 0: for `paper` the value at which both terms have the same mean size, for `published` 1e-6

    >>> theta, f, r = ({"w": torch.tensor(v)} for v in ((1.0, -2.0, 0.5), (0.2, 0.1, -0.4), (0.01, -0.3, 0.02)))
    >>> attributed(theta, f, r, mu=1.0)["w"], attributed(theta, f, r, form="published", mu=1.0)["w"]
    (tensor([ 0.1980, -0.1700, -0.1920]), tensor([0.1980, 0.1700, 0.1920]))
    >>> [round(s, 1) for s in attributed(theta, f, r, form="published")["w"].tolist()]
    [1999.8, 29999.8, 7999.8]
    """
    if form not in FORMS:
        raise SettingError(suggest("no form", form, FORMS))
    if mu < 0:
        raise SettingError(f"mu must be 0 or larger, not {mu:g}")
    if not mu:
        mu = PUBLISHED if form == "published" else _balance(theta, forget, retain)
    scores = {n: (theta[n].detach().to(_wide(g)) - retain[n].to(_wide(g)) / mu) * g.to(_wide(g)) for n, g in forget.items()}
    return scores if form == "paper" else {n: s.abs() for n, s in scores.items()}


def _balance(theta: Mapping[str, Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> float:
    """sum |g_r g_f| / sum |theta g_f|; 1 where either is 0 and the order does not depend on it."""
    kept, gone = (sum(float((values[n].detach().double() * g.double()).abs().sum()) for n, g in forget.items()) for values in (retain, theta))
    return kept / gone if kept > 0 and gone > 0 else 1.0


def attribution(
    model: nn.Module, task: Task, forget: Data, retain: Data, *, keep: float, form: str = "paper", mu: float = 0.0, size: int = 8,
    names: Iterable[str] | None = None, buffers: str = "move",
) -> Scope:  # fmt: skip
    """The share `keep` of all weights (of the parameters `names`), ranked together by `attributed`. One pass over each set in eval mode.

    Gradients are those of the mean loss per target token of the whole set for `paper`, which no batch size changes, and sums over batches of the
    gradients of batch means for `published`, as released: there g_r / mu grows with the number of batches while theta does not.
    """
    if not 0 < keep <= 1:
        raise SettingError(f"keep must be in (0, 1], not {keep}")
    chosen = None if names is None else set(names)

    def gradients(data: Data) -> dict[str, Tensor]:
        found = gradient_sum(model, task, task.batches(data, size), _total if form == "paper" else _mean)
        units = sum(int(t[1:].sum()) for t in data.targets) if form == "paper" else 1
        return {n: g / units for n, g in found.items() if chosen is None or n in chosen}

    theta = dict(model.named_parameters())
    return top(attributed(theta, gradients(forget), gradients(retain), form=form, mu=mu), keep, buffers)


def _total(out: Out) -> Tensor:
    return out.nll.sum()


def _mean(out: Out) -> Tensor:
    return out.nll.sum() / out.count.sum()


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
