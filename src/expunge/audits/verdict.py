"""The verdict: default rules, the self-test of every rule, and the reading of both.

A rule counts only if it is shown to work on this very model and data: the untouched original must fail a forgetting rule, an untrained model
must fail a utility rule, both by their values and not by the width of an interval alone, and, where retrained models are at hand, one held out
from the references must pass. A rule that fails its self-test is `unusable`: it is printed as such and is never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expunge.audits.core import Probe, Row, audit, gate
from expunge.core.registry import CHECKS
from expunge.modalities.judge import renamed, target
from expunge.parts.training import fresh

UTILITY = ("drop.", "accuracy.retain", "accuracy.test", "klom_ratio.retain", "klom_ratio.test", "error.retain", "error.test",
           "wording.retain.", "wording.test.", "wording.forget.broken", "canvas.ira", "canvas.cra", "redirection.shift",
           "zero_shot.retain", "zero_shot.test", "gan.rarest", "gan.distance", "reconstruction.lost.retain", "reconstruction.lost.test", "reconstruction.worst",
           "oracle_gap.psnr.retain", "oracle_gap.psnr.test", "hub.quality", "hub.alignment", "hub.selective", "hub.pinpoint", "hub.worst", "hub.drift",
           "coverage.")  # fmt: skip
"""Prefixes of rows that measure what must stay; every other ruled row measures what must go."""

SPEAKS = {"retain": {"wording.retain.lost": "<= 0.1"}, "test": {"wording.test.broken": "<= 0.25"}, "forget": {"wording.forget.broken": "<= 0.5"}}
"""By the part that is read, the first that is there: what must still be said. A method may garble what it forgot, and some of what looks like it."""

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
    """Rules for this task, request and references; absolute ones where there is no reference.

    Chosen from the power tables (docs/how-to-read-the-evidence.md). KLOM refuses answers that are unlike a retrained model's, in either
    direction; relearning refuses a suppression whose answers look right: both are needed for a class, KLOM alone for records.
    """
    if p.task.name in OWN:
        return OWN[p.task.name](p)
    if p.task.name == "regression":
        goes = {"gap_closed.klom": ">= 0.5"} if len(p.references) >= 2 else {"membership.loss_auc": "0.35..0.65"}
        return {**goes, "drop.test": "<= 0.15"}
    if p.removed():
        limit = _limit(p)
        inside = {"gap_closed.klom": ">= 0.5", "gap_closed.relearning": ">= 0.55"} if len(p.references) >= 2 else {}
        answers = {"accuracy.forget": f"<= {limit:.6f}", "accuracy.forget_test": f"<= {max(limit, 0.1):.6f}"}
        return {**answers, **inside, "drop.test": "<= 0.03", "drop.retain": "<= 0.03"}
    goes = _records(p) if len(p.references) >= 2 else {"membership.loss_auc": "0.4..0.6"}
    return {**goes, "drop.test": "<= 0.03", "drop.retain": "<= 0.03"}


def _pictures(p: Probe) -> dict[str, str]:
    """The concept is drawn no more, under its own and (where test has any) under other names, and at most one in twenty of the others is lost. Without a
    judge: at most a quarter of what told the concept from its anchor is left, and retained prompts moved by at most a tenth. Both, with a judge that was
    tried on no held-out images: it does not stand alone."""
    task: Any = p.task
    predicted = {"redirection.left": "<= 0.25", **({} if p.split.retain is None else {"redirection.shift": "<= 0.1"})}
    if task.judge is None:
        return predicted
    judge: Any = task.judge()
    kept = {} if judge.right else predicted
    if kept and p.split.retain is None:  # nothing says what else could be drawn
        return kept
    domains = list(judge.names)
    other = {} if len(domains) < 2 else {"canvas.cra_drop": "<= 0.05"}
    alias = {"canvas.alias": "<= 0.2"} if renamed(p.split, *target(p.split, domains)) else {}
    return {**kept, "canvas.ua": ">= 0.9", **alias, "canvas.ira_drop": "<= 0.05", **other}


def _matched(p: Probe) -> dict[str, str]:
    """Images of the class are matched to it no more, under its own words and (where the task has any) others, and at most one in twenty of the rest is lost."""
    parts, task = p.split.parts(), p.task
    others = {"zero_shot.forget_other": "<= 0.2"} if "other" in getattr(task, "others", {}) else {}
    return {"zero_shot.forget": "<= 0.1", **others, **{f"zero_shot.{part}_drop": "<= 0.05" for part in ("retain", "test") if part in parts}}


def _drawn(p: Probe) -> dict[str, str]:
    """At most 3 % of a GAN's drawings show the class, and each other one is still drawn."""
    return {"gan.erased": "<= 0.03", "gan.rarest": ">= 0.03"}


