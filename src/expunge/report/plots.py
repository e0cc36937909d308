"""The report's plots as inline SVG: no pyplot, no dates, the same bytes for the same numbers, whatever the user's matplotlib settings are.

Three models are told apart by colour, line and fill together, so that a grey print and every common kind of colour vision can read them.
Values that are not finite are left out; a plot without any value left is the empty text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expunge.report.cells import finite, items, mapping, number, plain

COLOURS = {"before": "#7d8590", "after": "#1f5fa8", "retrained": "#c2650a"}
LINES = {"before": "-", "after": "-", "retrained": (0, (4, 2))}
PARTS = {"forget": "forgotten records", "retain": "kept records", "test": "unseen records (test)"}
GROUPS = {"forget": "forgotten records", "unseen": "unseen records of the same kind", "planted": "planted records"}
INK, SOFT = "#39414d", "#c9ced6"
HUES = (COLOURS["after"], COLOURS["retrained"], "#5b8c3e", "#8a4f9e")
"""Of lines side by side, where grey is the reference."""
SERIES = (*HUES[:2], INK, COLOURS["before"], *HUES[2:])
"""Of more lines, greys among them."""
STROKES = ("-", (0, (4, 2)), "-.", (0, (1, 1)), "-", (0, (6, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Line styles and markers that go with either, in the same order."""
FLOOR = 1e-6
"""Losses below are drawn here; on the logarithmic membership curve the floor is 0.001."""

Paint = Callable[[Any, Sequence[Any]], None]


