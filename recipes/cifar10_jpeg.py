"""The pretrained CIFAR-10 ResNet-20 and its JPEG images, for `expunge forget`; reads EXPUNGE_DATA/vision/cifar10.

    W=$EXPUNGE_DATA/vision/cifar10/models/cifar10_jpeg_resnet20.safetensors
    expunge forget --model py:recipes.cifar10_jpeg:build --weights $W \\
        --train py:recipes.cifar10_jpeg:train --test py:recipes.cifar10_jpeg:test --forget class:3
"""

import numpy as np

from expunge.modalities.classification.worlds import cifar10_part
from expunge.modalities.nets import resnet20

CLASS, SAMPLE = 3, 1000


def build():
    """The network, with the names of the weight file."""
    return resnet20()


def train():
    """All 5,000 training images of class 3 and 1,000 of each other class: 14,000 of the 50,000 that the model was trained on."""
    rows = np.arange(50_000)  # sorted by class, 5,000 each
    return cifar10_part("train", rows[(rows // 5000 == CLASS) | (rows % 5000 < SAMPLE)])


def test():
    """The 10,000 test images, which the model was not trained on."""
    return cifar10_part("test", np.arange(10_000))
