"""Do the concepts that tied a removed class to the model still count? Their attribution before and after. Source: card class-concepts.

Directions are found in the features of the model before, and read in both models: `after` is an edit of `before`, so both share a feature
space; a network retrained from scratch does not, and is not compared. For each model a linear bottleneck on the scores is fitted to the model's
own probabilities, and W_ck a_k is what concept k adds to the logit of class c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.audits.drop import badness, paired
from expunge.core.errors import SplitError
from expunge.core.stats import bootstrap, mean, wilson
from expunge.parts.scopes.concepts import bank, bottleneck, class_vectors, contributions, embed, exclusive, linked, nearest_classes

NEIGHBOURS = 3
"""Kept classes that are watched beside a removed one: those that share most concepts with it."""


def attributions(p: Probe, *, kind: str = "nmf", count: int = 20, q: int = 5, layer: str = "") -> list[Row]:
    """Before and after, per removed class c and each of its q linked concepts k, over the forgotten records of c.

    concepts.<c>.<k>.before, .after   mean contribution of the concept to the logit of c
    concepts.<c>.left                 sum over k of |after| / sum of |before|: 1 where nothing changed, 0 where no linked concept counts
    concepts.<c>.held                 the same with bottlenecks fitted to true labels: what the features still hold, whatever the last layer says
    concepts.<c>.neighbour            accuracy on test that the worst of the classes sharing most concepts has lost
    concepts.fidelity.before, .after  share of records on which the bottleneck answers as its model does; low: the rows above say little

    Raises SplitError when no class is removed.
    """
    removed = p.removed()
    if not removed:
        raise SplitError("concept attributions are read for a removed class; retain holds records of all classes in forget")
    forget, retain = p.split.forget, p.split.retain
    y, n = torch.cat([forget.y, retain.y]), len(forget)
    features = {which: torch.cat([embed(p.model(which), p.task, part, layer) for part in (forget, retain)]) for which in ("before", "after")}
    found = bank(features["before"], y, features["before"][n:], kind=kind, count=count, seed=p.seed)
    rows, used, held, vectors = [], {}, {}, torch.empty(0)
    for which, g in features.items():
        a = found.scores(g)
        logits = torch.cat([p.scores(which, part).logits for part in ("forget", "retain")])
        own = bottleneck(a, logits.double().softmax(-1), logits.shape[1])
        true = bottleneck(a, y, logits.shape[1])
        vectors = class_vectors(own, a, y) if which == "before" else vectors
        same = int((own.logits(a).argmax(1) == logits.argmax(1)).sum())
        rows.append(Row(f"concepts.fidelity.{which}", *wilson(same, len(a)), len(a), f"{len(found.directions)} {kind} directions"))
        for c in removed:
            there = a[:n][forget.y == c]
            used[which, c], held[which, c] = contributions(own, there, c), contributions(true, there, c)
    for c in removed:
        top, alone = linked(vectors[c], q), exclusive(vectors, c, q).tolist()
        kept = nearest_classes(vectors, c, retain.y.unique())[:NEIGHBOURS].tolist()
        for k in top.tolist():
            note = "exclusive to the class" if k in alone else "shared with other classes"
            rows += [Row(f"concepts.{c}.{k}.{which}", *mean(used[which, c][:, k]), len(used[which, c]), note) for which in features]
        rows.append(_left(f"concepts.{c}.left", used["before", c][:, top], used["after", c][:, top], p.seed, "by the model's own answers"))
        rows.append(_left(f"concepts.{c}.held", held["before", c][:, top], held["after", c][:, top], p.seed, "by true labels"))
        if p.split.test is not None:
            rows += _neighbour(p, c, kept)
    return rows


def _left(name: str, before: Tensor, after: Tensor, seed: int, note: str) -> Row:
    """sum_k |mean after| / sum_k |mean before| of contributions (n, q), with bootstrap bounds over the records."""

    def share(rows: Tensor | slice) -> float:
        return float(after[rows].mean(0).abs().sum() / before[rows].mean(0).abs().sum().clamp(min=1e-12))

    low, high = bootstrap(share, len(before), seed)
    value = share(slice(None))
    return Row(name, value, min(low, value), max(high, value), len(before), f"{before.shape[1]} linked concepts, {note}")


def _neighbour(p: Probe, c: int, kept: list[int]) -> list[Row]:
    before, after = p.scores("before", "test"), p.scores("after", "test")
    lost = badness(after) - badness(before)
    each = [paired(f"concepts.{c}.neighbour", lost[after.labels == j], f"class {j}, of {kept} nearest") for j in kept if bool((after.labels == j).any())]
    return [max(each, key=lambda r: r.value)] if each else []
