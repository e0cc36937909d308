"""The run that test_guard kills, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from worlds import small

from expunge.engine.run import unlearn


def salun(epochs: int, digest: Path, folder: Path | None = None) -> None:
    """One run; the digest of its patch goes to a file."""
    torch.set_num_threads(1)
    model, task, split = small("classification")
    attempt = unlearn("salun", model, task, split, seed=2, epochs=epochs, batch_size=4, folder=folder, checkpoint_every=3)
    assert attempt.patch is not None
    digest.write_text(attempt.patch.digest)
