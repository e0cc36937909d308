"""A stream of deletions served by an exact ensemble: what each one touched and cost, and how well the ensemble predicts after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from expunge.core.stats import wilson
from expunge.guarantees.exact.ensemble import Exact
from expunge.guarantees.exact.proof import Proof
from expunge.report.plots import HUES, INK, STROKES, render


@dataclass(frozen=True)
class Served:
    """One request: components touched and trained, cost as a share of the training of all components, and what the ensemble is after it.

    accuracy (value, low, high) on n held-out records with a Wilson interval; members: how many components predict; bytes: size of the store.
    """

    request: int
    records: int
    touched: int
    trained: int
    share: float
    seconds: float
    members: int
    bytes: int
    accuracy: tuple[float, float, float]
    n: int
    holds: bool


def serve(
    ensemble: Exact, requests: Iterable[Sequence[int]], x: Tensor, y: Tensor, *, told: Callable[[Proof], None] | None = None, progress: Any = None,
) -> list[Served]:  # fmt: skip
    """Delete request after request; the first row is the ensemble before any. `told` gets each proof. x (N, ...), y (N,): held-out records."""
    asked = list(requests)
    rows = [_row(ensemble, 0, None, 0.0, x, y)]
    for k, ids in enumerate(asked, 1):
        began = time.perf_counter()
        proof = ensemble.forget(ids)
        rows.append(_row(ensemble, k, proof, time.perf_counter() - began, x, y))
        if told:
            told(proof)
        if progress:
            progress(f"{ensemble.design.name}: deletions", k, len(asked))
    return rows


def _row(e: Exact, k: int, proof: Proof | None, seconds: float, x: Tensor, y: Tensor) -> Served:
    right = int((e.predict(x).argmax(1) == y).sum())
    touched, trained, share = (len(proof.touched), len(proof.trained), proof.share) if proof else (0, 0, 0.0)
    done = len(proof.ids) if proof else 0
    return Served(k, done, touched, trained, share, seconds, len(e.members()), e.store.bytes(), wilson(right, len(y)), len(y), proof.holds if proof else True)


def document(rows: Sequence[Served]) -> dict[str, Any]:
    """As JSON values, with totals."""
    served = rows[1:]
    return {
        "rows": [asdict(r) for r in rows], "requests": len(served), "share": sum(r.share for r in served), "seconds": sum(r.seconds for r in served),
        "accuracy": {"before": rows[0].accuracy, "after": rows[-1].accuracy, "n": rows[0].n}, "holds": all(r.holds for r in rows),
    }  # fmt: skip


def plot(streams: dict[str, Sequence[Served]], monolithic: tuple[float, float, float] | None = None) -> str:
    """SVG: cumulative cost in full trainings and accuracy with its interval over requests, one line per design. `monolithic`: accuracy of one model trained
    on all.
    """

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        for (name, rows), colour, line in zip(streams.items(), HUES, STROKES, strict=False):
            at, spent, total = [r.request for r in rows], [], 0.0
            for r in rows:
                total += r.share
                spent.append(total)
            axes[0].plot(at, spent, color=colour, linestyle=line, label=name)
            axes[1].plot(at, [r.accuracy[0] for r in rows], color=colour, linestyle=line, label=name)
            axes[1].fill_between(at, [r.accuracy[1] for r in rows], [r.accuracy[2] for r in rows], color=colour, alpha=0.12, linewidth=0)
            axes[2].plot(at, [r.members for r in rows], color=colour, linestyle=line, label=name)
        last = max(len(rows) for rows in streams.values()) - 1
        axes[0].plot([0, last], [0, last], color=INK, linewidth=0.8, linestyle=(0, (1, 2)), label="retraining everything")
        axes[0].set_yscale("symlog", linthresh=0.1)
        if monolithic is not None:
            axes[1].axhline(monolithic[0], color=INK, linewidth=0.8, linestyle=(0, (1, 2)), label="one model, all records")
        for axis, title in zip(axes, ("Cost so far, in full trainings", "Accuracy on held-out records", "Components that predict"), strict=True):
            axis.set_title(title)
            axis.set_xlabel("deletion requests")
        axes[0].legend(loc="lower right")

    return render(10, 3, 3, paint)
