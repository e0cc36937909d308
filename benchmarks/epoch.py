"""One SalUn-style unlearning epoch (random labels on a tenth, true labels on the rest, half of the weights frozen) on CIFAR-shaped images.

Ours: `alternate` over data in memory with the vectorised crop and flip. Against it: a DataLoader over a data set that crops and flips
PIL images one by one, and a plain loop that multiplies gradients by the mask. Same ResNet-20, batch size and number of steps.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from expunge.core.session import edit
from expunge.core.types import Scope
from expunge.data.records.augment import crop_flip
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.nets import resnet20
from expunge.parts.losses import nll, random_labels, relabel
from expunge.parts.updates.descend import alternate

MEAN, DEVIATION = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


class Pictures(Dataset):
    """uint8 images (N, 32, 32, 3), cropped and flipped one by one with PIL, as the usual transform pipeline does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = ImageOps.expand(Image.fromarray(self.images[i]), 4)
        left, top = (int(v) for v in torch.randint(9, (2,)))
        picture = picture.crop((left, top, left + 32, top + 32))
        if torch.rand(()) < 0.5:
            picture = ImageOps.mirror(picture)
        x = (np.asarray(picture, np.float32) / 255 - MEAN) / DEVIATION
        return torch.from_numpy(x).permute(2, 0, 1).contiguous(), int(self.labels[i])


def usual(model: nn.Module, masks: dict[str, Tensor], images: np.ndarray, labels: np.ndarray, forget: int) -> None:
    """The epoch as it is commonly written."""
    model.train()
    stepper = torch.optim.SGD(model.parameters(), 0.013, momentum=0.9, weight_decay=5e-4)
    for part, wrong in ((slice(None, forget), True), (slice(forget, None), False)):
        for x, y in DataLoader(Pictures(images[part], labels[part]), batch_size=128, shuffle=True):
            target = torch.randint(10, y.shape) if wrong else y
            stepper.zero_grad()
            F.cross_entropy(model(x), target).backward()
            for name, p in model.named_parameters():
                p.grad *= masks[name]
            stepper.step()


def ours(model: nn.Module, masks: dict[str, Tensor], data: Examples, forget: int) -> None:
    """The epoch on the session and the loop of the package."""
    task, rows = classification(), torch.arange(len(data))
    gone, kept = data.take(rows[:forget]), data.take(rows[forget:])

    def away(batch) -> Tensor:
        out = task.forward(model, batch)
        return relabel(out, random_labels(out.labels, 10, other=False)).mean()

    with edit(model, Scope(masks)) as e:
        e.train()
        phases = (away, task.batches(gone, 128, seed=0)), (lambda b: nll(task.forward(model, b)).mean(), task.batches(kept, 128, seed=1))
        alternate(e, *phases, lr=0.013, momentum=0.9, weight_decay=5e-4)


def clocked(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 images instead of 10,000")
    n = 1_000 if parser.parse_args().quick else 10_000
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)
    x = torch.from_numpy((images.astype(np.float32) / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()
    data = Examples(x, torch.from_numpy(labels), torch.arange(n), crop_flip(4))
    model = resnet20()
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    warm = data.take(torch.arange(128))
    ours(model, masks, warm, 64)

    parts = {"usual": clocked(lambda: list(DataLoader(Pictures(images, labels), batch_size=128))), "ours": 0.0}
    batches = classification().batches(data, 128, seed=0)
    parts["ours"] = clocked(lambda: list(batches))
    whole = {"usual": clocked(lambda: usual(copy.deepcopy(model), masks, images, labels, n // 10)), "ours": clocked(lambda: ours(model, masks, data, n // 10))}
    print(f"ResNet-20, {n:,} images of 32x32, batch 128, one thread\n")
    print("| form | epoch, CPU s | times faster | reading and augmenting, CPU s | times faster |\n|---|---|---|---|---|")
    for form, name in (("usual", "DataLoader, PIL per image, masked gradients"), ("ours", "alternate, tensors, wall on raw bits")):
        print(f"| {name} | {whole[form]:.2f} | {whole['usual'] / whole[form]:.2f} | {parts[form]:.3f} | {parts['usual'] / parts[form]:.1f} |")


if __name__ == "__main__":
    main()
