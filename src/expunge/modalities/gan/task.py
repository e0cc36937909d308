"""GANs: nll is how far a record lies from what the generator draws, as a Parzen window sees it.

    nll(x) = -log mean_m exp(-|x - G(z_m)|^2 / (2 h^2))        over M latents z_m that are always the same

Per pixel it is what audits read. It rises for records whose like is drawn no more: the discriminator's score would not do, since a discriminator that is
unsure of everything says nothing about the generator. A model is a module with a `generator`(z) or (z, labels) and a `discriminator`(x) or (x, labels).

Drawn for training, batches take turns: `turn` is first `discriminator`, then `generator`, on fresh latents. nll is then the loss of the one whose turn it is:

    discriminator    hinge      max(0, 1 - D(x)) + max(0, 1 + D(G(z)))         logistic    softplus(-D(x)) + softplus(D(G(z)))
    generator        hinge      -D(G(z))                                       logistic    softplus(-D(G(z)))

Each turn gives a gradient to its own half of the model alone, so one loop and one Adam, which passes over weights without a gradient, trains both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.guard import quiet
from expunge.core.types import Batch, Out, Task, device_of, float_of
from expunge.modalities.examples import Examples

LOSSES = ("hinge", "logistic")
TURNS = ("discriminator", "generator")


@dataclass(frozen=True)
class Game(Task):
    """What methods and audits of GANs ask of their task besides.

    latent   size of z        classes   labels that the generator draws by, 0 for none        judge   as in `gan`
    """

    latent: int = 32
    classes: int = 0
    judge: Any = None

    def batches(self, data: Sequence, size: int, *, epochs: float = 1, seed: int | None = None) -> Any:
        """Plain batches in order without a seed; with one, each batch twice: the discriminator's turn and the generator's."""
        found = super().batches(data, size, epochs=epochs, seed=seed)
        return found if seed is None else Turns(found)


class Turns(Sequence):
    """`Turns(batches)[2 k]` is batch k for the discriminator, `[2 k + 1]` for the generator, whose latents are the other half of those drawn."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2 * len(self.batches)

    def __getitem__(self, k):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= k < len(self):
            raise IndexError(k)
        batch = self.batches[k // 2]
        half = slice(None, len(batch["i"])) if k % 2 == 0 else slice(len(batch["i"]), None)
        return {**batch, "turn": TURNS[k % 2], **{n: batch[n][half] for n in ("z", "c", "as") if n in batch}}


def gan(*, latent: int = 32, classes: int = 0, loss: str = "hinge", draws: int = 1000, width: float = 0.5, judge: Callable | None = None) -> Task:
    """The task of GANs on Examples: images x (N, C, H, W) in [-1, 1], labels y (N,).

    latent   size of z: normal numbers          classes   labels that the generator draws by, with equal chances; 0 for none
    loss     hinge or logistic                  draws     M, images that stand for all the generator draws
    width    h of the window, for pixels in [-1, 1]
    judge    () -> `audits.pictures.canvas.Judge`, which says what an image shows, for audits
    Batch: x, y, i; in training also z (B, latent), c (B,) labels to draw by, `as` (B,) labels that the drawings are judged by, and `turn`. c and `as` differ
    where the data has no image of a label: what is drawn by it must then look like the rest. A training batch without y is judged without labels.
    """
    if loss not in LOSSES:
        raise SettingError(f"loss must be one of {', '.join(LOSSES)}, not '{loss}'")
    task = Game(
        "gan", partial(collate, latent, classes), partial(_forward, loss, draws, width, latent, classes), features,
        latent=latent, classes=classes, judge=judge,
    )  # fmt: skip
    return replace(task, sample=partial(draw, task))


def latents(latent: int, classes: int, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n latents z, and labels c where there are classes."""
    z = torch.randn(n, latent, generator=generator)
    return {"z": z, "c": torch.randint(classes, (n,), generator=generator)} if classes else {"z": z}


def collate(latent: int, classes: int, data: Examples, index: Tensor, generator: torch.Generator | None) -> Batch:
    """Images and labels; for training with 2 B latents, B for each turn. Drawings by a label that the data lacks are judged as if by labels it has."""
    if not isinstance(data, Examples) or data.x.ndim != 4:
        raise SplitError(f"a gan task works on Examples of images (N, C, H, W), not on {data!r}")
    batch: Batch = {"x": data.x[index], "y": data.y[index], "i": index}
    if generator is None:
        return batch
    if data.augment is not None:
        batch["x"] = data.augment(batch["x"], generator)
    batch |= latents(latent, classes, 2 * len(index), generator)
    if classes:
        batch["as"] = torch.where(torch.isin(batch["c"], data.y), batch["c"], batch["y"].repeat(2))
    return batch


def half(model: nn.Module, name: str) -> Any:
    """The model's generator or discriminator."""
    found = getattr(model, name, None)
    if found is None:
        raise ModelError(f"{type(model).__name__} has no {name}")
    return found


def drawn(model: nn.Module, z: Tensor, c: Tensor | None = None) -> Tensor:
    """(B, C, H, W) what the generator makes of latents z (B, Z) and labels c (B,)."""
    device, generator = device_of(model), half(model, "generator")
    z = z.to(device, float_of(model))
    return generator(z) if c is None else generator(z, c.to(device))


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Inside, passes give the module's weights no gradient; what flows through them goes on."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, required in flags:
            p.requires_grad_(required)


def _forward(loss: str, draws: int, width: float, latent: int, classes: int, model: nn.Module, batch: Batch) -> Out:
    if "turn" in batch:
        return _turn(loss, model, batch)
    fixed = latents(latent, classes, draws, torch.Generator().manual_seed(0))
    x = batch["x"].to(device_of(model)).float().flatten(1)
    g = drawn(model, fixed["z"], fixed.get("c")).float().flatten(1)
    if g.shape[1] != x.shape[1]:
        raise ModelError(f"the generator draws {g.shape[1]} numbers for an image of {x.shape[1]}")
    return Out(nll=parzen(x, g, width), count=torch.full((len(x),), float(x.shape[1]), device=x.device))


def parzen(x: Tensor, drawings: Tensor, width: float) -> Tensor:
    """(N,) -log mean_m exp(-|x - g_m|^2 / (2 width^2)) of x (N, D) and drawings (M, D).

    >>> parzen(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.6, 0.8]]), 0.5)
    tensor([2.])
    """
    square = x.square().sum(1)[:, None] + drawings.square().sum(1) - 2 * x @ drawings.T
    return -(torch.logsumexp(-square.clamp(min=0) / (2 * width**2), 1) - torch.tensor(float(len(drawings))).log())


def _turn(loss: str, model: nn.Module, batch: Batch) -> Out:
    """Out of one side's turn: nll is its loss; pred the scores (B, 2) of real and drawn images, or the drawings."""
    discriminator, c = half(model, "discriminator"), batch.get("c")
    labels = {"real": batch["y"], "drawn": batch["as"]} if c is not None and "y" in batch else {}

    def scored(x: Tensor, which: str) -> Tensor:
        y = labels.get(which)
        return (discriminator(x) if y is None else discriminator(x, y.to(x.device))).float().reshape(-1)

    if batch["turn"] == "generator":
        with still(discriminator):
            pred = drawn(model, batch["z"], c)
            score = scored(pred, "drawn")
        nll = -score if loss == "hinge" else F.softplus(-score)
    else:
        with torch.no_grad():
            fake = drawn(model, batch["z"], c)
        pred = torch.stack([scored(batch["x"].to(fake), "real"), scored(fake, "drawn")], 1)
        signed = pred * pred.new_tensor([-1.0, 1.0])
        nll = (F.relu(1 + signed) if loss == "hinge" else F.softplus(signed)).sum(1)
    return Out(nll=nll, count=torch.ones_like(nll), pred=pred)


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, 1) the discriminator's score of each image, without labels."""
    x = batch["x"].to(device_of(model), float_of(model))
    return half(model, "discriminator")(x).reshape(-1, 1)


def draw(task: Any, model: nn.Module, n: int, *, seed: int = 0, label: int | None = None, size: int = 512) -> Tensor:
    """(n, C, H, W) drawings on latents that follow from the seed, whichever model draws; all by one `label` if it is given."""
    found = latents(task.latent, task.classes, n, torch.Generator().manual_seed(seed))
    if label is not None:
        if not 0 <= label < task.classes:
            raise SettingError(f"label must be in 0..{task.classes - 1}, not {label}" if task.classes else "this model draws without labels")
        found["c"] = torch.full((n,), label)
    with quiet(model):
        parts = [drawn(model, found["z"][rows], found["c"][rows] if "c" in found else None) for rows in torch.arange(n).split(size)]
    return torch.cat(parts).float().cpu()
