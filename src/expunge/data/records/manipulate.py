"""Manipulated training data of which only a part is identified: what corrective unlearning starts from.

m of N training records are manipulated, and only k = share * m of them are known. Forgetting the k must undo the effect of all m. Source: card
corrective (Goel et al., "Corrective Machine Unlearning", TMLR 2024); pairs of classes after card umd (X2X backdoors).

    poison       a trigger is stamped on an image and its label becomes the target of its class
    mislabel     labels are permuted among m records, so that all m are wrong
    confuse      m / 2 records of each of two classes are swapped

Everything is drawn from `seed` alone. Retraining without the k is not the gold standard here: the m - k others stay in. Compare with a model that was
trained on `Manipulated.clean`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expunge.core.errors import SettingError, SplitError
from expunge.core.types import IGNORE, Split
from expunge.modalities.examples import Examples

Trigger = Callable[[Tensor], Tensor]
"""Images (B, ...) -> the same images with the trigger on them."""


@dataclass(frozen=True)
class Manipulated:
    """Training data with m manipulated rows, of which k are identified, and test data from the manipulated domain.

    train       N rows as a model is trained on them, in the order and with the ids of the data they were made from
    true        (N,) true labels
    wrong       (N,) bool: the m manipulated rows
    identified  (N,) bool: the k rows among them that are known
    pairs       (source, target) classes that the manipulation connects; empty for `mislabel`
    test        poison: triggered test images of the source classes; confuse: test records of both classes; mislabel: all test records. True labels
    target      (len(test),) the label that the manipulation wants instead, IGNORE where it wants none in particular
    plain       poison: the records of `test` without trigger; else `test` itself
    """

    train: Examples
    true: Tensor
    wrong: Tensor
    identified: Tensor
    pairs: tuple[tuple[int, int], ...]
    test: Examples
    target: Tensor
    plain: Examples

    @property
    def clean(self) -> Examples:
        """The N - m rows that are not manipulated: what the reference is trained on."""
        return self.train.take((~self.wrong).nonzero().squeeze(1))

    @property
    def corrected(self) -> Examples:
        """The m manipulated rows with their true labels, triggers still on them."""
        return replace(self.train, y=self.true).take(self.wrong.nonzero().squeeze(1))

    def split(self, test: Examples | None = None, validation: Examples | None = None) -> Split:
        """Forget the k identified rows; retain is all the rest, the m - k unknown ones among it."""
        forget, retain = (self.train.take(rows.nonzero().squeeze(1)) for rows in (self.identified, ~self.identified))
        return Split(forget, retain, test, validation, asked=f"{int(self.identified.sum())} of {int(self.wrong.sum())} manipulated records")


def corner(train: Examples, size: int = 3) -> Trigger:
    """A size x size patch in the bottom-right corner of images (B, C, H, W), at each channel's largest value in `train`.

    >>> data = Examples(torch.eye(3).view(1, 1, 3, 3) / 2, torch.zeros(1, dtype=torch.long), torch.zeros(1))
    >>> corner(data, 2)(data.x)[0, 0]
    tensor([[0.5000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000],
            [0.0000, 0.5000, 0.5000]])
    """
    if train.x.ndim != 4:
        raise SplitError(f"a corner patch needs images (N, C, H, W); these inputs are {tuple(train.x.shape)}")
    if not 1 <= size <= min(train.x.shape[2:]):
        raise SettingError(f"size must be 1 to {min(train.x.shape[2:])}, the side of the images, not {size}")
    value = train.x.amax((0, 2, 3)).view(1, -1, 1, 1)

    def stamp(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, :, -size:, -size:] = value.to(x)
        return out

    return stamp


def added(pattern: Tensor, low: float = 0.0, high: float = 1.0) -> Trigger:
    """clip(x + pattern, low, high): a pattern of one input's shape over the whole input.

    >>> added(torch.tensor([0.5, -0.5]))(torch.tensor([[0.75, 0.75]]))
    tensor([[1.0000, 0.2500]])
    """
    return lambda x: (x + pattern.to(x)).clamp(low, high)


def poison(
    train: Examples, test: Examples, m: int, *, trigger: Trigger | None = None, target: int = 0, pairs: Sequence[tuple[int, int]] = (), share: float = 1.0,
    seed: int = 0,
) -> Manipulated:  # fmt: skip
    """Stamp the trigger (3 x 3 corner if none is given) on m records of the source classes and give them their class's target.

    pairs      (source, target) classes, each source once: an X2X backdoor with one trigger; without any, all other classes go to `target`

    Records of the target class itself are never drawn (the published benchmark draws them too: their label does not change).
    """
    stamp = trigger or corner(train)
    found = classes(train)
    given = tuple((s, target) for s in found if s != target) if not pairs else tuple((int(s), int(t)) for s, t in pairs)
    goal = goals(given, found)
    aim, aimed = goal[train.y], goal[test.y]
    wrong = draw((aim != IGNORE).nonzero().squeeze(1), m, len(train), seed, "records of the source classes")
    x = train.x.clone()
    x[wrong] = stamp(train.x[wrong])
    rows = (aimed != IGNORE).nonzero().squeeze(1)
    plain = test.take(rows)
    made = replace(train, x=x, y=torch.where(wrong, aim, train.y))
    return Manipulated(made, train.y, wrong, known(wrong, share, seed), given, replace(plain, x=stamp(plain.x)), aimed[rows], plain)


def mislabel(train: Examples, test: Examples, m: int, *, share: float = 1.0, seed: int = 0) -> Manipulated:
    """Permute the labels of m records among themselves so that none keeps its own. Test is the whole test set.

    The published benchmark takes any permutation, in which about one record in C keeps its label and is not manipulated.
    """
    if m < 2:
        raise SettingError(f"m must be at least 2 to permute labels, not {m}")
    wrong = draw(torch.arange(len(train)), m, len(train), seed, "records")
    rows = wrong.nonzero().squeeze(1)
    y = train.y.clone()
    y[rows] = deranged(train.y[rows], torch.Generator().manual_seed(seed + 2))
    return Manipulated(replace(train, y=y), train.y, wrong, known(wrong, share, seed), (), test, torch.full((len(test),), IGNORE), test)


def confuse(train: Examples, test: Examples, m: int, a: int, b: int, *, share: float = 1.0, seed: int = 0) -> Manipulated:
    """Swap the labels of m / 2 records of class a and m / 2 of class b. Test is the test records of both classes."""
    pairs = ((int(a), int(b)), (int(b), int(a)))
    goal = goals(pairs, classes(train))
    if m < 2 or m % 2:
        raise SettingError(f"m must be even and at least 2, half from each class, not {m}")
    halves = [draw((train.y == c).nonzero().squeeze(1), m // 2, len(train), seed, f"records of class {c}") for c in (a, b)]
    wrong = halves[0] | halves[1]
    rows = (goal[test.y] != IGNORE).nonzero().squeeze(1)
    both = test.take(rows)
    made = replace(train, y=torch.where(wrong, goal[train.y], train.y))
    return Manipulated(made, train.y, wrong, known(wrong, share, seed), pairs, both, goal[both.y], both)


def classes(data: Examples) -> list[int]:
    """The labels that occur, sorted. Raises SplitError for real-valued targets."""
    if data.y.is_floating_point():
        raise SplitError("manipulated data needs class labels; these targets are real-valued")
    return data.y.unique().tolist()


def goals(pairs: Sequence[tuple[int, int]], found: Sequence[int]) -> Tensor:
    """(C,) target of every class, IGNORE for classes that are no source. Raises SettingError for pairs that cannot be.

    >>> goals([(0, 2)], [0, 1, 2])
    tensor([   2, -100, -100])
    """
    out = torch.full((max(found) + 1,), IGNORE)
    for s, t in pairs:
        if s == t or s not in found or t not in found:
            raise SettingError(f"cannot send class {s} to class {t}: they must differ and be among {', '.join(map(str, found[:20]))}")
        if out[s] != IGNORE:
            raise SettingError(f"class {s} is the source of two pairs; each class has one target")
        out[s] = t
    return out


def draw(rows: Tensor, m: int, n: int, seed: int, what: str) -> Tensor:
    """(n,) bool with m of the given rows, drawn at random."""
    if not 0 < m <= len(rows):
        raise SettingError(f"m must ask for 1 to {len(rows)} {what}, not {m}")
    out = torch.zeros(n, dtype=torch.bool)
    out[rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:m]]] = True
    return out


def known(wrong: Tensor, share: float, seed: int) -> Tensor:
    """(N,) bool: round(share * m) of the m rows, at least one; a larger share holds all rows of a smaller one."""
    if not 0 < share <= 1:
        raise SettingError(f"share must be in (0, 1], not {share}")
    rows = wrong.nonzero().squeeze(1)
    return draw(rows, max(1, round(share * len(rows))), len(wrong), seed + 1, "manipulated records")


def deranged(y: Tensor, generator: torch.Generator) -> Tensor:
    """A random rearrangement of labels (m,) in which no place keeps its label. Raises SplitError if one label fills more than half.

    A random permutation, then every place that still has its own label swaps with a random place where both become wrong.
    """
    new = y[torch.randperm(len(y), generator=generator)]
    for i in (new == y).nonzero().squeeze(1).tolist():
        if new[i] != y[i]:
            continue
        fit = ((new != y[i]) & (y != new[i])).nonzero().squeeze(1)
        if not len(fit):
            raise SplitError(f"label {int(y[i])} fills more than half of the {len(y)} drawn records: they cannot all get another one")
        j = int(fit[torch.randint(len(fit), (1,), generator=generator)])
        new[i], new[j] = new[j].clone(), new[i].clone()
    return new