def render(width: float, height: float, panels: int, paint: Paint) -> str:
    """SVG text from the <svg> tag on: a figure of that size in inches with `panels` axes side by side, filled by paint(figure, axes)."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.hashsalt": "expunge", "svg.fonttype": "none", "font.size": 8, "axes.titlesize": 9, "axes.titlecolor": INK, "axes.edgecolor": SOFT,
            "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False,
            "axes.titlelocation": "left", "xtick.major.size": 3, "ytick.major.size": 3, "legend.frameon": False, "text.parse_math": False,
        })  # fmt: skip
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        paint(figure, axes)
        figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2).replace("<svg", '<svg role="img"', 1)


def _label(value: Any) -> str:
    """Text of the plots: characters the bundled font has, anything else as a question mark."""
    return "".join(c if ord(c) < 0x250 else "?" for c in plain(value))


def losses(data: Any) -> str:
    """Histograms of the loss per part, one outline per model: {part: {model: [losses]}}. Logarithmic unless a loss is negative."""
    import numpy as np

    kept = {
        part: {name: np.array(good, float) for name, values in mapping(models).items() if (good := [v for v in values or () if finite(v)])}
        for part, models in mapping(data).items()
    }
    kept = {part: models for part, models in kept.items() if models}
    if not kept:
        return ""
    pooled = np.concatenate([values for models in kept.values() for values in models.values()])
    logarithmic = bool(pooled.min() >= 0)
    low, high = float(pooled.min()), float(pooled.max())
    if logarithmic:
        low, high = max(low, FLOOR), max(high, 10 * FLOOR)
        edges = np.geomspace(min(low, high / 10), high * 1.01, 41)
    else:
        edges = np.linspace(low, high if high > low else low + 1, 41)

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

        handles: dict[str, Any] = {}
        for axis, (part, models) in zip(axes, kept.items(), strict=True):
            for name, values in models.items():
                colour, line = COLOURS.get(name, INK), LINES.get(name, "-")
                weights = np.full(len(values), 1 / len(values))
                shown = np.clip(values, edges[0], edges[-1])
                if name == "before":
                    axis.hist(shown, bins=edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.25)
                axis.hist(shown, bins=edges, weights=weights, histtype="step", linewidth=1.4, linestyle=line, color=colour)
                handles.setdefault(name, _handle(colour, line))
            if logarithmic:
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(numticks=6))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
                axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_title(_label(PARTS.get(part, part)))
            axis.set_xlabel("loss" + (" (logarithmic)" if logarithmic else ""))
        axes[0].set_ylabel("share of records")
        figure.legend(list(handles.values()), [_label(n) for n in handles], loc="outside upper right", ncols=3, fontsize=8)

    return render(9, 2.7, len(kept), paint)


def bands(rows: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Quantiles (5, 25, 50, 75, 95 %) of losses, one box per (records, model), groups of records under one another. Logarithmic unless a loss is negative."""
    if not rows:
        return ""
    logarithmic = min(at[0] for _, _, at in rows) >= 0
    kept = [(records, model, [max(v, FLOOR) if logarithmic else v for v in at]) for records, model, at in rows]
    groups = list(dict.fromkeys(records for records, _, _ in kept))
    places = [k + 0.7 * groups.index(records) for k, (records, _, _) in enumerate(kept)]

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axis = axes[0]
        for y, (_, model, (a, b, c, d, e)) in zip(places, kept, strict=True):
            colour = COLOURS.get(model, INK)
            axis.plot([a, e], [y, y], color=colour, linewidth=1.4, linestyle=LINES.get(model, "-"))
            axis.plot([b, d], [y, y], color=colour, linewidth=9, alpha=0.35, solid_capstyle="butt")
            axis.plot([c], [y], marker="|", markersize=13, markeredgewidth=2.2, color=colour)
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(numticks=8))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_yticks(places, [_label(f"{GROUPS.get(records, records)}, {model}") for records, model, _ in kept])
        axis.set_ylim(places[-1] + 0.7, -0.7)
        axis.grid(axis="x", color="#eceff3", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel("loss" + (" (logarithmic)" if logarithmic else ""))

    return render(9, 0.75 + 0.27 * (places[-1] + 1.4), 1, paint)


def _handle(colour: str, line: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=line, linewidth=1.6)


def roc(data: Any) -> str:
    """Membership curves "low loss means member", plain and with logarithmic axes: {model: {fpr: [], tpr: [], auc: x}}."""
    curves = {}
    for name, curve in mapping(data).items():
        pairs = [(x, y) for x, y in zip(mapping(curve).get("fpr") or (), mapping(curve).get("tpr") or (), strict=False) if finite(x) and finite(y)]
        if pairs:
            auc = curve.get("auc")
            curves[name] = (pairs, f"{name}, AUC {auc:.2f}" if finite(auc) else f"{name}, AUC not measurable")
    if not curves:
        return ""

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        handles = []
        for axis, floor in zip(axes, (0.0, 1e-3), strict=True):
            axis.plot([floor, 1], [floor, 1], color=SOFT, linewidth=1)
            for name, (pairs, _) in curves.items():
                colour, line = COLOURS.get(name, INK), LINES.get(name, "-")
                axis.plot([max(x, floor) for x, _ in pairs], [max(y, floor) for _, y in pairs], color=colour, linestyle=line, linewidth=1.4)
            axis.set_xlabel("false positive rate")
            axis.set_aspect("equal")
        handles = [_handle(COLOURS.get(name, INK), LINES.get(name, "-")) for name in curves]
        axes[0].set_ylabel("true positive rate")
        axes[0].set_title("all thresholds")
        axes[1].set_title("few false positives (log axes, floor 0.001)")
        axes[1].set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.1))
        _plain_logs(axes[1])
        figure.legend(handles, [_label(text) for _, text in curves.values()], loc="outside right center", fontsize=8)

    return render(9, 3.1, 2, paint)


