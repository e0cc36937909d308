"""A lean GAN for images of 8 to 32 pixels: for tests, demo and worlds, without any download.

A GAN is a module with a `generator` (latents -> images in [-1, 1]) and a `discriminator` (images -> (B,) scores). With classes, the generator takes labels
besides, and the discriminator adds the inner product of its features with the label's vector (a projection discriminator); called without labels it is
the part that judges images of any label. Every layer of the discriminator is divided by its largest singular value (spectral norm).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ModelError


def begun(weight: Tensor) -> Tensor:
    """(O,) where the power steps for a weight (O, ...) start."""
    return F.normalize(torch.randn(len(weight), dtype=weight.dtype, device=weight.device), dim=0)


def scaled(weight: Tensor, u: Tensor, step: bool) -> Tensor:
    """W / (u W v), with v = W' u / |W' u|: the weight over its largest singular value once `u` has settled; with `step`, u takes one power step first."""
    w = weight.flatten(1)
    with torch.no_grad():
        v = F.normalize(w.T @ u, dim=0)
        if step:
            u.copy_(F.normalize(w @ v, dim=0))
            v = F.normalize(w.T @ u, dim=0)
        left = u.clone()
    return weight / (left @ w @ v).clamp(min=1e-6)


class Conv(nn.Conv2d):
    """A convolution under spectral norm: one power step per pass in training."""

    u: Tensor

    def reset_parameters(self) -> None:
        """New weights, and a new start of the power steps."""
        super().reset_parameters()
        self.register_buffer("u", begun(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        return self._conv_forward(input, scaled(self.weight, self.u, self.training), self.bias)


class Linear(nn.Linear):
    """A linear layer under spectral norm, likewise."""

    u: Tensor

    def reset_parameters(self) -> None:
        """New weights, and a new start of the power steps."""
        super().reset_parameters()
        self.register_buffer("u", begun(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """(B, I) -> (B, O)."""
        return F.linear(input, scaled(self.weight, self.u, self.training), self.bias)


class Generator(nn.Module):
    """Latents (B, latent) and labels (B,) -> images (B, channels, side, side)."""

    def __init__(self, latent: int = 32, side: int = 8, channels: int = 1, width: int = 32, classes: int = 0) -> None:
        super().__init__()
        if side % 4:
            raise ModelError(f"side must be a multiple of 4, not {side}")
        self.shape = (width, side // 4, side // 4)
        self.label = nn.Embedding(classes, latent) if classes else None
        self.inputs = nn.Linear(2 * latent if classes else latent, width * (side // 4) ** 2)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width // 2, 3, padding=1), nn.GroupNorm(4, width // 2)
        self.out = nn.Conv2d(width // 2, channels, 3, padding=1)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images in [-1, 1]."""
        if self.label is not None:
            if y is None:
                raise ModelError("this generator draws by label: give labels")
            z = torch.cat([z, self.label(y)], 1)
        h = self.inputs(z).unflatten(1, self.shape)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            h = F.silu(norm(conv(F.interpolate(h, scale_factor=2.0))))
        return self.out(h).tanh()


class Discriminator(nn.Module):
    """Images (B, channels, side, side) and labels (B,) or none -> scores (B,), large for real ones."""

    def __init__(self, channels: int = 1, width: int = 32, classes: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Conv(channels, width // 2, 3, padding=1), nn.LeakyReLU(0.1), Conv(width // 2, width, 4, stride=2, padding=1), nn.LeakyReLU(0.1),
            Conv(width, width, 4, stride=2, padding=1), nn.LeakyReLU(0.1), Conv(width, width, 3, padding=1), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.score = Linear(width, 1)
        self.label = nn.Embedding(classes, width) if classes else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(B,) scores."""
        h = self.layers(x).sum((2, 3))
        score = self.score(h).squeeze(1)
        return score if y is None or self.label is None else score + (self.label(y) * h).sum(1)


class GAN(nn.Module):
    """A `generator` and a `discriminator`, which only tasks call."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator


def gan_model(*, latent: int = 32, side: int = 8, channels: int = 1, width: int = 32, classes: int = 0) -> GAN:
    """An untrained GAN of some 50,000 parameters at the default width."""
    return GAN(Generator(latent, side, channels, width, classes), Discriminator(channels, width, classes))
