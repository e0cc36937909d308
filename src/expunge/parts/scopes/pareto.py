"""The single critical layer: Pareto front of alignment with retain and importance for forget. Source: card slug, step 2."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable weights with two or more dimensions, embeddings left out: what the front chooses from."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and p.ndim > 1 and id(p) not in tables}


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names whose (alignment a, importance r) no other point beats in both (a2 < a and r2 > r), most important first.

    >>> front({"A": (0.10, 5), "B": (0.05, 1), "C": (0.20, 6), "D": (0.15, 4)})
    ['C', 'A', 'B']
    """
    kept = [n for n, (a, r) in points.items() if not any(a2 < a and r2 > r for a2, r2 in points.values())]
    return sorted(kept, key=lambda n: -points[n][1])


def layer_points(params: Mapping[str, Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Per weight matrix a = |cos(g_f, g_r)| and r = ||g_f|| / ||theta||; a matrix that the forget gradient does not reach has no point."""
    points = {}
    for name, p in params.items():
        f, r = forget[name].double().flatten(), retain[name].double().flatten()
        if float(f.norm()) > 0:
            cosine = abs(float(f @ r) / max(float(f.norm() * r.norm()), 1e-30))
            points[name] = (cosine, float(f.norm() / p.detach().double().norm().clamp(min=1e-30)))
    return points
