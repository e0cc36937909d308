"""What an image-to-image model makes of its inputs: error, PSNR, and what a judge sees in the completed images. Sources: cards i2i and mri-erase.

Groups: forget, retain, test (what stays), and test_gone (test images of what forget shows and retain does not: of a removed class or source).
A retrained model completes such an image too, in the style of what it knows: forgetting is right where it is as bad as that model, and not where it is
worst. So oracle_gap is signed, and a candidate that answers with noise overshoots.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import GROUP, paired
from expunge.audits.pictures.canvas import frechet
from expunge.core.registry import check
from expunge.core.stats import bootstrap, mean, wilson
from expunge.core.types import Batches
from expunge.modalities.image_to_image.task import psnr


def shown(p: Probe, part: str) -> list[str]:
    """What the images of a part show, "" where the task does not say."""
    task: Any = p.task
    return [task.shows.get(int(k), "") for k in getattr(p.split, part).ids.tolist()]


def groups(p: Probe) -> dict[str, tuple[str, Tensor]]:
    """Group -> part of the split and positions in it."""
    parts = [name for name in ("forget", "retain", "test") if getattr(p.split, name) is not None]
    found = {part: (part, torch.arange(len(getattr(p.split, part)))) for part in parts}
    gone = set(shown(p, "forget")) - set(shown(p, "retain")) - {""} if "retain" in found else set()
    if "test" in found and gone:
        leaves = torch.tensor([word in gone for word in shown(p, "test")])
        found |= {name: ("test", rows.nonzero().squeeze(1)) for name, rows in (("test", ~leaves), ("test_gone", leaves)) if bool(rows.any())}
    return found


def decibels(p: Probe, model: nn.Module, part: str, rows: Tensor) -> Tensor:
    """(N,) PSNR of completed images."""
    task: Any = p.task
    s = p.seen(model, part)
    return psnr(s.pred[rows], s.target[rows], task.span)


def right(p: Probe, model: nn.Module, part: str, rows: Tensor) -> Tensor:
    """(N,) bool: the judge names the completed image as what it is."""
    return _right(p, p.seen(model, part).pred[rows], part, rows)


def _right(p: Probe, images: Tensor, part: str, rows: Tensor) -> Tensor:
    task: Any = p.task
    judge, words = task.judge(), shown(p, part)
    return torch.tensor([said == words[k] for said, k in zip(judge.says(images, next(iter(judge.models))), rows.tolist(), strict=True)])


def unfilled(p: Probe, part: str) -> Tensor:
    """(N, C, H, W) what was measured and nothing else: completed with the darkest value."""
    task: Any = p.task
    data = getattr(p.split, part)
    batches = Batches(task.collate, data, len(data))
    batch = batches[0]
    return task.corruption.complete(batch["x"], batch["mask"], torch.full_like(batch["y"], task.span[0]))


@check(tasks=("image_to_image",), needs=("forget",))
def reconstruction(p: Probe) -> list[Row]:
    """By group: reconstruction.error (mean squared error), .psnr (dB), .lost (dB against the model before, image by image); reconstruction.worst: what
    lost most of retain and test. With a judge: .recognised (share of completed images that it names rightly), _before, and .unfilled (the share it names
    rightly in what was measured alone: no model can be asked to hide that); .distance: Frechet distance of its features to those of the whole images.
    """
    task: Any = p.task
    rows: list[Row] = []
    losses: dict[str, list[Tensor]] = {}
    for group, (part, index) in groups(p).items():
        n = len(index)
        after, before = (decibels(p, model, part, index) for model in (p.after, p.before))
        s = p.seen(p.after, part)
        rows.append(Row(f"reconstruction.error.{group}", *mean(s.nll[index]), n, "squared error, mean over pixels"))
        rows.append(Row(f"reconstruction.psnr.{group}", *mean(after), n, "dB"))
        rows.append(paired(f"reconstruction.lost.{group}", before - after, "dB of PSNR, against the model before on the same inputs"))
        if group in ("retain", "test") and task.shows:
            words = shown(p, part)
            for k, lost in zip(index.tolist(), before - after, strict=True):
                losses.setdefault(words[k], []).append(lost)
        if task.judge is not None:
            rows += judged(p, group, part, index)
    return rows + worst({word: torch.stack(lost) for word, lost in losses.items()})


def judged(p: Probe, group: str, part: str, index: Tensor) -> list[Row]:
    """The rows of a group that a judge is asked for."""
    task: Any = p.task
    judge, n = task.judge(), len(index)
    domain = next(iter(judge.models))
    sure = judge.right[domain].float()
    note = f"judge right on held-out images: {float(sure.mean()):.3f} of {len(sure)}"
    images = {"": p.seen(p.after, part).pred[index], "_before": p.seen(p.before, part).pred[index]}
    rows = [Row(f"reconstruction.recognised{k}.{group}", *wilson(int(_right(p, x, part, index).sum()), n), n, note) for k, x in images.items()]
    if task.corruption is not None and group in ("forget", "test_gone"):
        hits = int(_right(p, unfilled(p, part)[index], part, index).sum())
        rows.append(Row(f"reconstruction.unfilled.{group}", *wilson(hits, n), n, f"what was measured, the rest dark; {note}"))
    if n > 1:
        real = judge.features(p.seen(p.after, part).target[index], domain)
        for k, x in images.items():
            value = frechet(judge.features(x, domain), real)
            rows.append(Row(f"reconstruction.distance{k}.{group}", value, value, value, n, "features of the judge; biased upwards for few images"))
    return rows


def worst(losses: dict[str, Tensor]) -> list[Row]:
    """reconstruction.worst of dB lost (N,) by what is shown: the largest mean, between the largest of the lower and of the upper bounds, which hold for
    all at once (Bonferroni)."""
    large = {word: lost for word, lost in losses.items() if len(lost) >= GROUP}
    z = NormalDist().inv_cdf(1 - 0.05 / max(1, len(large)))
    each = [paired("reconstruction.worst", lost, f"dB of PSNR; {word}, the worst of {len(large)}", z) for word, lost in large.items()]
    return [replace(max(each, key=lambda r: r.value), low=max(r.low for r in each), high=max(r.high for r in each))] if each else []


@check(tasks=("image_to_image",), needs=("forget",), reference=True)
def oracle_gap(p: Probe) -> list[Row]:
    """By group, against models retrained without the forget set: oracle_gap.psnr (dB, above 0: better than retrained), .recognised (share that the judge
    names rightly, minus theirs), .apart (mean squared difference between the candidate's images and theirs) with its floor between them.

    oracle_gap.closed = (PSNR before - PSNR after) / (PSNR before - PSNR retrained) on forget: 0 for doing nothing, 1 for a retrained model, above 1 where
    the images are worse than its own; nan where doing nothing is not better than retrained.
    """
    task: Any = p.task
    refs, rows = p.references, []
    note = f"against the mean of {len(refs)} retrained models"
    for group, (part, index) in groups(p).items():
        theirs = torch.stack([decibels(p, r, part, index) for r in refs]).mean(0)
        mine, before = (decibels(p, model, part, index) for model in (p.after, p.before))
        rows.append(paired(f"oracle_gap.psnr.{group}", mine - theirs, f"dB; {note}"))
        if task.judge is not None:
            named = torch.stack([right(p, r, part, index).float() for r in refs]).mean(0)
            rows.append(paired(f"oracle_gap.recognised.{group}", right(p, p.after, part, index).float() - named, note))
        images = [p.seen(r, part).pred[index] for r in refs]
        far = torch.stack([_apart(p.seen(p.after, part).pred[index], x) for x in images]).mean(0)
        rows.append(Row(f"oracle_gap.apart.{group}", *mean(far), len(index), f"mean over {len(refs)} retrained models"))
        pairs = [_apart(a, b) for i, a in enumerate(images) for b in images[:i]]
        if pairs:
            rows.append(Row(f"oracle_gap.floor.{group}", *mean(torch.stack(pairs).mean(0)), len(index), f"{len(pairs)} pairs of retrained models"))
        if group == "forget":
            rows.append(closed(before, mine, theirs, p.seed, note))
    return rows


def closed(before: Tensor, after: Tensor, oracle: Tensor, seed: int, note: str = "") -> Row:
    """oracle_gap.closed of PSNR (N,) with a bootstrap over images.

    >>> closed(torch.tensor([20.0, 22.0]), torch.tensor([14.0, 16.0]), torch.tensor([12.0, 14.0]), 0).value
    0.75
    """
    n = len(before)
    if paired("", before - oracle, "").low <= 0:
        return Row("oracle_gap.closed", math.nan, -math.inf, math.inf, n, "the model before is not better than retrained ones here: no gap to close")

    def share(r: Tensor) -> float:
        return float((before[r] - after[r]).mean() / (before[r] - oracle[r]).mean().clamp(min=1e-6))

    return Row("oracle_gap.closed", share(torch.arange(n)), *bootstrap(share, n, seed), n, note)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
