"""Unlearnable examples: images changed before release, so that models trained on them learn little that is true of clean images.

CUDA      "CUDA: Convolution-based Unlearnable Datasets", CVPR 2023. Reads labels, needs no model: one small filter per class, drawn from a secret key.
          k_c = Uniform(0, blur) with one entry at a random place set to 1;   x' = floor(255 (k_c * x) / max(k_c * x)) / 255.
Clusters  "Unlearnable Clusters: Towards Label-agnostic Unlearnable Examples", CVPR 2023. Reads no label, needs a trained surrogate with features f.
          c_1..c_p = K-means centres of f(x);   delta_i = eps clip(G_i(xi_i), -1, 1) with fixed noise xi_i and a fresh generator G_i, trained on
          min KL(softmax(c_j) || softmax(f(clip(x + delta_i, 0, 1)))), j = i + 1 mod p;   x' = clip(x + delta_{cluster of x}, 0, 1).

Images are floats in 0..1, (N, C, H, W), and stay so; labels, ids and augmentation stay. `clusters` keeps |x' - x| <= eps; `cuda` has no such bound
and is visible. Neither takes anything out of a model that has already learned the images, and whoever holds clean and protected pairs can
undo both. How much protection is left on given data is for `audits.records.shield` to measure. A bound protects little where eps * sqrt(C H W) is small
against the distance between class means: on 8x8 digits at 16/255 they are 0.5 and 2.0, and not even noise drawn per class lowers clean accuracy.

Differs   The published clusters code trains every G_i on all images (`on="all"`), the paper on those of its cluster, which protects better here; its clip
          acts on G_i itself, here on G_i in units of eps, so that one lr serves every bound. CUDA's filters come from a keyed hash of (key, class) and
          not from one stream, so that a class keeps its filter whatever other classes there are.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core import guard
from expunge.core.errors import DataError, SettingError
from expunge.core.machine.devices import reseeded
from expunge.core.session import scratch
from expunge.core.types import Out, Task
from expunge.modalities.examples import Examples
from expunge.parts.losses import kl
from expunge.parts.reading import features
from expunge.parts.updates.descend import descend

ON = ("cluster", "all")


def cuda(data: Examples, key: int, *, blur: float = 0.3, size: int = 3, share: float = 1.0) -> Examples:
    """Every image of class c convolved with `kernel(key, c)` and divided by its own maximum; the key is what an owner keeps secret.

    blur    largest entry of a filter but one
    size    side of the filters, odd; to be as strong on larger images they must be larger too
    share   of the images that are changed, each drawn with this probability
    Raises DataError for images or labels it cannot read, SettingError for a setting out of range.
    """
    check_images(data)
    if data.y.ndim != 1 or data.y.is_floating_point():
        raise DataError(f"cuda needs one integer label per image; found {str(data.y.dtype).removeprefix('torch.')} {tuple(data.y.shape)}")
    if size < 1 or size % 2 == 0 or not 0 <= blur <= 1 or not 0 < share <= 1:
        raise SettingError(f"size must be odd, blur in 0..1 and share above 0 up to 1; found {size}, {blur:g} and {share:g}")
    x, chosen = data.x.clone(), torch.rand(len(data), generator=_generator(key, "rows")) < share
    for c in data.y.unique().tolist():
        rows = (data.y == c) & chosen
        x[rows] = convolve(data.x[rows], kernel(key, c, size=size, blur=blur))
    return replace(data, x=x)


def kernel(key: int, label: int, *, size: int = 3, blur: float = 0.3) -> Tensor:
    """(size, size) filter of one class: a function of the key and the class alone."""
    g = _generator(key, label)
    k = blur * torch.rand(size * size, generator=g)
    k[torch.randint(size * size, (1,), generator=g)] = 1.0
    return k.view(size, size)


def convolve(x: Tensor, k: Tensor) -> Tensor:
    """floor(255 (k * x) / max(k * x)) / 255 for images (N, C, H, W): cross-correlation of each channel with zero padding, one maximum per image.

    >>> x, k = torch.zeros(1, 1, 3, 3), torch.tensor([[0.1, 0.2, 0.0], [0.0, 1.0, 0.1], [0.2, 0.0, 0.1]])
    >>> x[0, 0, 0, 0], x[0, 0, 1, 1] = 1.0, 0.5
    >>> (255 * convolve(x, k)).int()[0, 0].tolist()
    [[255, 0, 24], [60, 145, 0], [0, 24, 12]]
    """
    n, c, h, w = x.shape
    y = F.conv2d(x.reshape(n * c, 1, h, w), k[None, None].to(x), padding=len(k) // 2).view(n, c, h, w)
    y = y / y.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    return (255 * y).clamp(0, 255).floor() / 255


def clusters(
    data: Examples, surrogate: nn.Module, task: Task, *, p: int = 10, eps: float = 16 / 255, steps: int = 100, lr: float = 3e-3, batch_size: int = 256,
    on: str = "cluster", width: int = 16, layer: str = "", seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Examples:  # fmt: skip
    """Every image moved by the perturbation of its cluster, which pushes its features to the centre of the next one. No label is read.

    surrogate    a trained network that reads images in 0..1; `layer` names where its features are taken, the input of the last linear layer without
    p            clusters, and so perturbations; at least 2
    eps          largest change of a pixel
    steps        Adam steps per generator (cosine schedule, weight decay 5e-4) at lr and batch_size; width is its channels
    on           cluster: each generator is trained on the images of its own cluster; all: on all images
    progress     called as progress(text, done, total), once per cluster
    Raises DataError for images it cannot read, SettingError for a setting out of range. The surrogate is left as it was.
    """
    check_images(data)
    if on not in ON:
        raise SettingError(f"on must be one of {', '.join(ON)}, not '{on}'")
    if not 2 <= p <= len(data) or not 0 < eps <= 1 or steps < 1 or width < 1:
        raise SettingError(f"p must be 2 to {len(data)}, eps above 0 up to 1, steps and width at least 1; found {p}, {eps:g}, {steps} and {width}")
    plain, f = replace(data, augment=None), copy.deepcopy(surrogate).requires_grad_(False).eval()
    centres, where = _means(features(f, task, plain, layer).float().cpu(), p, seed)
    x = data.x.clone()
    for i in range(p):
        if progress:
            progress("perturbation", i, p)
        mine, target = where == i, centres[(i + 1) % p]
        part = plain if on == "all" else plain.take(mine.nonzero().squeeze(1))
        g, xi = _network(tuple(data.x.shape[1:]), width, _generator(seed, f"clusters {i}"))

        def loss(batch, g=g, xi=xi, target=target) -> Tensor:
            moved = (batch["x"] + eps * g(xi).clamp(-1, 1)).clamp(0, 1)
            return pull(task.features(f, {**batch, "x": moved}, layer), target).mean()

        batches = task.batches(part, batch_size, epochs=steps / -(-len(part) // batch_size), seed=seed)
        with guard.watching(guard.Guard()):
            descend(scratch(g), loss, batches, lr=lr, optimizer="adam", weight_decay=5e-4, schedule="cosine")
        with torch.no_grad():
            x[mine] = (x[mine] + eps * g(xi).clamp(-1, 1).to(x)).clamp(0, 1)
    return replace(data, x=x)


def pull(features: Tensor, centre: Tensor) -> Tensor:
    """(N,) KL(softmax(centre) || softmax(features)) of features (N, D) and one centre (D,): 0 where they are the same.

    >>> [round(abs(v), 4) for v in pull(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([2.0, 0.0])).tolist()]
    [0.3278, 0.0]
    """
    return kl(Out(nll=features[:, 0], count=torch.ones(len(features)), logits=features), centre.expand_as(features))


def check_images(data: Examples) -> None:
    """Raises DataError unless x is (N, C, H, W) with N at least 1, floating, and in 0..1."""
    x = data.x
    if x.ndim != 4 or not x.is_floating_point() or len(x) == 0:
        raise DataError(f"images must be floats of shape (N, C, H, W); found {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}")
    low, high = float(x.min()), float(x.max())
    if not 0 <= low <= high <= 1:
        raise DataError(f"images must lie in 0..1; found {low:.3g} to {high:.3g}: divide bytes by 255, and protect before normalising")


def _means(values: Tensor, p: int, seed: int) -> tuple[Tensor, Tensor]:
    """K-means centres (p, D) of values (N, D), and the number of each value's cluster (N,)."""
    from sklearn.cluster import KMeans

    found = KMeans(p, n_init=10, random_state=seed).fit(values.double().numpy())
    return torch.as_tensor(found.cluster_centers_, dtype=torch.float32), torch.as_tensor(found.labels_, dtype=torch.long)


def _generator(key: int, stream: int | str) -> torch.Generator:
    digest = hashlib.blake2b(f"shield/{key}/{stream}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _network(shape: tuple[int, ...], width: int, generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """A small residual generator with fresh weights, and its fixed input: uniform noise (1, C, H, W)."""

    def convolution(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(1, b)]

    with reseeded(int(torch.randint(1 << 62, (1,), generator=generator))):
        inner = nn.Sequential(*convolution(width, width), nn.ReLU(), *convolution(width, width))
        net = nn.Sequential(*convolution(shape[0], width), nn.ReLU(), Residual(inner), nn.ReLU(), nn.Conv2d(width, shape[0], 3, padding=1))
        return net, torch.rand(1, *shape)


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, H, W) -> the same shape."""
        return x + self.inner(x)
