"""The default gate of multi-label classifiers."""

from __future__ import annotations

from typing import Any


def rules(p: Any) -> dict[str, str]:
    """Forgetting: with retrained models, losses that tell members as well as theirs do; without, losses that do not tell them. At most 3 points of error
    added on test and on retain, labels taken together."""
    goes = {"membership.excess": "-0.1..0.1"} if len(p.references) >= 2 else {"membership.loss_auc": "0.4..0.6"}
    return {**goes, "drop.test": "<= 0.03", "drop.retain": "<= 0.03"}
