"""Accuracy by part and class, ZRF, and cost. Source: card audits-classification, accuracy family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.audits.core import Probe, Row
from expunge.core.registry import check
from expunge.core.stats import bootstrap, wilson
from expunge.parts.reading import score
from expunge.parts.training import fresh


@check(tasks=("classification",), needs=("forget",))
def accuracy(p: Probe) -> list[Row]:
    """accuracy.forget (UA is 1 minus it), .retain (RA), .test (TA: without removed classes), .forget_test (removed classes), .class.K on test."""
    removed = torch.tensor(p.removed(), dtype=torch.long)
    rows = [_share(f"accuracy.{part}", p.scores("after", part).correct) for part in ("forget", "retain") if part in p.split.parts()]
    if p.split.test is not None:
        s = p.scores("after", "test")
        gone = torch.isin(s.labels, removed)
        rows.append(_share("accuracy.test", s.correct[~gone]))
        if bool(gone.any()):
            rows.append(_share("accuracy.forget_test", s.correct[gone]))
        rows += [_share(f"accuracy.class.{k}", s.correct[s.labels == k]) for k in s.labels.unique().tolist()]
    return rows


def _share(name: str, hits: Tensor) -> Row:
    return Row(name, *wilson(int(hits.sum()), len(hits)), len(hits))


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """(N,) Jensen-Shannon divergence in bits (0..1) of probabilities (N, C).

    >>> jensen_shannon(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([1.])
    """
    m = (a + b) / 2
    half = [(q * (q.clamp(min=1e-12) / m.clamp(min=1e-12)).log2()).sum(-1) / 2 for q in (a, b)]
    return half[0] + half[1]


@check(tasks=("classification",), needs=("forget",))
def zrf(p: Probe) -> list[Row]:
    """ZRF = 1 - mean JS(candidate, randomly initialised network) on forget. Higher than a retrained model's value is over-forgetting.

    Differs: the published code swaps the arguments of KL and divides by the number of classes; this is JS in bits.
    """
    random = fresh(p.before, p.seed)
    a, b = p.scores("after", "forget").logits.softmax(-1), score(random, p.task, p.split.forget).logits.softmax(-1)
    values = 1 - jensen_shannon(a, b)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), len(values), p.seed)
    return [Row("zrf", float(values.mean()), low, high, len(values), "against one random initialisation", indicative=True)]


@check(tasks=("classification", "regression", "causal_lm", "diffusion", "contrastive", "gan", "image_to_image"), needs=("forget",))
def cost(p: Probe) -> list[Row]:
    """cost.forward, cost.backward (examples), cost.seconds (wall), cost.share (passes as a share of retraining's)."""
    rows = [
        Row(f"cost.{name}", float(p.cost[name]), float(p.cost[name]), float(p.cost[name]), 1) for name in ("forward", "backward", "seconds") if name in p.cost
    ]
    total = p.cost.get("retrain_passes")
    if total and "forward" in p.cost:
        share = (p.cost["forward"] + p.cost["backward"]) / total
        rows.append(Row("cost.share", share, share, share, 1, "examples forward plus backward, relative to retraining"))
    return rows


def entropy(logits: Tensor) -> Tensor:
    """(N,) entropy of softmax in nats."""
    return -(F.softmax(logits, -1) * F.log_softmax(logits, -1)).sum(-1)


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) M = -(1 - p_y) log p_y - sum_{j != y} p_j log(1 - p_j). Card audits-classification.

    >>> modified_entropy(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0]))
    tensor([0.0211])
    """
    p = F.softmax(logits, -1).clamp(1e-12, 1 - 1e-7)
    y = F.one_hot(labels, p.shape[1]).bool()
    return torch.where(y, -(1 - p) * p.log(), -p * torch.log1p(-p)).sum(-1)


def modified_entropy_published(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) the form of the published code: log p in place of log(1 - p) off the label, and every column indexed by all labels.

    Its assignment `reverse[:, labels] = probs[:, labels]` writes whole columns, so that a column counts as "label" for every row as soon as
    any row carries it.
    """
    p = F.softmax(logits, -1)
    logs, reverse_logs = -p.clamp(min=1e-30).log(), -(1 - p).clamp(min=1e-30).log()
    changed, logged = p.clone(), reverse_logs.clone()
    columns = labels.unique()
    changed[:, columns] = 1 - p[:, columns]
    logged[:, columns] = logs[:, columns]
    return (changed * logged).sum(-1)
