"""Residual networks for 32 x 32 colour images; 64 x 64 ones are brought to that size by the stem's stride."""

from itertools import pairwise
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from benchmarks.networks.base import Classifier, whiten_stem


class Stage(nn.Module):
    """A widening convolution, max-pooling, then one residual convolution; batch norm after each."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.widen, self.norm1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, inputs, H, W) -> what is pooled and what comes out, both (N, outputs, H/2, W/2)."""
        pooled = functional.relu(self.norm1(functional.max_pool2d(self.widen(x), 2)))
        return pooled, pooled + functional.relu(self.norm2(self.conv(pooled)))


class StagedResNet(Classifier):
    """Whitening stem and three stages (64, 256, 256 channels at 1/2, 1/4, 1/8 of 32 pixels), maximum over what is left.

    The layout of the fast CIFAR-10 networks (Page 2018, "How to train your ResNet"; Jordan 2024, airbench); at 64 pixels the
    stem's stride makes it 32 x 32.
    """

    WIDTHS: Final = (64, 256, 256)
    STEM: Final = 32
    HEAD_SCALE: Final = 1 / 8  # maxima are large; unscaled, the first epoch is lost

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(channels)
        self.stem = nn.Conv2d(channels, self.STEM, 3, max(1, side // 32), 1, bias=False)
        self.stem.weight.requires_grad_(False)
        self.stages = nn.ModuleList([Stage(a, b) for a, b in pairwise((self.STEM, *self.WIDTHS))])
        self.head = nn.Linear(self.WIDTHS[-1], classes)

    def prepare(self, pixels: torch.Tensor) -> None:
        """Set normalisation and the whitening stem."""
        super().prepare(pixels)
        whiten_stem(self.stem, (pixels - self.mean) / self.std)

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Two maps a stage and the pooled vector; logits."""
        x = functional.relu(self.stem((x - self.mean) / self.std))
        ends = []
        for stage in self.stages:
            pooled, x = stage(x)
            ends += [pooled, x]
        highest = functional.adaptive_max_pool2d(x, 1).flatten(1) * self.HEAD_SCALE
        return [*ends, highest], self.head(highest)
