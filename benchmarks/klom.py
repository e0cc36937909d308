"""KLOM of one candidate in floors, as audits read it, beside the published form of a population: do they rank methods alike?

    EXPUNGE_CACHE=cache python benchmarks/klom.py [digits-wrong] [models, default 20]

For each method M candidates (seeds 0..M-1, each beside one of nine originals) and M retrained models. Single: the mean over candidates of klom_ratio, with 3
other retrained models as references. Binned: `klom_binned` of all candidates and all retrained models. Both are means over examples of a part.
"""

from __future__ import annotations

import sys

import torch
from scipy.stats import spearmanr

from expunge.audits.distance import klom_binned, klom_distance, klom_floor
from expunge.engine.run import unlearn
from expunge.modalities.worlds import cache_folder, world
from expunge.parts.reading import score
from expunge.planning.outcome import patched

METHODS = ("fine_tune", "random_label", "salun", "scrub", "bad_teacher", "prune_unlearn", "reset_fine_tune", "fisher_forgetting", "ssd", "l1_sparse")
PARTS = ("forget", "retain", "test")


def main(name: str = "digits-wrong", models: str = "20") -> None:
    """Print both readings of every method, and Spearman's rank correlation on each part."""
    w, cache, m = world(name), cache_folder(), int(models)
    scenario = next(iter(w.scenarios))
    split, originals = w.split(scenario), [w.original(k, cache) for k in range(9)]

    def margins(found: list) -> dict[str, torch.Tensor]:
        return {part: torch.stack([score(model, w.task, getattr(split, part)).margin for model in found]) for part in PARTS}

    gone = margins([w.retrained(scenario, k, cache) for k in range(m)])
    few = margins([w.retrained(scenario, m + k, cache) for k in range(3)])
    table = {"retrain": margins([w.retrained(scenario, m + 3 + k, cache) for k in range(m)]), "nothing": margins(originals)}
    for method in METHODS:
        tries = [(k, unlearn(method, originals[k % 9], w.task, split, seed=k)) for k in range(m)]
        table[method] = margins([patched(originals[k % 9], attempt) for k, attempt in tries if attempt.patch is not None])
    print(f"{'':16}" + "".join(f"{part + ' single':>16}{part + ' binned':>16}" for part in PARTS))
    read = {
        name: [v for part in PARTS for v in (single(found[part], few[part]), float(klom_binned(found[part], gone[part]).mean()))]
        for name, found in table.items()
    }
    for name, values in read.items():
        print(f"{name:16}" + "".join(f"{v:16.3f}" for v in values))
    for k, part in enumerate(PARTS):
        rho = spearmanr([v[2 * k] for v in read.values()], [v[2 * k + 1] for v in read.values()])
        print(f"{part}: Spearman {rho.statistic:.2f} over {len(read)} methods")


def single(candidates: torch.Tensor, references: torch.Tensor) -> float:
    """Mean over candidates of mean distance / mean floor, as `klom_ratio`."""
    return sum(float(klom_distance(c, references).mean()) for c in candidates) / len(candidates) / float(klom_floor(references).mean())


if __name__ == "__main__":
    main(*sys.argv[1:])
