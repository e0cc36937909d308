"""Generated persons: small face-like images whose label is an age group, for requests that name a person by one image. Card one-shui-metaunlearn.

    faces = identities(seed=0)
    split = faces.split([3, 7])            # forget: all training images of persons 3 and 7
    faces.portraits.take([3, 7])           # what the request gives: one image of each, not a training image

A person has a fixed appearance (shape of face, hair, eyes and mouth, tones, a pattern of marks) and an age group; each image changes pose, light
and noise. Age shows as lines across the face whose strength scatters from person to person, so that a model that saw the person knows the label
by heart and one that did not has to guess: the difference is what must be forgotten. No person stands in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.core.errors import SettingError, SplitError
from expunge.core.types import Split
from expunge.modalities.examples import Examples


@dataclass(frozen=True)
class Identities:
    """Images of persons 0..P-1 for training, and of others for validation and test. A record's id is person * stride + number of the image."""

    train: Examples
    validation: Examples
    test: Examples
    portraits: Examples
    """(P, ...) one image of each training person that is not in train, in order of the persons."""
    stride: int

    def person(self, data: Examples) -> Tensor:
        """(N,) whose image each row is."""
        return data.ids // self.stride

    def split(self, persons: Sequence[int]) -> Split:
        """Forget all training images of these persons, retain the others. Raises SplitError for a person who is not in train."""
        whose = self.person(self.train)
        if strangers := sorted(set(persons) - set(whose.tolist())):
            raise SplitError(f"person {strangers[0]} has no training image; persons are 0..{int(whose.max())}")
        gone, rows = torch.isin(whose, torch.tensor(list(persons), dtype=torch.long)), torch.arange(len(whose))
        asked = f"persons:{','.join(str(p) for p in persons)}"
        return Split(self.train.take(rows[gone]), self.train.take(rows[~gone]), self.test, self.validation, asked=asked)


def identities(
    *, persons: int = 60, images: int = 8, classes: int = 4, side: int = 16, channels: int = 1, cue: float = 0.8, validation: int = 30, test: int = 40,
    seed: int = 0,
) -> Identities:  # fmt: skip
    """`images` pictures (channels, side, side) in -.5..+.5 of each of `persons`, `validation` and `test` persons, labels 0..classes-1; from `seed` alone.

    cue    strength of the lines that show age, 0..1: at 0 nothing about a stranger tells the label

    The persons of a part have every age group as often as possible. Raises SettingError for numbers out of range.
    """
    counts = {"persons": persons, "images": images, "validation": validation, "test": test}
    for name, n in counts.items():
        if n < 1:
            raise SettingError(f"{name} must be at least 1, not {n}")
    if classes < 2 or side < 8 or channels < 1:
        raise SettingError(f"classes must be at least 2, side 8 and channels 1; found {classes}, {side} and {channels}")
    if not 0 <= cue <= 1:
        raise SettingError(f"cue must be in 0..1, not {cue}")
    g = torch.Generator().manual_seed(seed)
    total, stride = persons + validation + test, images + 1
    groups = torch.cat([(torch.arange(n) % classes)[torch.randperm(n, generator=g)] for n in (persons, validation, test)])
    looks = _looks(total, channels, g)
    strength = cue * (groups + 0.6 * torch.randn(total, generator=g)) / (classes - 1)
    who, number = torch.arange(total).repeat_interleave(stride), torch.arange(stride).repeat(total)
    everyone = Examples(_draw({n: v[who] for n, v in looks.items()}, strength[who], side, g), groups[who], who * stride + number)

    def part(first: int, last: int, portrait: bool = False) -> Examples:
        return everyone.take(((who >= first) & (who < last) & ((number == images) == portrait)).nonzero().squeeze(1))

    middle = persons + validation
    return Identities(part(0, persons), part(persons, middle), part(middle, total), part(0, persons, True), stride)


RANGES = {
    "wide": (0.55, 0.8), "high": (0.7, 0.95), "hair": (-0.65, -0.3), "eyes": (0.2, 0.4), "eye_y": (-0.25, 0.0), "eye": (0.07, 0.15),
    "mouth_y": (0.35, 0.6), "mouth": (0.12, 0.4), "nose": (0.05, 0.3),
}  # fmt: skip
"""Measures of a face, in half widths of the image."""
TONES = {"skin": (0.5, 0.9), "hair_tone": (0.05, 0.6), "ground": (0.0, 0.4)}


def _looks(n: int, channels: int, g: torch.Generator) -> dict[str, Tensor]:
    """What n persons keep from image to image: measures (n, 1, 1), tones (n, channels, 1, 1), marks (n, 1, 5, 5)."""
    looks = {name: low + (high - low) * torch.rand(n, 1, 1, generator=g) for name, (low, high) in RANGES.items()}
    tones = {name: low + (high - low) * torch.rand(n, channels, 1, 1, generator=g) for name, (low, high) in TONES.items()}
    return {**looks, **tones, "marks": 0.12 * torch.randn(n, 1, 5, 5, generator=g)}


def _draw(look: dict[str, Tensor], age: Tensor, side: int, g: torch.Generator) -> Tensor:
    """(N, channels, side, side) one image per row of `look` and `age` (N,), each with its own pose, light and noise."""
    n, line = len(age), torch.linspace(-1, 1, side)

    def normal(deviation: float, *shape: int) -> Tensor:
        return deviation * torch.randn(n, *(shape or (1, 1)), generator=g)

    turn, scale = normal(0.12), 1 + normal(0.06)
    left, down = (line[None, None, :] - normal(0.08)) / scale, (line[None, :, None] - normal(0.08)) / scale
    x, y = turn.cos() * left + turn.sin() * down, turn.cos() * down - turn.sin() * left

    def inside(distance: Tensor) -> Tensor:
        return torch.sigmoid(distance * side / 2)[:, None]

    face = inside(1 - ((x / look["wide"]) ** 2 + (y / look["high"]) ** 2).sqrt())
    hair = face * inside(look["hair"] - y)
    eyes = inside(1 - (((x.abs() - look["eyes"]) ** 2 + (y - look["eye_y"]) ** 2).sqrt() / look["eye"]))
    mouth = inside(1 - ((x / look["mouth"]) ** 2 + ((y - look["mouth_y"]) / 0.08) ** 2).sqrt())
    nose = inside(1 - ((x / 0.06) ** 2 + ((y - look["eye_y"] - look["nose"]) / look["nose"]) ** 2).sqrt())
    marks = F.grid_sample(look["marks"], torch.stack([x, y], -1), align_corners=True, padding_mode="border")
    lines = 0.3 * age.view(-1, 1, 1, 1) * torch.sin(y * 6 * torch.pi)[:, None]
    skin = look["skin"] + marks + lines
    image = look["ground"] * (1 - face) + skin * face
    image = image * (1 - hair) + look["hair_tone"] * hair
    for part, tone in ((eyes, 0.05), (mouth, 0.2), (nose, 0.35)):
        image = image * (1 - 0.8 * part) + tone * 0.8 * part
    light = normal(0.12) * x + normal(0.12) * y + normal(0.06)
    return (image + light[:, None] + 0.04 * torch.randn(image.shape, generator=g)).clamp(0, 1) - 0.5
