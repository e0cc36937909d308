"""A lean encoder-decoder that restores images of 8 to 32 pixels: for tests and worlds, without any download."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Restorer(nn.Module):
    """An `encoder` (B, inputs, H, W) -> (B, widths[-1], H / 4, W / 4) and a `decoder` back to (B, channels, H, W), with no way around the code between."""

    def __init__(self, inputs: int = 2, channels: int = 1, widths: Sequence[int] = (16, 24, 32)) -> None:
        super().__init__()
        a, b, c = widths
        self.encoder = nn.Sequential(*_layer(inputs, a), *_layer(a, b, 2), *_layer(b, c, 2), nn.Conv2d(c, c, 3, padding=1))
        up = nn.Upsample(scale_factor=2)
        self.decoder = nn.Sequential(*_layer(c, c), up, *_layer(c, b), up, *_layer(b, a), nn.Conv2d(a, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, channels, H, W); H and W are multiples of 4."""
        return self.decoder(self.encoder(x))


def _layer(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()
