"""ResNet-18 as the literature on backdoors uses it, a quarter as wide, which two cores can bear."""

from itertools import pairwise
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from benchmarks.networks.base import Classifier


class Block(nn.Module):
    """Residual block (He et al. 2016, "Deep residual learning"): batch norm after each convolution, the shortcut's too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.shortcut(x) + self.norm2(self.conv2(inner)))


class NarrowResNet18(Classifier):
    """The form for 32 x 32 images: a 3 x 3 stem without pooling, four stages of two blocks, twenty batch norms.

    Its channels are 16, 32, 64, 128 instead of 64, 128, 256, 512; at 64 pixels the stem's stride makes it 32 x 32.
    """

    plain = True
    stretch = 2.5
    WIDTHS: Final = (16, 32, 64, 128)

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(channels)
        first = self.WIDTHS[0]
        self.stem, self.norm = nn.Conv2d(channels, first, 3, max(1, side // 32), 1, bias=False), nn.BatchNorm2d(first)
        pairs = pairwise((first, *self.WIDTHS))
        blocks = [block for a, b in pairs for block in (Block(a, b, 1 if a == b else 2), Block(b, b, 1))]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(self.WIDTHS[-1], classes)

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Eight block ends and the pooled vector; logits."""
        x = functional.relu(self.norm(self.stem((x - self.mean) / self.std)))
        ends = []
        for block in self.blocks:
            x = block(x)
            ends.append(x)
        pooled = x.mean((2, 3))
        return [*ends, pooled], self.head(pooled)
