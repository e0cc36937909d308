"""Picture worlds: a small text-conditional diffusion model that draws what it was taught, and must forget to draw one concept.

    text2digit          digits of scikit-learn, 8 x 8: always there        text2digit-mnist   10,000 digits at 16 x 16: reads EXPUNGE_DATA/vision/mnist
    shapes              6 objects x 6 styles in colour, 16 x 16, drawn here: always there        shapes-small    4 x 4 of them

A suffix -epsilon or -v changes what the model predicts (flow otherwise). Parts: forget (images of the concept under its own name), retain (the other
concepts), anchor (the forget records under the name of a neighbour), test and validation (prompts without images: other wordings and other names of all
concepts, which no method is given). Images of the concept under its other name are trained on and given to nobody.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import DataError
from expunge.core.machine.devices import reseeded
from expunge.core.types import Split
from expunge.modalities.classification.task import classification
from expunge.modalities.diffusion.task import Schedule, diffusion
from expunge.modalities.diffusion.tiny import diffusion_model, words
from expunge.modalities.examples import Examples
from expunge.modalities.judge import Judge
from expunge.modalities.pictures import Pictures
from expunge.modalities.worlds import World, data_folder
from expunge.parts import training

TEMPLATES = ("a {}", "the {}", "a picture of {}", "a drawing of a {}", "{}")
OTHERS = ("one {}", "a small picture of a {}", "drawing of the {}")
"""Wordings that no training prompt has, of known words."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OBJECTS = ("disc", "square", "triangle", "ring", "cross", "bar")
STYLES = ("plain", "striped", "dotted", "outlined", "inverted", "shaded")
ROOMY = 10
"""Tokens of a prompt of `shapes`: the longest has seven words, and attacks put two before them."""
FEW_OBJECTS, FEW_STYLES = ("disc", "triangle", "cross", "bar"), ("plain", "striped", "outlined", "inverted")
"""Those of `shapes-small`: without the ring, which an outlined disc looks like, and the square, which takes long to tell from a disc."""
SYNONYMS = {
    **{word: str(k) for k, word in enumerate(DIGITS)},
    "disc": "circle", "square": "box", "triangle": "wedge", "ring": "hoop", "cross": "plus", "bar": "stick",
    "plain": "flat", "striped": "lined", "dotted": "spotted", "outlined": "hollow", "inverted": "negative", "shaded": "gradient",
}  # fmt: skip
"""Other name of each concept, which a share of the training prompts use."""

RECIPE = {"batch_size": 64, "lr": 2e-3, "optimizer": "adamw", "weight_decay": 1e-4, "schedule": "cosine", "warmup": 0.05, "clip": 1.0, "ema": 0.995}
"""How pictures are taught, but for the epochs."""


