"""What a GAN draws, as a judge sees it. Source: card adapt-then-unlearn-gan (Tiwary et al., TMLR 2025).

    erased     share of drawings that the judge gives the erased class          pul        (before - after) / before, percentage of un-learning
    label      the same share where all are drawn by the erased label           rarest     share of the kept class that is drawn least, of kept drawings
    distance   Frechet distance between the judge's features of drawn and of real retained images; drawings of the erased class left out

Before and after draw from the same latents. A judge has no word for "nothing": a destroyed image counts as some class, so read erased beside the distance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.pictures.canvas import frechet
from expunge.core.registry import check
from expunge.core.stats import wilson
from expunge.core.types import absent
from expunge.modalities.examples import Examples
from expunge.modalities.judge import Judge

DRAWN, BY_LABEL = 1000, 200
"""Drawings, and those by the erased label alone: none of 1,000 is at most 0.003 by Wilson's bound."""


def shares(said: list[str], names: tuple[str, ...], gone: set[str]) -> tuple[tuple[int, int], dict[str, tuple[int, int]]]:
    """(hits, n) of the erased classes together among all drawings, and of each other class among the drawings of kept classes.

    >>> shares(["a", "b", "c", "b"], ("a", "b", "c"), {"a"})
    ((1, 4), {'b': (2, 3), 'c': (1, 3)})
    """
    hits = sum(word in gone for word in said)
    return (hits, len(said)), {n: (said.count(n), len(said) - hits) for n in names if n not in gone}


def unlearned(before: tuple[int, int], after: tuple[int, int]) -> tuple[float, float, float]:
    """(before - after) / before of two counts (hits, n), with bounds from the far ends of the two shares' intervals.

    >>> [round(v, 3) for v in unlearned((95, 1000), (0, 1000))]
    [1.0, 0.967, 1.0]
    """
    a, b = wilson(*before), wilson(*after)
    if not a[0]:
        return math.nan, -math.inf, 1.0
    return 1 - b[0] / a[0], 1 - b[2] / a[1], 1 - b[1] / a[2]


@check(tasks=("gan",), needs=("forget", "retain"))
def gan(p: Probe) -> list[Row]:
    """gan.erased, .erased_before, .pul, .share.CLASS and .share_before.CLASS of kept classes, .rarest, .distance, .distance_before and, where the model
    draws by label, .label. Nothing without a judge, or for a request that leaves every class in the retain set.
    """
    task: Any = p.task
    forget, retain = p.split.forget, p.split.retain
    if task.judge is None or not isinstance(forget, Examples) or not isinstance(retain, Examples) or not len(removed := absent(forget.y, retain.y)):
        return []
    judge: Judge = task.judge()
    (domain, names), *_ = judge.names.items()
    gone = {names[k] for k in removed.tolist()}
    shown = {name: p.once(("gan", p.seed), m, lambda m=m: task.sample(m, DRAWN, seed=p.seed)) for name, m in (("before", p.before), ("after", p.after))}
    said = {name: judge.says(x, domain) for name, x in shown.items()}
    found = {name: shares(words, names, gone) for name, words in said.items()}
    sure = f"judge right on {float(judge.right[domain].float().mean()):.3f} of {len(judge.right[domain])} held-out images"
    rows = [Row(f"gan.erased{end}", *wilson(*found[name][0]), DRAWN, sure) for name, end in (("after", ""), ("before", "_before"))]
    rows.append(Row("gan.pul", *unlearned(found["before"][0], found["after"][0]), DRAWN, "bounds from the far ends of both shares"))
    for name, end in (("after", ""), ("before", "_before")):
        rows += [Row(f"gan.share{end}.{word}", *wilson(*count), count[1], "of drawings of kept classes") for word, count in found[name][1].items()]
    word, count = min(found["after"][1].items(), key=lambda item: item[1][0])
    rows.append(Row("gan.rarest", *wilson(*count), count[1], f"{word}, drawn least of {len(found['after'][1])} kept classes"))
    rows += by_label(p, judge, domain, removed, gone)
    base = judge.features(retain.x, domain)
    for name, end in (("after", ""), ("before", "_before")):
        kept = shown[name][torch.tensor([word not in gone for word in said[name]])]
        v = frechet(judge.features(kept, domain), base) if len(kept) > 1 else math.inf
        rows.append(Row(f"gan.distance{end}", v, v, v, len(kept), f"{len(kept)} drawings, {len(base)} images, features of the judge"))
    return rows


def by_label(p: Probe, judge: Judge, domain: str, removed: Tensor, gone: set[str]) -> list[Row]:
    """gan.label: what the erased labels draw now; the note says what they draw most."""
    task: Any = p.task
    if not task.classes:
        return []

    def words(model: nn.Module) -> list[str]:
        return [word for k in removed.tolist() for word in judge.says(task.sample(model, BY_LABEL, seed=p.seed, label=k), domain)]

    said = words(p.after)
    most = max(sorted(set(said)), key=said.count)
    return [Row("gan.label", *wilson(sum(w in gone for w in said), len(said)), len(said), f"most are now {most}: {said.count(most)} of {len(said)}")]
