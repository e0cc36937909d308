"""Losses on features and activation maps, (B,). Sources: cards duck and deep-regression."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cosine_distance(features: Tensor, centres: Tensor) -> Tensor:
    """1 - cos(e, mu) of features (B, D) to their own centre (B, D); the gradient is orthogonal to the embedding.

    >>> import torch
    >>> cosine_distance(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.6838])
    """
    return 1 - F.cosine_similarity(features, centres, dim=-1)


def attention_map(activation: Tensor) -> Tensor:
    """q = normalise_2(flatten(mean over channels of act^2)) of (B, C, ...); for (B, D) the squares themselves are the map.

    >>> import torch
    >>> attention_map(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[0.4472, 0.8944]])
    """
    squares = activation.square()
    return F.normalize(squares.mean(1).flatten(1) if activation.ndim > 2 else squares, dim=1)


def attention(a: Tensor, b: Tensor) -> Tensor:
    """Mean over entries of (q(a) - q(b))^2, (B,).

    >>> import torch
    >>> attention(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor([0.5528])
    """
    return (attention_map(a) - attention_map(b)).square().mean(1)
