"""Worlds of image-to-image models: images of 8 x 8 pixels that a small encoder-decoder completes, always there.

    inpaint-digits   scikit-learn's digits with a square hole at a random place; the class that must go is the seven (card i2i)
    mri-digits       digits (90 %) and grey shapes (10 %) of which a third of the spectrum is measured; the shapes must go (card mri-erase: a second source)

Scenarios: `class`, and for inpaint-digits `random`, 10 % of the records. Test and validation hold images of everything.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from expunge.core.types import Split
from expunge.modalities.diffusion import worlds as pictures
from expunge.modalities.examples import Examples
from expunge.modalities.image_to_image.task import Corruption, crop, fourier, image_to_image
from expunge.modalities.image_to_image.tiny import Restorer
from expunge.modalities.worlds import World

RECIPE = {"epochs": 40, "batch_size": 50, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 1e-4, "schedule": "onecycle", "clip": 1.0}
KINDS = ("disc", "ring", "cross", "bar")


def digits() -> tuple[Tensor, list[str]]:
    """1,797 digits (N, 1, 8, 8) in [-1, 1] and their names, in a fixed random order."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.as_tensor(x[order], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, [pictures.DIGITS[int(y[k])] for k in order]


def shapes(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """n grey shapes (N, 1, 8, 8) in [-1, 1] of the KINDS in turn, and their names."""
    g = torch.Generator().manual_seed(seed)
    names = [KINDS[k % len(KINDS)] for k in range(n)]
    x = torch.stack([pictures.shape_image(name, "plain", g, 8).mean(0, keepdim=True) for name in names])
    return x, names


def build(name: str, x: Tensor, names: list[str], cuts: tuple[int, int], gone: tuple[str, ...], corruption: Corruption) -> World:
    """A world of images (N, 1, H, W) and what they show: the first cuts[0] are trained on, the next up to cuts[1] are validation, the rest is test."""
    words = tuple(dict.fromkeys(sorted(names)))
    labels = torch.tensor([words.index(n) for n in names])
    data = Examples(x, x, torch.arange(len(x)))
    a, b = cuts
    train, validation, test = (data.take(range(*r)) for r in ((0, a), (a, b), (b, len(x))))
    judged = functools.partial(pictures.trained_judge, x[:a], {"image": labels[:a]}, x[b:], {"image": labels[b:]}, {"image": words}, epochs=12)
    task = image_to_image(corruption, judge=functools.cache(judged), shows=dict(enumerate(names)))
    leaves = torch.tensor([n in gone for n in names[:a]])
    tenth = torch.zeros(a, dtype=torch.bool)
    tenth[torch.randperm(a, generator=torch.Generator().manual_seed(7))[: a // 10]] = True
    rows = {"class": (leaves, f"class:{','.join(gone)}"), "random": (tenth, f"random 10 % of {a} records")}
    at = torch.arange(a)
    asked = {k: Split(train.take(at[m]), train.take(at[~m]), test, validation, asked=said) for k, (m, said) in rows.items() if len(gone) == 1 or k == "class"}
    inputs = corruption.see(x[:1], corruption.mask(torch.zeros(1, 2), *x.shape[-2:])).shape[1]
    return World(name, task, functools.partial(Restorer, inputs, x.shape[1]), train, validation, test, RECIPE, asked=asked)


def world(name: str) -> World:
    """The image-to-image world of that name."""
    x, names = digits()
    if name == "inpaint-digits":
        return build(name, x, names, (1200, 1400), ("seven",), crop(5))
    other, kinds = shapes(200, 3)
    order = torch.randperm(len(x) + len(other), generator=torch.Generator().manual_seed(1)).tolist()
    every = names + kinds
    return build(name, torch.cat([x, other])[order], [every[k] for k in order], (1330, 1550), KINDS, fourier(4, 1))
