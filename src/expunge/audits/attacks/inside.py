"""What inner layers and the change itself give away. Sources: card open-problems (A8, C7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.audits.attacks.restore import excess
from expunge.audits.core import Probe, Row
from expunge.audits.membership.losses import targets
from expunge.core.registry import check
from expunge.core.stats import auc, matched
from expunge.parts.reading import features

MOST_LAYERS = 6
"""Layers that are probed, evenly spaced from first to last."""


MOST_FEATURES = 256
"""Wider features are projected to this many by a random matrix, the same for every model: what is linearly there stays there, at a cost that is bounded."""


def layers(model: nn.Module) -> list[str]:
    """Names of at most MOST_LAYERS convolutions and linear layers, in order."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    pick = torch.linspace(0, len(names) - 1, min(MOST_LAYERS, len(names))).round().long().tolist()
    return [names[k] for k in dict.fromkeys(pick)]


def probed(features: tuple[Tensor, Tensor], seed: int) -> tuple[float, float, int]:
    """(AUC, half-width, n) of a logistic probe that tells two sets of features (n, D), (m, D) apart: fitted on one half, read on the other."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    g = torch.Generator().manual_seed(seed)
    halves = [f[torch.randperm(len(f), generator=g)] for f in features]
    fit, read = ([h[: len(h) // 2] for h in halves], [h[len(h) // 2 :] for h in halves])
    x, y = torch.cat(fit).double().numpy(), torch.cat([torch.ones(len(fit[0])), torch.zeros(len(fit[1]))]).numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200)).fit(x, y)
    high, low = (torch.as_tensor(model.decision_function(r.double().numpy())) for r in read)
    value, a, b = auc(high, low)
    return value, (b - a) / 2, len(high) + len(low)


def narrow(features: Tensor, seed: int) -> Tensor:
    """(N, D) as it is up to MOST_FEATURES, else (N, MOST_FEATURES) random projections, drawn from seed alone."""
    d = features.shape[1]
    if d <= MOST_FEATURES:
        return features
    return features @ (torch.randn(d, MOST_FEATURES, generator=torch.Generator().manual_seed(seed)) / d**0.5)


@check(tasks=("classification",), needs=("forget", "test"), reference=True, slow=True)
def probe(p: Probe) -> list[Row]:
    """probe.<layer>: excess AUC of a linear probe on that layer's features over retrained models; probe.excess: the worst layer.

    A removed class: the probe tells unseen records of the class from unseen records of others. Records: forgotten from unseen ones of the same
    labels. A retrained model can be probed too, so only the excess is memory.
    """
    removed = torch.tensor(p.removed())
    test = p.split.test
    if len(removed):
        there = torch.isin(test.y, removed)
        sets = (test.take(there.nonzero().squeeze(1)), test.take((~there).nonzero().squeeze(1)))
    else:
        drawn, _ = matched(targets(p.scores("after", "forget")), targets(p.scores("after", "test")), p.seed)
        sets = (p.split.forget, test.take(drawn))
    if min(map(len, sets)) < 8:
        return []

    def read(model: nn.Module, layer: str) -> tuple[float, float, int]:
        gone, other = (narrow(features(model, p.task, part, layer, 500).cpu().float(), p.seed) for part in sets)
        return probed((gone, other), p.seed)

    rows = []
    for layer in layers(p.after):
        mine, *rest = (p.once(("probe", layer, p.seed), m, lambda m=m, layer=layer: read(m, layer)) for m in (p.after, *p.references[:3]))
        rows.append(excess(mine, rest, f"probe.{layer}", f"AUC {mine[0]:.3g}"))
    worst = max(rows, key=lambda r: r.value)
    return [*rows, Row("probe.excess", worst.value, worst.low, worst.high, worst.n, f"worst of {len(rows)} layers: {worst.name[6:]}; {worst.note}")]


@check(tasks=("classification", "causal_lm"), needs=("forget", "retain"), reference=True)
def delta(p: Probe) -> list[Row]:
    """delta.auc: how well the size of the change of the log-odds from before to after points at forgotten among kept records; delta.excess over retrained
    models. Log-odds of texts are those of the probability per token.

    An observer who holds both models has this much. Retraining, too, changes what it forgets, so the excess is what unlearning adds.
    """

    def read(which: str) -> tuple[float, float, int]:
        moved = [(p.scores("before", part).margin - p.scores(which, part).margin).abs() for part in ("forget", "retain")]
        value, low, high = auc(*moved)
        return value, (high - low) / 2, len(moved[0]) + len(moved[1])

    mine = read("after")
    rest = [read(f"reference{k}") for k in range(len(p.references))]
    return [Row("delta.auc", mine[0], mine[0] - mine[1], mine[0] + mine[1], mine[2], "size of the change", indicative=True),
            excess(mine, rest, "delta.excess", f"AUC {mine[0]:.3g}")]  # fmt: skip
