"""Famous quotes and their controls, from the paper of the adversarial compression ratio: lists of texts. Source: card acr (Schwarzschild et al.,
arXiv 2404.15146)."""

from __future__ import annotations

from expunge.modalities.language.benchmarks.files import passage
from expunge.modalities.language.benchmarks.parts import Benchmark, Part, listed

KINDS = {"famous_quotes": "forget", "wikipedia": "retain", "ap-articles-november-2023": "unseen"}
"""File -> kind: what models know by heart, what they were trained on, and news after their training."""

ACR: Benchmark = listed("acr", {n: Part(kind, (n, f"datasets/{n}"), passage) for n, kind in KINDS.items()})
