"""A small ConvNeXt: no batch norm, layer norms and depthwise convolutions instead."""

from itertools import pairwise
from typing import Final, cast

import torch
from torch import nn
from torch.nn import functional

from benchmarks.networks.base import Classifier


class ConvNextBlock(nn.Module):
    """Depthwise convolution, layer norm, inverted bottleneck, residual (Liu et al. 2022, "A ConvNet for the 2020s")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H, W) -> the same."""
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return cast("torch.Tensor", x + self.down(functional.gelu(self.up(inner))).permute(0, 3, 1, 2))


class ConvNext(Classifier):
    """ConvNeXt-like: convolutional stem, three stages of two blocks with strided convolutions between; no batch norm inside."""

    WIDTHS: Final = (64, 128, 256)
    stretch = 3.0

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(channels)
        stride = max(1, side // 32)
        self.stem = nn.Sequential(nn.Conv2d(channels, 32, 3, stride, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1))
        self.downs = nn.ModuleList([nn.Identity(), *(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(self.WIDTHS))])
        self.stages = nn.ModuleList([nn.Sequential(ConvNextBlock(w), ConvNextBlock(w)) for w in self.WIDTHS])
        self.norm = nn.LayerNorm(self.WIDTHS[-1])
        self.head = nn.Linear(self.WIDTHS[-1], classes)

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Six block ends and the pooled vector; logits."""
        x = self.stem((x - self.mean) / self.std)
        ends = []
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = down(x)
            for block in cast("nn.Sequential", stage):
                x = block(x)
                ends.append(x)
        pooled = self.norm(x.mean((2, 3)))
        return [*ends, pooled], self.head(pooled)
