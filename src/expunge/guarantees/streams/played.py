"""What a stream left, and its report: stream.json, stream.csv and a page with the plot."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from expunge.core.files import write
from expunge.data.records.memory import FisherSum, Memory
from expunge.guarantees.streams.course import Course
from expunge.guarantees.streams.rows import Step


@dataclass(frozen=True, eq=False)
class Played:
    """What a stream left: a row per request, the model and the memory after the last one."""

    steps: tuple[Step, ...]
    course: Course
    identity: str
    model: nn.Module
    memory: Memory
    fisher: Mapping[int, FisherSum] = field(default_factory=dict)

    @property
    def lost(self) -> float:
        """Mean over learn requests but the last of (best accuracy on what was held of it, minus that at the end); nan where there are none."""
        last = self.steps[-1].parts
        earlier = [k for k in last if int(k) != max(map(int, last))]
        best = {k: max(s.parts[k].value for s in self.steps if k in s.parts) for k in earlier}
        return sum(best[k] - last[k].value for k in earlier) / len(earlier) if earlier else math.nan

    def document(self) -> dict[str, Any]:
        """JSON-able: rows, course, identity; what is not a number is null."""
        return _plain({"identity": self.identity, "course": asdict(self.course), "lost": self.lost, "steps": [asdict(s) for s in self.steps]})

    def save(self, folder: str | Path) -> Path:
        """Write stream.json, stream.csv and stream.html (with the plot); no weights."""
        folder = Path(folder)
        write(folder / "stream.json", json.dumps(self.document(), indent=1, allow_nan=False))
        rows = [_flat(asdict(s)) for s in self.steps]
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write(folder / "stream.csv", text.getvalue())
        write(folder / "stream.html", _page(self))
        return folder


def plot(played: Played) -> str:
    """SVG text: accuracy with its bounds after each request, and passes per request."""
    from expunge.report.plots import COLOURS, LINES, render

    lines = {"kept": "after", "test": "before", "forgotten": "retrained"}
    at = range(len(played.steps))

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        handles = []
        for name, style in lines.items():
            shares = [(k, getattr(s, name)) for k, s in zip(at, played.steps, strict=True) if getattr(s, name).n]
            where = [k for k, _ in shares]
            handles += axes[0].plot(where, [x.value for _, x in shares], color=COLOURS[style], linestyle=LINES[style], marker="o", markersize=3, label=name)
            axes[0].fill_between(where, [x.low for _, x in shares], [x.high for _, x in shares], color=COLOURS[style], alpha=0.15, linewidth=0)
        axes[0].set(ylim=(-0.02, 1.02), ylabel="accuracy", title="what is kept and what is forgotten")
        axes[1].bar(list(at), [s.passes for s in played.steps], color=[COLOURS["after" if s.kind == "learn" else "retrained"] for s in played.steps])
        axes[1].set(ylabel="examples forward and backward", title="cost")
        for axis in axes:
            axis.set_xticks(list(at))
            axis.set_xlabel("request")
        figure.legend(handles, list(lines), loc="outside upper right", ncols=3, fontsize=8)

    return render(9, 3.1, 2, paint)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(step: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV: shares as four columns, parts left out."""
    out: dict[str, Any] = {}
    for f in fields(Step):
        value = step[f.name]
        if f.name in ("forgotten", "kept", "test"):
            out |= {f.name if n == "value" else f"{f.name}.{n}": v for n, v in _plain(value).items()}
        elif f.name != "parts":
            out[f.name] = value
    return out


def _page(played: Played) -> str:
    """A page of its own with the rows and the plot."""
    from expunge.report.page import page

    cell = lambda x: "none" if not x.n else f"{x.value:.3f} ({x.low:.3f} to {x.high:.3f}, n = {x.n})"  # noqa: E731
    heads = ("request", "time", "what", "records", "forgotten", "kept", "test", "passes", "seconds", "memory", "stale")
    lines = [
        (s.number, s.time, f"{s.kind} {s.what}", s.records, cell(s.forgotten), cell(s.kept), cell(s.test), s.passes, f"{s.seconds:.2f}", s.memory, s.stale)
        for s in played.steps
    ]  # fmt: skip
    title = f"A stream of {len(played.steps)} requests: {played.course.method}, retention {played.course.term}"
    return page(title, ["Accuracies with one-sided 95 % Wilson bounds."], heads, lines, [("Accuracy and cost", plot(played))])
