"""Do drawings look like real images, do they cover them, and is any of them a copy? Source: improved precision and recall, Kynkaanniemi et al. 2019.

A point's ball reaches to its k-th nearest other point of its own set (k = 3); the manifold of a set is the union of its balls.

    precision   share of drawings in the manifold of real images
    recall      share of real images in the manifold of drawings
    nearest     distance in pixels of a drawing to the nearest forget image

Before and after draw from the same noise, and these are the drawings of the check `canvas`. Values depend on how many points there
are: both sets hold equally many of each combination of concepts, and what real images read against other real images stands beside. A stray point has a
large ball, and a judge's features were not made for images that look like nothing: an untrained model may read half the precision, but little recall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.pictures.canvas import asked
from expunge.core.errors import DataError
from expunge.core.registry import check
from expunge.core.stats import auc, wilson
from expunge.modalities.pictures import Pictures

K, MOST, SIDE, RARE = 3, 2000, 32, 0.05
"""Neighbour that a ball reaches to; most images of a part, and most pixels a side, that are looked at; share of new images that count as copies."""


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) Euclidean distances between points (N, ...) and (M, ...); exactly 0 between equal points."""
    return torch.cdist(a.flatten(1).float(), b.flatten(1).float(), compute_mode="donot_use_mm_for_euclid_dist")


def others(x: Tensor) -> Tensor:
    """(N, N) distances between points of one set, infinite from each to itself."""
    return distances(x, x).fill_diagonal_(torch.inf)


def inside(points: Tensor, x: Tensor, k: int = K) -> Tensor:
    """(M,) bool: which points (M, D) lie in the manifold of x (N, D), edges included. Raises DataError when x has k points or fewer.

    By hand, k = 3: on 0, 1, 2, 3, 4 the balls reach 3, 2, 2, 2, 3 far, so that 7 is the last point inside.
    >>> line = torch.arange(5.0)[:, None]
    >>> inside(torch.tensor([[-4.0], [-3.0], [2.5], [7.0], [7.1]]), line).tolist()
    [False, True, True, True, False]
    """
    if len(x) <= k:
        raise DataError(f"{len(x)} image(s) make no manifold: more than {k} are needed")
    reach = others(x).kthvalue(k, dim=1).values
    return (distances(points, x) <= reach).any(1)


def matched(wanted: Sequence[Mapping[str, Any]], real: Sequence[Mapping[str, Any]], fields: Sequence[str], seed: int, sets: int = 1) -> tuple[Tensor, ...]:
    """Positions of as many rows of `wanted` as of `real` from each combination of concepts, in the same order, and `sets` - 1 further sets of `real`.

    >>> rows = [{"a": "x"}, {"a": "y"}, {"a": "x"}]
    >>> [i.tolist() for i in matched(rows, [{"a": "y"}, {"a": "x"}, {"a": "z"}], ["a"], 0)]
    [[0, 1], [1, 0]]
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed)).tolist()
    keys = [tuple(row.get(f) for f in fields) for row in wanted]
    there: dict[tuple, list[int]] = {}
    for j in order:
        there.setdefault(tuple(real[j].get(f) for f in fields), []).append(j)
    mine: list[int] = []
    found: list[list[int]] = [[] for _ in range(sets)]
    for key in dict.fromkeys(keys):
        rows, images = [i for i, other in enumerate(keys) if other == key], there.get(key, [])
        n = min(len(rows), len(images) // sets)
        mine += rows[:n]
        for k in range(sets):
            found[k] += images[k * n : (k + 1) * n]
    return tuple(torch.tensor(index, dtype=torch.long) for index in (mine, *found))


def images(p: Probe, part: str) -> Pictures | None:
    """At most MOST records of a part, drawn by seed, with their images as a judge sees them; None where it has none."""
    data, task = getattr(p.split, part), p.task
    if data is None or data.x is None:
        return None
    some = data if len(data) <= MOST else data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(p.seed))[:MOST])
    decode = getattr(task, "decode", None)
    if decode is None:
        return some
    with torch.no_grad():
        return replace(some, x=torch.cat([decode(x) for x in some.x.split(128)]).cpu())


def pixels(x: Tensor) -> Tensor:
    """Images (N, C, H, W), averaged down to SIDE pixels a side where they are larger."""
    return F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[2]), min(SIDE, x.shape[3])))


@check(tasks=("diffusion",), needs=("forget", "retain"))
def coverage(p: Probe) -> list[Row]:
    """coverage.precision and .recall of the drawings of retained concepts in the judge's features, both _before, and _real where other real images stand in
    for the drawings (what a perfect model reads); _drop against the model before on the same noise."""
    q, real = asked(p), images(p, "retain")
    if q is None or real is None:
        return []
    stays = (~q.gone).nonzero().squeeze(1)
    mine, one, two = matched([q.prompts.rows[k] for k in stays.tolist()], real.rows, q.fields, p.seed, sets=2)
    if len(mine) <= K:
        return []
    features = lambda x: q.judge.features(x, q.domain)  # noqa: E731
    base = features(real.x[one])
    drawn = {end: features(q.drawn(p, model)[stays[mine]]) for end, model in (("", p.after), ("_before", p.before))}
    drawn["_real"] = features(real.x[two])
    note = f"{len(mine)} drawings, as many images, k = {K}, features of the {q.domain} judge"
    rows = []
    for what, seen in (("precision", lambda y: inside(y, base)), ("recall", lambda y: inside(base, y))):
        found = {end: seen(y) for end, y in drawn.items()}
        rows += [Row(f"coverage.{what}{end}", *wilson(int(hit.sum()), len(hit)), len(hit), note) for end, hit in found.items()]
        rows.append(paired(f"coverage.{what}_drop", found["_before"].float() - found[""].float(), "against the model before, on the same noise"))
    return rows


@check(tasks=("diffusion",), needs=("forget", "retain"))
def nearest(p: Probe) -> list[Row]:
    """How near drawings of the erased concept's prompts come to a forget image, in pixels. nearest.copies: share nearer than all but 5 % of new images of the
    concept do (0.05 for a model that draws it and copies nothing); .as_new, .as_kept: chance that a drawing comes nearer than a new image of the concept, than
    a retained image (0.5: neither nearer nor farther); all _before. New images are those of test, or each forget image among the others.

    A blurred drawing is near to everything: read this beside hub.quality.
    """
    q, old, kept = asked(p), images(p, "forget"), images(p, "retain")
    if q is None or old is None or kept is None or len(old) < 2:
        return []
    base, test = pixels(old.x), images(p, "test")
    held = [] if test is None else [k for k, row in enumerate(test.rows) if row.get(q.domain) == q.concept]
    away = lambda x: distances(pixels(x), base).amin(1)  # noqa: E731
    new = away(test.take(held).x) if test is not None and held else others(base).amin(1)
    rest, edge = away(kept.x), float(new.quantile(RARE))
    note = f"{len(old)} forget images; new: {f'{len(held)} of test' if held else 'each among the others'}"
    rows = []
    for end, model in (("", p.after), ("_before", p.before)):
        found = away(q.drawn(p, model)[q.gone])
        n, copies = len(found), int((found <= edge).sum())
        rows.append(Row(f"nearest.copies{end}", *wilson(copies, n), n, f"within {edge:.3g} of a forget image; {note}", at=RARE))
        rows.append(Row(f"nearest.as_new{end}", *auc(new, found), n, note))
        rows.append(Row(f"nearest.as_kept{end}", *auc(rest, found), n, f"{len(rest)} retained images; {note}"))
    return rows
