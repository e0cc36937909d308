"""Regression audits. Source: card deep-regression, metrics."""

from __future__ import annotations

import torch

from expunge.audits.core import Probe, Row
from expunge.audits.drop import badness
from expunge.audits.membership.losses import MOST, svc
from expunge.core.registry import check
from expunge.core.stats import bootstrap, mean, wilson


@check(tasks=("regression",), needs=("forget",))
def error(p: Probe) -> list[Row]:
    """error.<part>: mean absolute error of the candidate, in units of the target."""
    parts = [name for name in ("forget", "retain", "test") if name in p.split.parts()]
    values = {part: badness(p.scores("after", part)) for part in parts}
    return [Row(f"error.{part}", *mean(v), len(v)) for part, v in values.items()]


@check(tasks=("regression",), needs=("forget",), reference=True)
def wasserstein(p: Probe) -> list[Row]:
    """wasserstein.forget: Wasserstein-1 distance of predictions on forget to each retrained model's, averaged; wasserstein_floor: between those."""
    from scipy.stats import wasserstein_distance

    mine = p.scores("after", "forget").margin
    refs = [p.scores(f"reference{k}", "forget").margin for k in range(len(p.references))]

    def distance(r: torch.Tensor) -> float:
        return sum(wasserstein_distance(mine[r].numpy(), ref[r].numpy()) for ref in refs) / len(refs)

    n = len(mine)
    rows = [Row("wasserstein.forget", distance(torch.arange(n)), *bootstrap(distance, n, p.seed, 50), n, f"{len(refs)} retrained models")]
    pairs = [wasserstein_distance(a.numpy(), b.numpy()) for i, a in enumerate(refs) for b in refs[:i]]
    if pairs:
        rows.append(
            Row("wasserstein_floor.forget", sum(pairs) / len(pairs), min(pairs), max(pairs), len(pairs), "pairs of retrained models; smallest and largest")
        )
    return rows


@check(tasks=("regression",), needs=("forget", "retain", "test"))
def membership_error(p: Probe) -> list[Row]:
    """Share of forget called member by SVC(rbf, C = 3, gamma auto) on the absolute error, trained on retain against test."""
    forget, retain, test = (badness(p.scores("after", part))[:, None] for part in ("forget", "retain", "test"))
    generator = torch.Generator().manual_seed(p.seed)
    n = min(len(retain), len(test), MOST)
    called = ~svc(retain[torch.randperm(len(retain), generator=generator)[:n]], test[torch.randperm(len(test), generator=generator)[:n]], forget)
    return [Row("membership_error", *wilson(int(called.sum()), len(called)), len(called), f"SVC trained on {n} + {n}", indicative=True)]
