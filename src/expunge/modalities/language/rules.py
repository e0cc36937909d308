"""The default gate of language models."""

from __future__ import annotations

from typing import Any

from expunge.modalities.records import mended, planted, unnoticed

FEW, FEW_ALONE = 20, 10
"""Forgotten records from which on relearning one half says something of the other, and an interval can tell what is known from a tenth; the second where no
unseen ones are at hand that fewer could be tested against."""

SPEAKS = {"retain": {"wording.retain.lost": "<= 0.1"}, "test": {"wording.test.broken": "<= 0.25"}, "forget": {"wording.forget.broken": "<= 0.5"}}
"""By the part that is read, the first that is there: what must still be said. A method may garble what it forgot, and some of what looks like it."""


def rules(p: Any) -> dict[str, str]:
    """One rule at least of every family of evidence (`audits.grade`) that can be read.

    With retrained models, from one on: what is known of the answers (`known.excess`); the gap of margins that was closed, and forget quality at the 5 % level
    (D at most its critical value) where so many records can tell the original from a retrained model by it; what relearning one half brings back of the
    other. Fewer than FEW are tested against unseen ones besides. Without: forgotten texts are no better known than unseen ones, or, where there
    are none, extraction strength, which is indicative; and greedy answers must read like answers, since neither tells a model that forgot from one that
    says nothing. In both, repairs that train nothing bring back at most half, and at most 5 % of a kept token's probability is lost.
    """
    parts = p.split.parts()
    keep = {f"drop.{part}": "<= 0.05" for part in ("retain", "general") if part in parts}
    few = FEW if "test" in parts else FEW_ALONE
    back, on_plants = mended(p, few), planted(p)
    if p.references:
        told = {r.name: r for r in p.rows(["tofu"], after=p.before)}.get("tofu.d_over_critical")
        quality = {"tofu.d_over_critical": "<= 1"} if told is not None and told.value > 1 else {}
        again = (unnoticed(p) if "test" in parts else {}) if len(p.split.forget) < few else {"gap_closed.relearning": ">= 0.5"}
        return {"known.excess": "<= 0.1", "gap_closed.margin": ">= 0.5", **quality, **again, **on_plants, **back, **keep}
    goes = on_plants or (unnoticed(p) if "test" in parts else {"memorised.extraction_strength.forget": "<= 0.2"})
    return {**goes, **back, **keep, **next(rule for part, rule in SPEAKS.items() if part in parts)}
