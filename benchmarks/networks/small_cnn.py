"""A small convolutional network for digits."""

from typing import Final

import torch
from torch import nn

from benchmarks.networks.base import Classifier


class SmallCnn(Classifier):
    """Three stages of two convolutions for 28 x 28 digits."""

    WIDTHS: Final = (32, 64, 64)

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(channels)
        stages, inputs = [], channels
        for width in self.WIDTHS:
            for stride in (2, 1):
                conv = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
                stages.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
                inputs = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Six stage ends and the pooled vector; logits."""
        x = (x - self.mean) / self.std
        ends = []
        for stage in self.stages:
            x = stage(x)
            ends.append(x)
        pooled = x.mean((2, 3))
        return [*ends, pooled], self.head(pooled)
