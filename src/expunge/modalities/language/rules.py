"""The default gate of language models."""

from __future__ import annotations

from typing import Any

SPEAKS = {"retain": {"wording.retain.lost": "<= 0.1"}, "test": {"wording.test.broken": "<= 0.25"}, "forget": {"wording.forget.broken": "<= 0.5"}}
"""By the part that is read, the first that is there: what must still be said. A method may garble what it forgot, and some of what looks like it."""


def rules(p: Any) -> dict[str, str]:
    """With retrained models: forget quality at the 5 % level (D at most its critical value), in both directions. Without: membership against unseen
    texts, or, without those, extraction strength; and its greedy answers must read like answers, since neither rule tells a model that forgot from one
    that says nothing. In both, at most 5 % of the probability of a kept token lost."""
    parts = p.split.parts()
    keep = {f"drop.{part}": "<= 0.05" for part in ("retain", "general") if part in parts}
    if p.references:
        return {"tofu.d_over_critical": "<= 1", **keep}
    goes = {"membership.loss_auc": "0.3..0.7"} if "test" in parts else {"memorised.extraction_strength.forget": "<= 0.2"}
    return {**goes, **keep, **next(rule for part, rule in SPEAKS.items() if part in parts)}
