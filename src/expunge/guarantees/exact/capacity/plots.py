"""Requests served and cost per request, over designs and streams: SVG in one small HTML file. Same numbers, same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.guarantees.exact.capacity.simulator import Measured, Served, Spent
from expunge.guarantees.exact.capacity.systems import Stream, System
from expunge.report.plots import INK, MARKERS, SERIES, SOFT, STROKES, render


def bars(groups: Mapping[str, Mapping[str, Measured]], label: str, *, log: bool = False) -> str:
    """One line of points per series: {series: {design: measured}} -> SVG, means with their intervals. Empty without any value."""
    kept = {name: values for name, values in groups.items() if values}
    if not kept:
        return ""
    names = list(dict.fromkeys(design for values in kept.values() for design in values))

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        axis, step = axes[0], 0.7 / len(kept)
        for k, (series, values) in enumerate(kept.items()):
            y = [names.index(d) + (k - (len(kept) - 1) / 2) * step for d in values]
            means = [m.mean for m in values.values()]
            error = [[max(0.0, m.mean - m.low) for m in values.values()], [max(0.0, m.high - m.mean) for m in values.values()]]
            axis.errorbar(means, y, xerr=error, fmt=MARKERS[k % 6], color=SERIES[k % 6], markersize=4.5, linewidth=1.2, capsize=2, label=series)
        for k in range(len(names) - 1):
            axis.axhline(k + 0.5, color=SOFT, linewidth=0.6)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label)
        if log:
            from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
        else:
            axis.set_xlim(left=0)
        axis.grid(axis="x", color="#eceff3", linewidth=0.8)
        axis.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=min(4, len(kept)), fontsize=8)

    return render(9, 0.9 + 0.15 * len(names) * (1 + len(kept)), 1, paint)


def curves(rows: Mapping[str, Spent]) -> str:
    """Cost so far, checkpoints stored and share of slices in use over the requests, one line per name. Empty without any row."""
    if not rows:
        return ""

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        for axis, label, field in zip(
            axes, ("sample passes so far", "checkpoints stored", "share of slices in use"), ("cost_curve", "storage_curve", "kept_curve"), strict=True
        ):
            for k, (name, spent) in enumerate(rows.items()):
                axis.plot(
                    spent.at, getattr(spent, field), color=SERIES[k % 6], linestyle=STROKES[k % 6], linewidth=1.4, label=name if axis is axes[0] else None
                )
            axis.set_xlabel("requests")
            axis.set_title(label, color=INK)
            axis.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    return render(9, 3.4, 3, paint)


def compared(rows: Sequence[tuple[System, Stream, Served, Spent]]) -> list[tuple[str, str]]:
    """Titled plots of what `capacity.table` returns: served, cost per request; curves of the first stream."""
    by: dict[str, dict[str, tuple[Served, Spent]]] = {}
    for design, stream, one, two in rows:
        by.setdefault(stream.kind, {})[design.name] = one, two
    first = next(iter(by.values()), {})
    return [
        ("Requests served without retraining", bars({k: {d: v[0].all for d, v in g.items()} for k, g in by.items()}, "requests, mean and 95 % bounds")),
        ("Cost per request", bars({k: {d: v[1].share for d, v in g.items()} for k, g in by.items()}, "share of a full training, logarithmic", log=True)),
        ("Over time: " + next(iter(by), ""), curves({d: v[1] for d, v in list(first.items())[:6]})),
    ]
