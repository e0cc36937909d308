"""The run that test_exact kills: fit, then three deletions, each done only if it was not done before."""

from __future__ import annotations

from pathlib import Path

import torch

from expunge.guarantees.exact.design import s3t, safe, sisa
from expunge.guarantees.exact.ensemble import fit, load
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples

DESIGNS = {
    "sisa": sisa(shards=3, slices=2, epochs=6), "sisa-detach": sisa(shards=3, slices=3, epochs=6, detach=True), "safe": safe(shards=4, epochs=6),
    "s3t": s3t(shards=2, slices=2, budget=2, epochs=2),
}  # fmt: skip
CUTS = {"sisa": 0.5, "sisa-detach": 0.5, "safe": 0.5, "s3t": 0.7}
"""Seconds within which a run is killed."""


def sample(n: int, seed: int = 0) -> Examples:
    """n records of 4 numbers with 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return Examples(x, x[:, :3].argmax(1), torch.arange(n))


def deletions(name: str, folder: Path) -> None:
    """Fit or go on, delete what is not deleted yet."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nets.mlp(4, 3, 8)
    data, task = sample(80), classification()
    if (folder / "book.json").exists():
        e = load(folder, model, task, data)
    else:
        e = fit(DESIGNS[name], model, task, data, folder=folder, batch_size=8, lr=0.1, rank=2)
    for ids in ([3], [17, 40], [5, 6, 7]):
        if not set(ids) <= e.state.gone:
            e.forget(ids)
