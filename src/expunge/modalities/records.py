"""What modalities of records share: which classes a request removes, the score that tuning reads, and the absolute rules of their gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.modality import Level, of
from expunge.core.stats import Z, auc
from expunge.core.types import Split, Task, absent, spread
from expunge.parts.forms import better, neighbours, paired
from expunge.parts.reading import Scores, score

PLANTS = {"plants.margin": ">= 0.5", "plants.known": "<= 0.1", "plants.relearn": ">= 0.5"}
"""What planted controls of a request of records may read, beside what `planted` says (docs/planted-controls.md)."""
ALIKE, REPAIRED = 20, 50
"""Records from which on an interval can tell that they are like unseen ones (fewer are held to a test), and that what repairs bring back of them is little."""

COMPARED = 1024
"""About as many validation records of the forms of the records to forget are read for a score."""

MOST, FEW = 128, 100
"""Most records that `kept` reads, and the fewest that say anything."""


def planted(p: Any) -> dict[str, str]:
    """Rules on planted controls, where they are at hand or still to come; none else. Of one or two records no repair can be read, and the AUC has room for the
    ten plants of ten twins."""
    if p.plants is None:
        return {}
    n = len(p.split.forget)
    width = "0.25..0.75" if n >= ALIKE else "0.2..0.8" if n > 2 else "0.15..0.85"
    alike = {"plants.unseen": width} if n >= ALIKE else {"plants.unseen.p": ">= 0.02"}
    back = {"plants.repair": f"<= {0.5 if n >= REPAIRED else 0.85}"} if n > 2 else {}
    return {"plants.auc": width, **PLANTS, **alike, **back}


def few(p: Any) -> bool:
    """Whether planted controls stand in for repairs of the candidate, which need more records than the request has."""
    return p.plants is not None and len(p.split.forget) < REPAIRED


def mislabelled(data: Any, classes: int, generator: torch.Generator) -> Any:
    """The same inputs, each under one of the other classes, all as likely."""
    return replace(data, y=(data.y + torch.randint(1, classes, (len(data),), generator=generator)) % classes)


def removed(split: Split) -> list[int]:
    """Classes that the request removes: forget holds examples of them and retain holds none. Empty without retain, or where records have no class."""
    forget, retain = (getattr(part, "y", None) for part in (split.forget, split.retain))
    return [] if forget is None or retain is None else absent(forget, retain).tolist()


def kinds(split: Split) -> tuple[str, ...]:
    """ "class" where the request removes one, "records" else; both where there is no retain, which alone could tell."""
    if split.retain is None:
        return ("records", "class")
    return ("class",) if removed(split) else ("records",)


def validation(model: nn.Module, task: Task, split: Split) -> Callable[[nn.Module], float] | None:
    """A score for tuning and stopping, larger is better, 0 at best: reads forget and validation, never test; None without validation.

    Records: -max(0, 2 |A - 1/2| - 2 Z / sqrt(12 n)), A the mean over records to forget of the share of validation records of the same form (`parts.forms`)
    with a larger loss, of which what n records read by chance counts as nothing: else the accident of few records would cost utility. Without labels,
    or where validation has no such form, of all of them. Removed class: -(accuracy on forget). In both, minus twice the accuracy lost on validation (where
    there are no labels: the relative rise of its loss).
    """
    if split.validation is None:
        return None
    gone = torch.tensor(of(task).removed(split))
    start = score(model, task, split.validation)
    like = None if len(gone) else _like(split)

    def utility(s: Scores) -> float:
        if s.labels is None:
            return -float(s.nll.mean()) / max(float(start.nll.mean()), 1e-12)
        keep = ~torch.isin(s.labels, gone)
        return float(s.correct[keep].float().mean()) if bool(keep.any()) else 0.0

    def known(now: nn.Module, forget: Scores, unseen: Scores) -> float:
        if like is None:
            return auc(unseen.nll, forget.nll)[0]
        data, form, mine = like
        nll = score(now, task, data).nll
        return float(torch.cat([better(forget.nll[mine == k], nll[form == k]) for k in mine[mine >= 0].unique().tolist()]).mean())

    def validate(now: nn.Module) -> float:
        forget, unseen = score(now, task, split.forget), score(now, task, split.validation)
        chance = 2 * Z / (12 * len(forget.nll)) ** 0.5
        remains = float(forget.correct.float().mean()) if len(gone) else max(0.0, 2 * abs(known(now, forget, unseen) - 0.5) - chance)
        return -remains - 2 * max(0.0, utility(start) - utility(unseen))

    return validate


def _like(split: Split) -> tuple[Any, Tensor, Tensor] | None:
    """(Validation records as `parts.forms.paired` names them, (M,) their forms, (n,) those of the records to forget); None without labels or such records."""
    forget, unseen = split.forget, split.validation
    y = [getattr(part, "y", None) for part in (forget, unseen)]
    if any(not isinstance(v, Tensor) or v.dim() != 1 or v.is_floating_point() for v in y):
        return None
    said = neighbours(forget, split.retain)
    rows, labels, form, mine = paired(forget.y, forget.y if said is None else said, unseen.y, COMPARED)
    return (replace(unseen.take(rows), y=labels), form, mine) if len(rows) else None


def kept(model: nn.Module, task: Task, split: Split) -> float | None:
    """What the model is good for, 0 for the best constant and 1 for no error: accuracy above the share of the commonest class, or the share of the targets'
    variance that the predictions explain. Read on at most MOST records of validation, else of retain, without removed classes, and without targets beyond
    those of retain; None where fewer than FEW are left, or all say the same."""
    gone = of(task).removed(split)
    for data in (split.validation, split.retain):
        if data is None or not hasattr(data, "take") or not hasattr(data, "y"):
            continue
        stays = _stays(data, split, gone)
        if len(stays) < FEW:
            continue
        s = score(model, task, data.take(stays[spread(len(stays), MOST)]))
        if s.labels is not None:
            found = correct(s.correct, s.labels)
            return None if found.chance == 1 else found.above
        if s.target is None:
            return None
        spread_out = float((s.target - s.target.mean(0)).square().sum())
        return None if spread_out == 0 else 1 - float((s.pred.reshape(s.target.shape) - s.target).square().sum()) / spread_out
    return None


ENOUGH = 181
"""Records from which on an AUC is told from 0.6 by its interval (`audits.power`); fewer are tested."""


FEWER = 30
"""Records below which what is known is tested against unseen ones even where retrained models are at hand."""


def mended(p: Any, fewer: int = FEWER) -> dict[str, str]:
    """The rule on repairs that train nothing: at most half is back, or, of fewer records that can be tested, they are no better known than unseen ones then."""
    if len(p.split.forget) < fewer and "test" in p.split.parts() and not p.removed():
        return {"repair.p": ">= 0.025"}
    return {} if few(p) else {"repair.free": "<= 0.5"}


def unnoticed(p: Any) -> dict[str, str]:
    """Rules of a request for records without retrained models: the forgotten ones are no better known than unseen ones of the same form. One-sided: that they
    are less well known, as wrong labels are by a model that never saw them, is no sign of memory."""
    return {"unseen.p": ">= 0.05"} if len(p.split.forget) < ENOUGH else {"unseen.auc": "<= 0.6"}


def level(p: Any, model: nn.Module, part: str) -> Level | None:
    """Accuracy without removed classes, beside the share of the commonest class; or the share of the targets' variance that the predictions explain, beside 0
    for their mean, without targets beyond those of retain."""
    data, s, gone = getattr(p.split, part), p.seen(model, part), p.removed()
    if s.labels is not None:
        keep = ~torch.isin(s.labels, torch.tensor(gone))
        return None if not bool(keep.any()) else correct(s.correct[keep], s.labels[keep])
    if s.target is None or s.pred is None:
        return None
    rows = _stays(data, p.split, gone)
    y, guess = s.target[rows], s.pred.reshape(s.target.shape)[rows]
    spread_out = float((y - y.mean(0)).square().sum()) if len(y) else 0.0
    if spread_out == 0:
        return None
    explained = 1 - float((guess - y).square().sum()) / spread_out
    return Level("share of the targets' variance explained", explained, 0.0, explained, len(y))


def correct(right: Tensor, labels: Tensor) -> Level:
    """Accuracy of (N,) bool beside the share of the commonest of labels (N,).

    >>> level = correct(torch.tensor([True, True, False, True]), torch.tensor([0, 1, 1, 1]))
    >>> level.value, level.chance, level.n
    (0.75, 0.75, 4)
    """
    share, chance = float(right.float().mean()), float(labels.bincount().max()) / len(labels)
    return Level("accuracy", share, chance, 1.0 if chance == 1 else (share - chance) / (1 - chance), len(labels))


def _stays(data: Any, split: Split, gone: list[int]) -> Tensor:
    """Positions of records without removed classes, and without targets beyond those of retain."""
    stays = torch.isin(data.y, torch.tensor(gone)).logical_not().reshape(len(data), -1).all(1)
    if data.y.is_floating_point() and split.retain is not None:
        low, high = split.retain.y.amin(0), split.retain.y.amax(0)
        stays &= ((data.y >= low) & (data.y <= high)).reshape(len(data), -1).all(1)
    return stays.nonzero().squeeze(1)


def rules(p: Any) -> dict[str, str]:
    """Rules of a gate for real-valued targets: a gap closed with at least two references, membership else; at most 15 % of the error added on test."""
    goes = {"gap_closed.klom": ">= 0.5"} if len(p.references) >= 2 else {"membership.loss_auc": "0.35..0.65"}
    return {**goes, "repair.free": "<= 0.5", "drop.test": "<= 0.15"}
