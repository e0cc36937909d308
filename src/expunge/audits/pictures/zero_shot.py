"""Zero-shot answers of contrastive models, and the retrieval of captions. Source: card slug-generation (zero-shot name classification).

zero_shot.forget, .retain, .test    share of images whose class prompt is the nearest; test without the classes that the request removes
zero_shot.forget_test               removed classes on test
zero_shot.*_OTHER                   the same images against the task's other words for the classes, which no search has read
retrieval.forget, .retain, .test    recall at K: share of images with their own caption among the K nearest of the part's different captions (test as above)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.core.guard import quiet
from expunge.core.registry import check
from expunge.core.stats import wilson
from expunge.core.types import absent
from expunge.modalities.contrastive.task import contrastive, images, texts
from expunge.modalities.diffusion.trajectory import distinct
from expunge.modalities.pictures import Pictures
from expunge.parts.reading import Scores, score

K = 5
"""As many wordings as a class has in the worlds: a caption of the right class is not enough, one of five is."""


@check(tasks=("contrastive",), needs=("forget",))
def zero_shot(p: Probe) -> list[Row]:
    """zero_shot.forget, .retain, .test, .forget_test with Wilson bounds, each with its value before (_before); zero_shot.retain_drop and .test_drop: share of
    kept images that were named rightly before and are not now, paired; the rows of the task's other words."""
    task: Any = p.task
    rows = shares(p, task, "")
    for name, prompts in task.others.items():
        rows += shares(p, contrastive(task.names, prompts, domain=task.domain), f"_{name}")
    return rows


def shares(p: Probe, task: Any, suffix: str) -> list[Row]:
    """The rows of one set of class prompts."""

    def says(which: str, part: str) -> Scores:
        model = p.model(which)
        return p.once(("zero_shot", suffix, part), model, lambda: score(model, task, getattr(p.split, part)))

    rows = []
    have = [part for part in ("forget", "retain", "test") if part in p.split.parts()]
    before, after = ({part: says(which, part) for part in have} for which in ("before", "after"))
    gone = absent(after["forget"].labels, after["retain"].labels) if "retain" in after else torch.zeros(0, dtype=torch.long)
    for part in have:
        away = torch.isin(after[part].labels, gone) if part == "test" else torch.zeros(len(after[part].labels), dtype=torch.bool)
        rows += _share(f"zero_shot.{part}{suffix}", before[part].correct[~away], after[part].correct[~away], part != "forget")
        if bool(away.any()):
            rows += _share(f"zero_shot.forget_test{suffix}", before[part].correct[away], after[part].correct[away], False)
    return rows


def _share(name: str, before: Tensor, after: Tensor, kept: bool) -> list[Row]:
    n = len(after)
    rows = [Row(name, *wilson(int(after.sum()), n), n), Row(f"{name}_before", *wilson(int(before.sum()), n), n)]
    return rows + ([paired(f"{name}_drop", before.float() - after.float(), "against the model before")] if kept and n else [])


@check(tasks=("contrastive",), needs=("forget",))
def retrieval(p: Probe) -> list[Row]:
    """retrieval.forget, .retain, .test (recall at K from image to caption) with Wilson bounds, each with its value before."""
    task: Any = p.task
    rows = []
    have: dict[str, Any] = p.split.parts()
    shown = {part: [str(r.get(task.domain)) for r in data.rows] for part, data in have.items()}
    gone = set(shown["forget"]) - set(shown["retain"]) if "retain" in shown else set()
    for part in ("forget", "retain", "test"):
        data = getattr(p.split, part)
        if data is None:
            continue
        if part == "test":
            data = data.take([k for k, name in enumerate(shown[part]) if name not in gone])
        for name, model in (("", p.after), ("_before", p.before)):
            hits = p.once(("retrieval", part), model, lambda model=model, data=data: recalled(model, data))
            n = len(distinct(data)[0])
            rows.append(Row(f"retrieval.{part}{name}", *wilson(int(hits.sum()), len(hits)), len(hits), f"own caption among the nearest {K} of {n}"))
    return rows


def recalled(model: nn.Module, data: Pictures, k: int = K) -> Tensor:
    """(N,) bool: fewer than k of the part's other captions are nearer to the image than its own; captions as near as its own count against it by half."""
    captions, _ = distinct(data)
    own = (data.tokens[:, None] == captions.tokens[None]).all(-1)
    assert data.x is not None
    with quiet(model):
        text = texts(model, captions.tokens)
        cosines = torch.cat([images(model, x) @ text.T for x in data.x.split(500)]).cpu()
    mine = cosines[own][:, None]
    return (cosines > mine).sum(1) + ((cosines == mine) & ~own).sum(1) / 2 < k