def captioned(
    x: Tensor, labels: Mapping[str, Tensor], names: Mapping[str, Sequence[str]], seed: int, share: float = 0.2
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of images (N, C, H, W) with labels (N,) by domain: a wording and names drawn by seed, `share` of each domain's names the other ones; and (N,) bool,
    where an other name was used."""
    g = torch.Generator().manual_seed(seed)
    n = len(x)
    template = torch.randint(len(TEMPLATES), (n,), generator=g).tolist()
    other = {d: torch.rand(n, generator=g) < share for d in names}
    rows = []
    for k in range(n):
        own = {d: names[d][int(labels[d][k])] for d in names}
        said = " ".join(SYNONYMS[word] if other[d][k] else word for d, word in own.items())
        rows.append({"prompt": TEMPLATES[template[k]].format(said), **own})
    return rows, torch.stack(list(other.values())).any(0)


def prompts(names: Mapping[str, Sequence[str]], templates: Sequence[str], *, synonyms: bool) -> list[dict[str, Any]]:
    """One row per combination of concepts and wording."""
    rows = []
    for combination in itertools.product(*names.values()):
        own = dict(zip(names, combination, strict=True))
        said = " ".join(SYNONYMS[w] if synonyms else w for w in combination)
        rows += [{"prompt": t.format(said), **own} for t in templates]
    return rows


def build(
    name: str, x: Tensor, labels: Mapping[str, Tensor], held: tuple[Tensor, Mapping[str, Tensor]], names: Mapping[str, Sequence[str]],
    targets: Mapping[str, tuple[str, str]], recipe: dict[str, Any], judge: dict[str, Any],
    widths: tuple[int, ...] = (16, 32, 64), share: float = 0.2, length: int = 8,
) -> World:  # fmt: skip
    """A world of images in [-1, 1] with labels by domain; targets: scenario -> (concept, anchor concept); length: tokens of a prompt."""
    rows, other = captioned(x, labels, names, 0, share)
    spare = prompts(names, OTHERS, synonyms=False) + prompts(names, TEMPLATES[:2], synonyms=True)
    vocabulary = words([*(r["prompt"] for r in rows), *(r["prompt"] for r in spare)], length)
    data = Pictures(x, vocabulary([r["prompt"] for r in rows]), torch.arange(len(x)), tuple(rows), vocabulary)
    held_out = Pictures(None, vocabulary([r["prompt"] for r in spare]), len(x) + torch.arange(len(spare)), tuple(spare), vocabulary)
    tuning = torch.tensor([r["prompt"].startswith("one ") for r in spare])
    kind = next((k for k in ("epsilon", "v") if name.endswith(f"-{k}")), "flow")
    judged = functools.cache(functools.partial(trained_judge, x, labels, *held, names, **judge))
    task = diffusion(Schedule(kind), shape=x.shape[1:], null=vocabulary([""])[0], drop=0.15, judge=judged)
    asked = {}
    for scenario, (concept, anchor) in targets.items():
        domain = next(d for d in names if concept in names[d])
        has = torch.tensor([r[domain] == concept for r in rows])
        forget = data.take((has & ~other).nonzero().squeeze(1))
        instead = forget.prompted([p.replace(concept, anchor) for p in forget.prompts])
        asked[scenario] = Split(
            forget, data.take((~has).nonzero().squeeze(1)), held_out.take((~tuning).nonzero().squeeze(1)), held_out.take(tuning.nonzero().squeeze(1)), instead,
            asked=f"{domain}:{concept}",
        )  # fmt: skip
    make = functools.partial(diffusion_model, vocabulary.size, channels=x.shape[1], widths=widths, length=length)
    return World(name, task, make, data, held_out, held_out, recipe, asked=asked)


def trained_judge(
    x: Tensor,
    labels: Mapping[str, Tensor],
    held_x: Tensor,
    held: Mapping[str, Tensor],
    names: Mapping[str, Sequence[str]],
    *,
    epochs: float = 12,
    lr: float = 0.05,
) -> Judge:
    """One classifier per domain, trained on the world's images under small shifts of brightness and place; its accuracy is read on held-out images."""
    models, right = {}, {}
    for domain, classes in names.items():
        with reseeded(99):
            model = judge_net(x.shape[1], x.shape[2], len(classes))
        data = Examples(x, labels[domain], torch.arange(len(x)), augment=jitter)
        training.train(model, classification(), data, epochs=epochs, batch_size=64, lr=lr, momentum=0.9, schedule="cosine", optimizer="nesterov", seed=99)
        models[domain] = model
        with torch.no_grad():
            right[domain] = model(held_x).argmax(1) == held[domain]
    return Judge({d: tuple(v) for d, v in names.items()}, models, right)


def judge_net(channels: int, side: int, classes: int) -> nn.Module:
    """Two convolutions and a hidden layer of 64 features."""
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness scaled by 0.8 to 1.2 and a little noise: generated images differ from real ones in both."""
    scale = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return ((x + 1) * scale - 1).clamp(-1, 1) + 0.1 * torch.randn(x.shape, generator=generator)


def text2digit(name: str) -> World:
    """Digits by name; the seven must go, and the eight stands in for it."""
    names, targets = {"object": DIGITS}, {"object": ("seven", "eight")}
    if "mnist" in name:
        path = data_folder() / "vision" / "mnist" / "mnist.npz"
        if not path.exists():
            raise DataError(f"world {name} needs {path}; set EXPUNGE_DATA to the folder that holds vision/mnist/mnist.npz")
        with np.load(path, allow_pickle=False) as z:
            parts = [(small(z[f"x_{k}"][:n]), torch.as_tensor(z[f"y_{k}"][:n].astype(np.int64))) for k, n in (("train", 10_000), ("test", 1000))]
        (x, y), (held_x, held_y) = parts
        recipe = {**RECIPE, "epochs": 20 if "epsilon" in name else 7.5}
        return build(name, x, {"object": y}, (held_x, {"object": held_y}), names, targets, recipe, {"epochs": 4})
    (x, y), (held_x, held_y) = digit_images()
    return build(name, x, {"object": y}, (held_x, {"object": held_y}), names, targets, {**RECIPE, "epochs": 40}, {})


def digit_images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,500 digits of scikit-learn (N, 1, 8, 8) in [-1, 1] with their labels, and the 297 others."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.as_tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mine, rest = order[:1500], order[1500:]
    return (x[mine], y[mine]), (x[rest], y[rest])


def small(x: np.ndarray) -> Tensor:
    """(N, 28, 28) bytes -> (N, 1, 16, 16) in [-1, 1]."""
    wide = F.pad(torch.as_tensor(x, dtype=torch.float32)[:, None] / 255, (2, 2, 2, 2))
    return 2 * F.avg_pool2d(wide, 2) - 1


def shape_image(kind: str, style: str, generator: torch.Generator, side: int = 16) -> Tensor:
    """(3, side, side) in [-1, 1]: an object at a random place and size, in a random colour on a random dark ground, in one of the styles."""
    u = torch.rand(9, generator=generator).tolist()
    grid = torch.arange(side, dtype=torch.float32)
    cx, cy, r = side / 2 - 0.5 + 3 * (u[0] - 0.5), side / 2 - 0.5 + 3 * (u[1] - 0.5), side * (0.28 + 0.1 * u[2])
    dx, dy = grid[None, :] - cx, grid[:, None] - cy
    distance = {
        "disc": (dx**2 + dy**2).sqrt() - r,
        "square": torch.maximum(dx.abs(), dy.abs()) - 0.85 * r,
        "triangle": torch.maximum(dy - 0.8 * r, 1.7 * dx.abs() - dy - 0.9 * r) / 1.5,
        "ring": ((dx**2 + dy**2).sqrt() - 0.8 * r).abs() - 0.28 * r,
        "cross": torch.minimum(torch.maximum(dx.abs() - 0.3 * r, dy.abs() - r), torch.maximum(dy.abs() - 0.3 * r, dx.abs() - r)),
        "bar": torch.maximum(dx.abs() - 1.1 * r, dy.abs() - 0.35 * r),
    }[kind]
    inside = (0.5 - distance).clamp(0, 1)
    colour, ground = torch.tensor([0.35 + 0.65 * u[3], 0.35 + 0.65 * u[4], 0.35 + 0.65 * u[5]]), 0.25 * torch.tensor(u[6:9])
    fill = torch.ones(side, side)
    if style == "striped":
        fill = ((dx + dy).floor().remainder(4) < 2).float()
    elif style == "dotted":
        fill = torch.where((dx.round().remainder(3) < 1) & (dy.round().remainder(3) < 1), 1.0, 0.35)
    elif style == "outlined":
        fill = (distance > -1.2).float()
    elif style == "shaded":
        fill = ((dy + r) / (2 * r)).clamp(0.1, 1).expand(side, side)
    alpha = inside * fill
    if style == "inverted":
        colour, ground = 0.25 * colour, 0.75 + ground
    image = alpha * colour[:, None, None] + (1 - alpha) * ground[:, None, None]
    return 2 * image - 1


def shape_set(objects: Sequence[str], styles: Sequence[str], per: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`per` images of each pair."""
    g = torch.Generator().manual_seed(seed)
    pairs = [(o, s) for _ in range(per) for o in range(len(objects)) for s in range(len(styles))]
    x = torch.stack([shape_image(objects[o], styles[s], g) for o, s in pairs])
    return x, {"style": torch.tensor([s for _, s in pairs]), "object": torch.tensor([o for o, _ in pairs])}


def shapes(name: str) -> World:
    """Six objects in six styles (of `shapes-small` four and four); the request is a style (`striped`) or an object (`ring`, there `cross`)."""
    few = name.startswith("shapes-small")
    objects, styles = (FEW_OBJECTS, FEW_STYLES) if few else (OBJECTS, STYLES)
    recipe = {**RECIPE, "epochs": 44 if few else 60, "lr": 3e-3}
    targets = {"style": ("striped", "plain"), "object": ("cross" if few else "ring", "disc")}
    x, labels = shape_set(objects, styles, 70, 0)
    held, names, judge = shape_set(objects, styles, 10, 1), {"style": styles, "object": objects}, {"epochs": 12, "lr": 0.02} if few else {"epochs": 10}
    return build(name, x, labels, held, names, targets, recipe, judge, share=0.5 if few else 0.2, length=8 if few else ROOMY)


def world(name: str) -> World:
    """The picture world of that name."""
    return shapes(name) if name.startswith("shapes") else text2digit(name)