def _plain_logs(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        one.set_minor_locator(NullLocator())


def scatter(data: Any) -> str:
    """Forgetting against utility, one marker per run: filled circle when passed, open square when not; its area grows with cost.

    Each method is labelled once, at its first run. Forgetting is clipped to -1..1.6.
    """
    points = [p for p in items(data) if finite(p.get("forgetting")) and finite(p.get("utility"))]
    if not points:
        return ""
    costs = [max(0.0, float(p["cost"])) if finite(p.get("cost")) else 0.0 for p in points]
    top = max(costs) or 1.0
    places = [(min(1.6, max(-1.0, float(p["forgetting"]))), float(p["utility"])) for p in points]

    def area(cost: float) -> float:
        return 22 + 200 * cost / top

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        axis = axes[0]
        for p, (x, y), cost in zip(points, places, costs, strict=True):
            good = p.get("passed") is True
            colour = COLOURS["after"] if good else COLOURS["retrained"]
            axis.scatter(
                [x], [y], s=area(cost), marker="o" if good else "s", facecolors=colour if good else "none", edgecolors=colour, alpha=0.85, linewidths=1.2
            )
        axis.margins(0.12, 0.15)
        axis.grid(color="#eceff3", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel("forgetting (more to the right)")
        axis.set_ylabel("utility on unseen records")
        sizes = sorted({min(costs), top}) if max(costs) > 0 else []
        keys = [("o", COLOURS["after"], COLOURS["after"], 45.0, "passed"), ("s", "none", COLOURS["retrained"], 45.0, "not passed")]
        keys += [("o", "none", COLOURS["before"], area(c), f"{number(c)} examples") for c in sizes]
        handles = [axis.scatter([], [], s=s, marker=m, facecolors=f, edgecolors=e, linewidths=1.2) for m, f, e, s, _ in keys]
        figure.legend(handles, [text for *_, text in keys], loc="outside right upper", fontsize=8, labelspacing=1.1)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        first: dict[str, int] = {}
        for k, p in enumerate(points):
            first.setdefault(_label(p.get("method")), k)
        _annotate(axis, {name: places[k] for name, k in first.items()}, places)

    return render(9, 4.4, 1, paint)


def _annotate(axis: Any, labels: Mapping[str, tuple[float, float]], markers: Sequence[tuple[float, float]]) -> None:
    """Write each label near its place where it covers the fewest labels and markers: 8 directions, 5 distances, the nearest best one."""
    points = 72 / axis.figure.dpi
    frame = axis.get_window_extent()
    busy = [(x - 5, y - 5, x + 5, y + 5) for x, y in (axis.transData.transform(m) * points for m in markers)]
    edge = (frame.x0 * points, frame.y0 * points, frame.x1 * points, frame.y1 * points)
    ways = [(1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1), (1, 1), (-1, 1)]
    for name, place in sorted(labels.items(), key=lambda item: (-item[1][1], item[1][0], item[0])):
        x, y = axis.transData.transform(place) * points
        wide, high = 4.3 * len(name) + 2, 9.0
        best = None
        for far in (9, 20, 34, 50, 70):
            for dx, dy in ways:
                a = x + dx * far - (wide if dx < 0 else wide / 2 if dx == 0 else 0)
                b = y + dy * far - high / 2
                box = (a, b, a + wide, b + high)
                outside = max(0.0, edge[0] - a, a + wide - edge[2]) + max(0.0, edge[1] - b, b + high - edge[3])
                bad = sum(_shared(box, other) for other in busy) + 20 * outside + far / 10
                if best is None or bad < best[0]:
                    best = (bad, far, dx, dy, box)
        if best is None:
            continue
        _, far, dx, dy, box = best
        busy.append(box)
        arrow = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4} if far > 9 else None
        axis.annotate(
            name, place, xytext=(dx * far, dy * far), textcoords="offset points", fontsize=7.5, va="center", arrowprops=arrow,
            ha={-1: "right", 0: "center", 1: "left"}[dx],
        )  # fmt: skip


def _shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes (left, low, right, high) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def confusion(data: Any) -> str:
    """Confusion matrices side by side, {model: [label][prediction] counts}: colour is the share of the label's records, figures are counts."""
    import numpy as np

    kept = {}
    for name, matrix in mapping(data).items():
        rows = [[v if finite(v) else 0 for v in row] for row in matrix or () if isinstance(row, (list, tuple))]
        if rows and len({len(row) for row in rows}) == 1 and rows[0]:
            kept[name] = np.array(rows, float)
    if not kept:
        return ""

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        for axis, (name, counts) in zip(axes, kept.items(), strict=True):
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest", aspect="equal")
            if len(counts) <= 12:
                axis.set_xticks(range(counts.shape[1]))
                axis.set_yticks(range(counts.shape[0]))
                for i, j in zip(*np.nonzero(counts), strict=True):
                    axis.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 0.6 else INK)
            axis.set_title(_label(name))
            axis.set_xlabel("predicted class")
            axis.tick_params(length=0)
        axes[0].set_ylabel("true class")

    return render(4.4 * len(kept), 4.1, len(kept), paint)
