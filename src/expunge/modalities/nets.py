"""Small networks that worlds, demo and tests train: no weights are shipped, `torchvision` is not needed.

Names of parameters follow the sources, so that public state dicts load: `resnet20` is the CIFAR ResNet of He et al. 2015
(6n+2 layers, option-A shortcuts) with the names of the common PyTorch port (`conv1`, `bn1`, `layer{1,2,3}.{i}...`, `linear`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and an option-A shortcut: stride-2 subsampling and zero padding of channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        short = F.pad(short, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)) if self.extra else short
        return F.relu(out + short)


class ResNet(nn.Module):
    """CIFAR ResNet with 6n+2 layers and widths (w, 2w, 4w)."""

    def __init__(self, n: int = 3, classes: int = 10, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*[Block(width, width, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(*[Block(width if i == 0 else 2 * width, 2 * width, 2 if i == 0 else 1) for i in range(n)])
        self.layer3 = nn.Sequential(*[Block(2 * width if i == 0 else 4 * width, 4 * width, 2 if i == 0 else 1) for i in range(n)])
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(classes: int = 10, width: int = 16) -> ResNet:
    """The 0.27 M parameter CIFAR ResNet (n = 3)."""
    return ResNet(3, classes, width)


def small_cnn(side: int = 28, classes: int = 10, width: int = 16) -> nn.Sequential:
    """Two convolutions, one hidden layer: for grey images (B, 1, side, side) with `side` a multiple of 4."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, 4 * width), nn.ReLU(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def mlp(inputs: int = 64, outputs: int = 10, hidden: int = 64) -> nn.Sequential:
    """Two hidden layers with ReLU: for rows (B, inputs); `outputs` = 1 for a regressor."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
