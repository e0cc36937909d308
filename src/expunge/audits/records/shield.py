"""Does a shield protect? Train on protected and on clean images, read accuracy on clean test images, also under counter-measures.

shield.protected, shield.clean    accuracy of models trained on protected and on clean images
shield.<either>.<counter>         the same where the learner answers with a counter-measure, see COUNTERS; read both, since one that ruins learning
                                  from clean images too says nothing about the shield
shield.best       the largest of all protected accuracies, plain included: what a learner who tries everything reaches. A gate reads this one
shield.drop       accuracy lost to the shield without a counter-measure, test image by test image; positive means that it protects
shield.linf, shield.l2    largest change of a pixel, and mean length of the change of an image
Sources: card unlearnable-examples.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.audits.core import Row
from expunge.audits.drop import paired
from expunge.core import guard
from expunge.core.errors import DataError, SettingError, SplitError, suggest
from expunge.core.machine.devices import reseeded
from expunge.core.stats import wilson
from expunge.core.types import Batch, Out, Task
from expunge.data.records.augment import crop_flip
from expunge.data.records.shield import check_images
from expunge.modalities.examples import Examples
from expunge.parts.reading import score
from expunge.parts.training import train


@dataclass(frozen=True)
class Counter:
    """What a learner does against a shield.

    fixed     images -> images, of training and test data alike
    augment   (images, generator) -> images, drawn anew for every training batch, in place of the data's own
    attacked  train on adversarial examples
    colour    only for images with several channels
    """

    fixed: Callable[[Tensor], Tensor] | None = None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    attacked: bool = False
    colour: bool = False


def protection(
    build: Callable[[], nn.Module], task: Task, clean: Examples, protected: Examples, test: Examples, recipe: Mapping[str, Any], *,
    counters: Sequence[str] = ("crop", "cutout", "grayscale", "blur", "jpeg"), runs: int = 1, eps: float = 4 / 255, steps: int = 10, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:  # fmt: skip
    """The rows of the module's docstring. Images are floats in 0..1; a model that wants them normalised does so itself.

    build      draws a model with fresh weights from the global generator, which is seeded here and put back
    recipe     options of `training.train`: epochs, batch_size, lr, ...
    counters   names out of COUNTERS; `adversarial` costs steps + 1 trainings and is not among the default ones
    runs       models per row: its value is their mean, its bounds the lowest and highest of their Wilson bounds
    eps        bound of the adversarial examples, found in `steps` steps of projected gradient ascent
    progress   called as progress(text, done, total), once per model

    Raises DataError where protected and clean are not the same records, SplitError where a test image was trained on, SettingError for an unknown
    counter-measure or a setting out of range.
    """
    _check(clean, protected, test, counters, runs, eps, steps)
    ways = {"": Counter()} | {name: COUNTERS[name] for name in counters if clean.x.shape[1] > 1 or not COUNTERS[name].colour}
    rows, right = [], {}
    for name, way in ways.items():
        for which, data in (("protected", protected), ("clean", clean)):
            label = f"shield.{which}{'.' if name else ''}{name}"
            hits = []
            for r in range(runs):
                if progress:
                    progress(label, len(rows) * runs + r, 2 * len(ways) * runs)
                hits.append(_correct(build, task, way, data, test, recipe, eps, steps, seed + r))
            right[label] = torch.stack(hits)
            rows.append(_row(label, right[label], f"{runs} model(s)" + (f", trained on adversarial examples of {eps:.3g}" if way.attacked else "")))
    best = max((r for r in rows if r.name.startswith("shield.protected")), key=lambda r: r.high)
    lost = right["shield.clean"].double().mean(0) - right["shield.protected"].double().mean(0)
    change = (protected.x - clean.x).double()
    largest, length = float(change.abs().max()), float(change.flatten(1).norm(dim=1).mean())
    rows.append(replace(best, name="shield.best", note=f"{best.name}, the best of {len(ways)}; {best.note}"))
    rows.append(paired("shield.drop", lost, f"{runs} model(s) of each kind"))
    rows.append(Row("shield.linf", largest, largest, largest, len(clean)))
    rows.append(Row("shield.l2", length, length, length, len(clean)))
    return rows


def _check(clean: Examples, protected: Examples, test: Examples, counters: Sequence[str], runs: int, eps: float, steps: int) -> None:
    for data in (clean, protected, test):
        check_images(data)
    if clean.x.shape != protected.x.shape or not torch.equal(clean.y, protected.y) or not torch.equal(clean.ids, protected.ids):
        raise DataError(f"protected must hold the records of clean in the same order; found {protected} against {clean}, or other labels or ids")
    if shared := set(clean.keys) & set(test.keys):
        raise SplitError(f"{len(shared)} record(s) of clean also stand in test (a leak); remove them from one of the two")
    for name in counters:
        if name not in COUNTERS:
            raise SettingError(suggest("no counter-measure", name, COUNTERS))
    if runs < 1 or steps < 1 or not eps > 0:
        raise SettingError(f"runs and steps must be at least 1 and eps above 0; found {runs}, {steps} and {eps:g}")


def _correct(build: Callable, task: Task, way: Counter, data: Examples, test: Examples, recipe: Mapping, eps: float, steps: int, seed: int) -> Tensor:
    """(N,) bool: which test images a model trained on `data` gets right."""
    if way.fixed:
        data, test = (replace(d, x=way.fixed(d.x)) for d in (data, test))
    if way.augment:
        data = replace(data, augment=way.augment)
    with reseeded(seed), guard.watching(guard.Guard()):
        model = build()
        train(model, attacked(task, eps, steps) if way.attacked else task, data, seed=seed, **recipe)
    return score(model, task, test).correct


def _row(name: str, right: Tensor, note: str) -> Row:
    """Mean accuracy of the models in right (R, N), between the lowest and the highest of their Wilson bounds."""
    n = right.shape[1]
    each = [wilson(int(r.sum()), n) for r in right]
    return Row(name, sum(e[0] for e in each) / len(each), min(e[1] for e in each), max(e[2] for e in each), n, note)


def attacked(task: Task, eps: float, steps: int) -> Task:
    """The task whose training sees x + d in place of x: d ascends on the loss by signs of gradients, within |d| <= eps and images in 0..1.

    Starts from d = 0 with steps of 2.5 eps / steps; the model is attacked in eval mode, so that its running statistics see one batch per step.
    """

    def forward(model: nn.Module, batch: Batch) -> Out:
        if not model.training:
            return task.forward(model, batch)
        x = batch["x"]
        d = torch.zeros_like(x)
        with guard.quiet(model), torch.enable_grad():
            for _ in range(steps):
                d.requires_grad_(True)
                (g,) = torch.autograd.grad(task.forward(model, {**batch, "x": x + d}).mean.sum(), d)
                d = ((x + (d.detach() + 2.5 * eps / steps * g.sign()).clamp(-eps, eps)).clamp(0, 1) - x).detach()
        return task.forward(model, {**batch, "x": x + d})

    return replace(task, forward=forward)


def crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to an eighth of the side and mirrored half of the time."""
    return crop_flip(max(1, x.shape[-1] // 8))(x, generator)


def cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    """A square of half the side set to 0, at a place drawn for each image; it may reach over the edge."""
    b, _, h, w = x.shape
    top, left = (torch.randint(side, (b, 1), generator=generator) - side // 4 for side in (h, w))
    rows, columns = ((torch.arange(side) >= start) & (torch.arange(side) < start + side // 2) for side, start in ((h, top), (w, left)))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None].to(x.device), 0)


def grayscale(x: Tensor) -> Tensor:
    """Every channel replaced by the mean over channels."""
    return x.mean(1, keepdim=True).expand_as(x).contiguous()


def blur(x: Tensor) -> Tensor:
    """Mean over 3x3 pixels; beyond the edge there is nothing to average.

    >>> blur(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])).flatten()
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def jpeg(x: Tensor, quality: int = 50) -> Tensor:
    """Compressed and read again; each channel as a grey image. Needs Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise SettingError("the counter-measure jpeg needs Pillow: pip install 'expunge[data]', or leave it out of counters") from None
    import numpy as np

    out = []
    for image in (255 * x.flatten(0, 1)).round().to(torch.uint8).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        out.append(torch.from_numpy(np.array(Image.open(file))))
    return (torch.stack(out).to(x) / 255).view_as(x)


COUNTERS: dict[str, Counter] = {
    "crop": Counter(augment=crop),
    "cutout": Counter(augment=cutout),
    "grayscale": Counter(fixed=grayscale, colour=True),
    "blur": Counter(fixed=blur),
    "jpeg": Counter(fixed=jpeg),
    "adversarial": Counter(attacked=True),
}
