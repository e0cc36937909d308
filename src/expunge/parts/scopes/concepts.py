"""Concepts: directions of a feature space, what each says about an example, and how much each counts for a class. Source: card class-concepts.

Directions come from the features themselves, without an outside model: `cav` and `directions`. Letters: g (N, D) features, v (K, D) directions,
a (N, K) scores, y (N, C) logits of a linear bottleneck on the scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import SettingError, SplitError
from expunge.core.types import Task
from expunge.parts.losses.sparse import shrink
from expunge.parts.reading import features

KINDS = ("nmf", "pca", "cav")


@dataclass(frozen=True)
class Bank:
    """K directions (K, D), and the mean and deviation (K,) of their scores over the records that define 0 and 1."""

    directions: Tensor
    centre: Tensor
    scale: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(N, K) scores of features (N, D): centred and scaled, so that 0 is an ordinary record and no always-on concept rules."""
        return (projections(features, self.directions) - self.centre) / self.scale


@dataclass(frozen=True)
class Bottleneck:
    """A linear layer y = W a + b on concept scores: weight (C, K), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, scores: Tensor) -> Tensor:
        """(N, C)"""
        return scores @ self.weight.T + self.bias


def projections(features: Tensor, directions: Tensor) -> Tensor:
    """a_k = <g, v_k> / ||v_k||^2 of features (N, D) on directions (K, D), (N, K).

    >>> projections(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([[1.5000]])
    """
    return features @ directions.T / directions.square().sum(1)


def embed(model: nn.Module, task: Task, data, layer: str = "") -> Tensor:
    """(N, D) features of all of `data` in float64 on the CPU, in eval mode: the inputs of the last linear layer when `layer` is ""."""
    return features(model, task, data, layer).cpu().double()


def cav(inside: Tensor, outside: Tensor, *, seed: int = 0) -> Tensor:
    """(D,) normal of the linear SVM that tells features with a concept (n, D) from features without it (m, D), pointing at the concept."""
    from sklearn.svm import LinearSVC

    x, y = torch.cat([inside, outside]).double().numpy(), [1] * len(inside) + [0] * len(outside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = LinearSVC(class_weight="balanced", dual=True, random_state=seed).fit(x, y)
    return torch.as_tensor(found.coef_[0])


def directions(features: Tensor, labels: Tensor, *, kind: str = "nmf", count: int = 20, seed: int = 0) -> Tensor:
    """(K, D) concept directions of features (N, D), K at most `count`; directions of length 0 are left out.

    nmf   parts that add up to the features, which must not be negative: what several classes share
    pca   orthogonal directions of the largest variance
    cav   one per class, `cav` of its records against all others; `count` is not used
    """
    from sklearn.decomposition import NMF, PCA

    if kind not in KINDS:
        raise SettingError(f"kind must be one of {', '.join(KINDS)}, not '{kind}'")
    if kind == "nmf" and float(features.min()) < 0:
        raise SettingError("kind 'nmf' needs features that are not negative, as after a ReLU; use 'pca' or 'cav' for this layer")
    count = min(count, *features.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "cav":
            found = torch.stack([cav(features[labels == c], features[labels != c], seed=seed) for c in labels.unique()])
        elif kind == "nmf":
            found = torch.as_tensor(NMF(count, init="nndsvda", max_iter=400, random_state=seed).fit(features.double().numpy()).components_)
        else:
            found = torch.as_tensor(PCA(count, svd_solver="full").fit(features.double().numpy()).components_)
    return found[found.norm(dim=1) > 1e-9].double()


def bank(features: Tensor, labels: Tensor, ordinary: Tensor, *, kind: str = "nmf", count: int = 20, seed: int = 0) -> Bank:
    """The `directions` of features (N, D) whose scores are centred and scaled on `ordinary` features (M, D): those of the records that stay."""
    found = directions(features, labels, kind=kind, count=count, seed=seed)
    if not len(found):
        raise SplitError("the features are 0 for all records: this layer holds no concept")
    a = projections(ordinary.double(), found)
    return Bank(found, a.mean(0), a.std(0, correction=0).clamp(min=1e-6))


def bottleneck(scores: Tensor, target: Tensor, classes: int, *, penalty: float = 1e-3, l1: float = 0.5, steps: int = 300) -> Bottleneck:
    """The sparse layer that minimises mean CE(W a + b, target) + penalty * (l1 ||W||_1 + (1 - l1) / 2 ||W||^2), by accelerated proximal descent.

    `target` are labels (N,) or probabilities (N, C): a model's own, to ask what the model goes by rather than what its features hold.
    """
    a = torch.cat([scores.double(), torch.ones(len(scores), 1, dtype=torch.double)], 1)
    t = F.one_hot(target, classes).double() if target.ndim == 1 else target.double()
    k = scores.shape[1]
    step = 1 / (float(torch.linalg.matrix_norm(a, 2)) ** 2 / (2 * len(a)) + penalty * (1 - l1))
    w = before = torch.zeros(classes, k + 1, dtype=torch.double)
    for i in range(steps):
        z = w + i / (i + 3) * (w - before)
        slope = ((z @ a.T).softmax(0).T - t).T @ a / len(a)
        slope[:, :k] += penalty * (1 - l1) * z[:, :k]
        before, w = w, z - step * slope
        shrink([w[:, :k]], step * penalty * l1)
    return Bottleneck(w[:, :k].clone(), w[:, k].clone())


def integrated_gradients(f: Callable[[Tensor], Tensor], a: Tensor, base: Tensor | None = None, *, steps: int = 32) -> Tensor:
    """IG_k = (a_k - base_k) * int_0^1 d f / d a_k (base + s (a - base)) ds for f: (N, K) -> (N,), (N, K); midpoint rule, base 0 if not given.

    Completeness: the sum over k is f(a) - f(base), exactly for linear f.

    >>> a, w = torch.tensor([[1.5, 0.5, 3.0]]), torch.tensor([2.0, -1.0, 0.0])
    >>> integrated_gradients(lambda x: x @ w + 0.2, a)
    tensor([[ 3.0000, -0.5000,  0.0000]])
    """
    base = torch.zeros_like(a) if base is None else base.expand_as(a)
    total = torch.zeros_like(a)
    for j in range(steps):
        at = (base + (j + 0.5) / steps * (a - base)).detach().requires_grad_(True)
        with torch.enable_grad():
            total += torch.autograd.grad(f(at).sum(), at)[0]
    return (a - base) * total / steps


def contributions(layer: Bottleneck, scores: Tensor, label: int) -> Tensor:
    """(N, K) W_ck a_k: the integrated gradients of class `label`'s logit, which for a linear layer need no integral."""
    return scores * layer.weight[label]


def class_vectors(layer: Bottleneck, scores: Tensor, labels: Tensor) -> Tensor:
    """(C, K) mean contribution of each concept to a class's own logit, over the records of that class; 0 for a class without records."""
    out = torch.zeros_like(layer.weight)
    for c in labels.unique().tolist():
        out[c] = contributions(layer, scores[labels == c], c).mean(0)
    return out


def linked(vector: Tensor, q: int) -> Tensor:
    """Numbers of the q concepts with the largest |contribution| in a class's vector (K,), largest first.

    >>> linked(torch.tensor([3.0, -0.5, 0.0]), 1)
    tensor([0])
    """
    return vector.abs().argsort(descending=True, stable=True)[:q]


def exclusive(vectors: Tensor, label: int, q: int, share: float = 0.5) -> Tensor:
    """Those of the class's q linked concepts of which no other class has `share` of its |contribution|; the rest are shared concepts.

    >>> exclusive(torch.tensor([[3.0, 2.0, 0.0], [0.0, 2.0, 1.0]]), 0, 2)
    tensor([0])
    """
    mine, size = linked(vectors[label], q), vectors.abs()
    others = size[[c for c in range(len(vectors)) if c != label]].amax(0)
    return mine[others[mine] < share * size[label, mine]]


def nearest_classes(vectors: Tensor, label: int, kept: Tensor) -> Tensor:
    """The kept classes ordered by the cosine of their vector with the class's, nearest first: those that share most concepts with it.

    >>> nearest_classes(torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 2.0]]), 0, torch.tensor([1, 2]))
    tensor([2, 1])
    """
    return kept[F.cosine_similarity(vectors[kept], vectors[label][None], dim=1).argsort(descending=True, stable=True)]
