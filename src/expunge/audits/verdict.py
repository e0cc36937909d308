"""The verdict: default rules, the self-test of every rule, and the reading of both.

A rule counts only if it is shown to work on this very model and data: the untouched original must fail a forgetting rule, an untrained model
must fail a utility rule, both by their values and not by the width of an interval alone, and, where retrained models are at hand, one held out
from the references must pass. A rule that fails its self-test is `unusable`: it is printed as such and is never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from expunge.audits.core import Probe, Row, audit, gate
from expunge.core.modality import of
from expunge.core.registry import CHECKS
from expunge.parts.training import fresh

UTILITY = ("drop.", "accuracy.retain", "accuracy.test", "klom_ratio.retain", "klom_ratio.test", "error.retain", "error.test",
           "wording.retain.", "wording.test.", "wording.forget.broken", "canvas.ira", "canvas.cra", "redirection.shift",
           "zero_shot.retain", "zero_shot.test", "gan.rarest", "gan.distance", "reconstruction.lost.retain", "reconstruction.lost.test", "reconstruction.worst",
           "oracle_gap.psnr.retain", "oracle_gap.psnr.test", "hub.quality", "hub.alignment", "hub.selective", "hub.pinpoint", "hub.worst", "hub.drift",
           "coverage.")  # fmt: skip
"""Prefixes of rows that measure what must stay; every other ruled row measures what must go."""

FEW = "inside the rule but for its interval: so few records"


@dataclass(frozen=True)
class Trial:
    """A rule's self-test. `original`: what the model that must fail read; `retrained`: what the held-out retrained model read, or "". Both say so where
    only too few records stand between the value and its proper verdict."""

    name: str
    rule: str
    original: str
    retrained: str
    usable: bool


def default_rules(p: Probe) -> dict[str, str]:
    """Rules for this task, request and references; absolute ones where there is no reference."""
    return of(p.task).rules(p)


def checks_for(rules: Iterable[str]) -> list[str]:
    """Names of the checks whose rows the rules read, by the row or its first word."""
    whole = {
        "gap_closed.klom": ("klom",),
        "gap_closed.kl": ("divergence",),
        "gap_closed.relearning": ("relearning",),
        "gap_closed.margin": ("nearness",),
        "restore.retain": ("benign",),
        "restore.closed": ("benign",),
    }
    words = {"klom_ratio": ("klom",), "klom_before": ("klom",), "klom_floor": ("klom",)}
    words |= dict.fromkeys(("kl", "js", "kl_floor", "js_floor"), ("divergence",)) | dict.fromkeys(("average_gap", "tow", "aus"), ("literature",))
    words |= {"membership_svc_published": ("membership_svc",), "wasserstein_floor": ("wasserstein",)}
    found = {check for name in rules for check in whole.get(name) or words.get(name.split(".")[0], (name.split(".")[0],))}
    return sorted(found & set(CHECKS))


def selftest(p: Probe, rules: Mapping[str, str]) -> list[Trial]:
    """Try every rule on a model whose truth is known. `p.after` is not read."""
    held, others = (p.references[0], p.references[1:]) if len(p.references) >= 2 else (None, ())
    wrong = {"goes": replace(p, after=p.before), "stays": replace(p, after=fresh(p.before, p.seed + 1))}
    side = {"goes": [n for n in rules if not n.startswith(UTILITY)], "stays": [n for n in rules if n.startswith(UTILITY)]}
    rows = {key: audit(probe, checks_for(side[key]), slow=False) if side[key] else [] for key, probe in wrong.items()}
    good = audit(replace(p, after=held, references=others, spread=p.references), checks_for(rules), slow=False) if held is not None else None
    trials = []
    for name, rule in rules.items():
        bad = rows["stays" if name.startswith(UTILITY) else "goes"]
        refuses, few = _refuses(bad, name, rule)
        accepts = good is None or not gate(good, {name: rule})
        fair = "" if good is None else _read(good, name) + _refuses(good, name, rule)[1]
        trials.append(Trial(name, rule, _read(bad, name) + few, fair, refuses and accepts))
    return trials


def _refuses(rows: Sequence[Row], name: str, rule: str) -> tuple[bool, str]:
    """Whether a model breaks the rule at its value; and, where only the end of its interval does, that so few records cannot tell."""
    row = next((r for r in rows if r.name == name and not math.isnan(r.value)), None)
    if row is None:
        return False, ""
    if gate([replace(row, low=row.value, high=row.value)], {name: rule}):
        return True, ""
    return False, f", {FEW} (n = {row.n}) cannot tell" if gate([row], {name: rule}) else ""


def _read(rows: Sequence[Row], name: str) -> str:
    found = [r for r in rows if r.name == name]
    return f"{found[0].value:.3g} ({found[0].low:.3g} to {found[0].high:.3g})" if found else "not measured"


def blind(trials: Sequence[Trial]) -> bool:
    """Whether no usable rule measures forgetting."""
    return not any(t.usable and not t.name.startswith(UTILITY) for t in trials)


def judge(rows: Sequence[Row], trials: Sequence[Trial]) -> list[str]:
    """Reasons to refuse: broken usable rules; and when no usable rule measures forgetting, that. Empty means pass."""
    reasons = gate(rows, {t.name: t.rule for t in trials if t.usable})
    if blind(trials):
        few = [f"{t.name} reads {seen}" for t in trials if not t.usable for seen in (t.original, t.retrained) if FEW in seen]
        why = f" ({'; '.join(few)})" if few else ""
        reasons.append(f"no usable check of forgetting: each failed its self-test on this model and data{why}, so nothing can be certified")
    return reasons