def _restored(p: Probe) -> dict[str, str]:
    """With retrained models: the gap to them closed on forget, in neither direction too far. Without: two decibels lost. At most half a decibel elsewhere."""
    task: Any = p.task
    kept = [part for part in ("retain", "test") if part in p.split.parts()]
    if p.references:
        seen = {} if task.judge is None else {"oracle_gap.recognised.forget": "<= 0.15"}
        return {"oracle_gap.closed": "0.7..1.3", **seen, **{f"oracle_gap.psnr.{part}": ">= -0.5" for part in kept}}
    seen = {} if task.judge is None else {"reconstruction.recognised.forget": "<= 0.5"}
    return {"reconstruction.lost.forget": ">= 2", **seen, **{f"reconstruction.lost.{part}": "<= 0.5" for part in kept}}


def _texts(p: Probe) -> dict[str, str]:
    """With retrained models: forget quality at the 5 % level (D at most its critical value), in both directions. Without: membership against unseen
    texts, or, without those, extraction strength; and its greedy answers must read like answers, since neither rule tells a model that forgot from one
    that says nothing. In both, at most 5 % of the probability of a kept token lost."""
    parts = p.split.parts()
    keep = {f"drop.{part}": "<= 0.05" for part in ("retain", "general") if part in parts}
    if p.references:
        return {"tofu.d_over_critical": "<= 1", **keep}
    goes = {"membership.loss_auc": "0.3..0.7"} if "test" in parts else {"memorised.extraction_strength.forget": "<= 0.2"}
    return {**goes, **keep, **next(rule for part, rule in SPEAKS.items() if part in parts)}


OWN: dict[str, Callable[[Probe], dict[str, str]]] = {
    "causal_lm": _texts, "diffusion": _pictures, "contrastive": _matched, "gan": _drawn, "image_to_image": _restored,
}  # fmt: skip
"""Task -> its rules."""


def _records(p: Probe) -> dict[str, str]:
    """klom_ratio.forget at most half way from 1 to what doing nothing reads, and at most 4 floors; the gap, unusable, where doing nothing is not apart."""
    rows = {r.name: r for r in audit(replace(p, after=p.before), ["klom"])}
    if not math.isfinite(rows["gap_closed.klom"].value):
        return {"gap_closed.klom": ">= 0.5"}
    return {"klom_ratio.forget": f"<= {min(4.0, (1 + rows['klom_ratio.forget'].value) / 2):.3g}"}


def _limit(p: Probe) -> float:
    """Highest accuracy on the forget set that retrained models allow (largest upper bound of one), 0.05 without them."""
    probes = [replace(p, after=model, references=()) for model in p.references]
    highs = [row.high for q in probes for row in audit(q, ["accuracy"], slow=False) if row.name == "accuracy.forget"]
    return max(highs, default=0.05) + 1e-6


def checks_for(rules: Iterable[str]) -> list[str]:
    """Names of the checks whose rows the rules read, by the row or its first word."""
    whole = {"gap_closed.klom": ("klom",), "gap_closed.kl": ("divergence",), "gap_closed.relearning": ("relearning",), "restore.retain": ("benign",)}
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
