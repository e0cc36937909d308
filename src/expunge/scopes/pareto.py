"""The single critical layer: Pareto front of alignment with retain and importance for forget. Source: card slug, step 2."""

from __future__ import annotations

from torch import Tensor


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names whose (alignment a, importance r) no other point beats in both (a2 < a and r2 > r), most important first.

    >>> front({"A": (0.10, 5), "B": (0.05, 1), "C": (0.20, 6), "D": (0.15, 4)})
    ['C', 'A', 'B']
    """
    kept = [n for n, (a, r) in points.items() if not any(a2 < a and r2 > r for a2, r2 in points.values())]
    return sorted(kept, key=lambda n: -points[n][1])


def layer_points(params: dict[str, Tensor], forget: dict[str, Tensor], retain: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Per weight matrix (2-D and up): a = |cos(g_f, g_r)| and r = ||g_f|| / ||theta||."""
    points = {}
    for name, p in params.items():
        f, r = forget[name].flatten(), retain[name].flatten()
        if p.ndim >= 2 and float(f.norm()) > 0:
            cosine = abs(float(f @ r) / max(float(f.norm() * r.norm()), 1e-30))
            points[name] = (cosine, float(f.norm() / p.detach().norm().clamp(min=1e-30)))
    return points
