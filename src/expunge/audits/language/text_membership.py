"""Membership inference on texts: loss, zlib, Min-K, Min-K++, reference-model and gradient-norm attacks, on one forward pass.

Sources: cards rwku and muse. lp_t is log p of target token t, mu_t and sigma_t its mean and deviation under the next-token distribution there.
Every score is larger for texts that look like members. AUC = P(forget scores above unseen texts) is read two-sided: 0.1 is as visible as 0.9.

    loss           mean lp                      min_k         mean of the max(1, int(k T)) lowest lp
    zlib           mean lp / bytes(zlib(text))  min_k_plus    the same of (lp - mu) / sigma
    reference      mean lp - mean lp of models that never saw forget
    gradient_norm  -|| gradient of the mean loss ||, by example, over the output layer or over all parameters
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.language.tokens import MOST, TokenScores, part, seen
from expunge.core.errors import ModelError
from expunge.core.guard import quiet
from expunge.core.registry import check
from expunge.core.stats import above, auc
from expunge.core.types import Task
from expunge.modalities.language.texts import Texts

K = 0.2
"""Share of tokens that Min-K and Min-K++ read (MUSE reads 0.4)."""

FLAT = 1e-6
"""Smallest deviation that Min-K++ divides by: where the model is sure of one token, sigma is 0, and so is the score of that token."""


def lowest(values: Sequence[Tensor], k: float = K) -> Tensor:
    """(N,) mean of the max(1, int(k T)) lowest of N vectors (T_i,).

    >>> lowest([torch.tensor([-0.1, -2.0, -0.5, -3.0, -0.2]), torch.tensor([-1.0])], 0.4)
    tensor([-2.5000, -1.0000])
    """
    return torch.stack([v.sort().values[: max(1, int(k * len(v)))].mean() for v in values])


def standard(s: TokenScores) -> list[Tensor]:
    """N vectors (T_i,) of z_t = (lp_t - mu_t) / sigma_t; 0 where the model is sure of the token and right."""
    return [(a.clamp(min=-1e4) - m) / d.clamp(min=FLAT) for a, m, d in zip(s.logp, s.mu, s.sigma, strict=True)]


def compressed(data: Texts) -> Tensor:
    """(N,) bytes of the scored text of each row under zlib."""
    texts = data.format.tokenizer.batch_decode([t[m].tolist() for t, m in zip(data.tokens, data.targets, strict=True)], skip_special_tokens=True)
    return torch.tensor([len(zlib.compress(text.strip().encode())) for text in texts], dtype=torch.float32)


def attacks(s: TokenScores, data: Texts) -> dict[str, Tensor]:
    """Name -> (N,) scores of the attacks that need one model and no gradient."""
    return {"loss": -s.nll, "zlib": -s.nll / compressed(data), "min_k": lowest(s.logp), "min_k_plus": lowest(standard(s))}


def gradient_norm(model: nn.Module, task: Task, data: Texts, *, everything: bool = False) -> Tensor:
    """(N,) minus the norm of the gradient of each example's mean loss: over the output layer's weight (shared with the input embedding where the model
    ties them), or over all parameters. One backward pass an example. The model is left as it was, `requires_grad` included.
    """
    layer: Any = getattr(model, "get_output_embeddings", None)
    head = layer() if layer is not None else None
    if head is None and not everything:
        raise ModelError(f"{type(model).__name__} names no output layer; use everything=True")
    params = list(model.parameters()) if everything else list(head.parameters())
    params = [p for p in params if p.is_floating_point()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    out = []
    try:
        for p, _ in flags:
            p.requires_grad_(any(p is q for q in params))
        with quiet(model), torch.enable_grad():
            for k in range(len(data)):
                loss = task.forward(model, task.collate(data, torch.tensor([k]), None)).mean.sum()
                gradients = torch.autograd.grad(loss, params, allow_unused=True)
                out.append(-torch.stack([g.float().norm() for g in gradients if g is not None]).norm().cpu())
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return torch.stack(out)


def unseen(p: Probe) -> tuple[Texts | None, str]:
    """The non-members, and how they were drawn."""
    data = part(p, "unseen")
    return data, "" if data is None else f"two-sided; {len(data)} non-members: the test part without its sets of general knowledge"


def auc_rows(name: str, mine: tuple[Tensor, Tensor], rest: Sequence[tuple[Tensor, Tensor]], note: str) -> list[Row]:
    """membership_text.<name> of (forget, unseen) scores, and .excess over those of gold models, if there are any."""
    value, n = auc(*mine), len(mine[0]) + len(mine[1])
    rows = [Row(f"membership_text.{name}", *value, n, note, indicative=True)]
    if rest:
        rows.append(Row(f"membership_text.{name}.excess", *above(value, [auc(*r) for r in rest]), n, f"{note}; against {len(rest)} retrained models", True))
    return rows


@check(tasks=("causal_lm",), needs=("forget", "test"))
def membership_text(p: Probe) -> list[Row]:
    """membership_text.loss, .zlib, .min_k and .min_k_plus (lowest 20 % of tokens): AUC of forget against unseen texts; 0.5 when they look alike.

    With retrained models: .excess, the AUC minus theirs on the same texts, and membership_text.reference, the loss calibrated by their mean loss.
    """
    test, note = unseen(p)
    if test is None:
        return []

    def scores(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        a, b = attacks(seen(p, model, "forget"), part(p, "forget")), attacks(seen(p, model, "unseen"), test)
        return {name: (a[name], b[name]) for name in a}

    mine, rest = scores(p.after), [scores(r) for r in p.references]
    rows = [row for name in mine for row in auc_rows(name, mine[name], [r[name] for r in rest], note)]
    if rest:
        forget, other = (mine["loss"][side] - torch.stack([r["loss"][side] for r in rest]).mean(0) for side in (0, 1))
        rows += auc_rows("reference", (forget, other), [], f"{note}; minus the mean of {len(rest)} retrained models")
    return rows


@check(tasks=("causal_lm",), needs=("forget", "test"), slow=True)
def membership_text_gradient(p: Probe) -> list[Row]:
    """membership_text.gradient_norm: AUC of minus the gradient norm over the output layer, of at most 300 forget and unseen texts; .excess as above."""
    test, note = unseen(p)
    if test is None:
        return []
    sides = {name: data.take(range(min(MOST, len(data)))) for name, data in (("forget", part(p, "forget")), ("unseen", test))}

    def scores(model: nn.Module) -> tuple[Tensor, Tensor]:
        a, b = (p.once(("gradient_norm", name), model, lambda d=d: gradient_norm(model, p.task, d)) for name, d in sides.items())
        return a, b

    return auc_rows("gradient_norm", scores(p.after), [scores(r) for r in p.references], note)
