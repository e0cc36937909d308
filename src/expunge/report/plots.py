"""The report's plots as inline SVG: no global matplotlib state, no dates, the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {"before": "#8a8f98", "after": "#0b6bcb", "retrained": "#c9720a"}
"""Grey, blue, orange: apart for all common kinds of colour vision."""


def render(figure: Any) -> str:
    """SVG text of a matplotlib Figure, from the <svg> tag on."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "expunge", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def losses(data: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Histograms of log10(loss) per part, one outline per model."""
    import numpy as np

    figure, axes = _figure(9, 2.6, max(1, len(data)))
    for axis, (part, models) in zip(axes, data.items(), strict=False):
        for name, values in models.items():
            axis.hist(
                np.log10(np.clip(values, 1e-6, 1e4)), bins=np.linspace(-6, 2, 41).tolist(), histtype="step", linewidth=1.5, color=COLOURS.get(name), label=name
            )
        axis.set_title({"test": "unseen (test)"}.get(part, part), fontsize=9)
        axis.set_xlabel("log10 loss", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    return render(figure)


def roc(data: Mapping[str, Mapping[str, Any]]) -> str:
    """Membership ROC curves: "low loss means member"."""
    figure, (axis, *_) = _figure(3.6, 3.2)
    axis.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
    for name, curve in data.items():
        if curve.get("fpr"):
            axis.plot(curve["fpr"], curve["tpr"], color=COLOURS.get(name), label=f"{name}, AUC {curve['auc']:.2f}")
    axis.set_xlabel("false positive rate", fontsize=8)
    axis.set_ylabel("true positive rate", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    return render(figure)


def scatter(points: Sequence[Mapping[str, Any]]) -> str:
    """Forgetting against utility of every try; marker area grows with the logarithm of cost, filled when passed."""
    figure, (axis, *_) = _figure(5.4, 3.6)
    for point in points:
        size = 20 + 25 * math.log10(1 + max(0.0, float(point["cost"] or 0)) / 1000)
        colour = COLOURS["after"] if point.get("passed") else COLOURS["before"]
        x = min(1.6, max(-1.0, float(point["forgetting"])))
        axis.scatter([x], [point["utility"]], s=size, facecolors=colour if point.get("passed") else "none", edgecolors=colour)
        axis.annotate(str(point["method"]).replace("$", ""), (x, point["utility"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set_xlabel("forgetting (1 is a retrained model; clipped to -1..1.6)", fontsize=8)
    axis.set_ylabel("utility on test", fontsize=8)
    return render(figure)


def confusion(data: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """Confusion matrices side by side: rows are labels, columns predictions."""
    figure, axes = _figure(6.4, 3.1, max(1, len(data)))
    for axis, (name, matrix) in zip(axes, data.items(), strict=False):
        axis.imshow(matrix, cmap="Blues")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("prediction", fontsize=8)
    axes[0].set_ylabel("label", fontsize=8)
    return render(figure)
