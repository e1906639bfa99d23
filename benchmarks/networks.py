"""Architectures of the targets. Each gives its logits and, for peers that look inside, the activations at its block ends."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Final, cast

import torch
from torch import nn
from torch.nn import functional


class Classifier(nn.Module, ABC):
    """A classifier of (N, C, H, W) float32 pixels from 0 to 1.

    Attributes:
        head: the last linear layer.
        mean, std: (C, 1, 1) normalisation, part of the graph.
    """

    head: nn.Linear
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.25))

    def prepare(self, pixels: torch.Tensor) -> None:
        """Set what is taken from training pixels, (N, C, H, W) from 0 to 1: here the normalisation."""
        self.mean.copy_(pixels.mean((0, 2, 3))[:, None, None])
        self.std.copy_(pixels.std((0, 2, 3))[:, None, None].clamp_min(0.05))

    @abstractmethod
    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Activations at the block ends, shallow to deep, the (N, F) penultimate vector last; and (N, classes) logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, classes)."""
        return self.activations(x)[1]


def whiten_stem(stem: nn.Conv2d, pixels: torch.Tensor) -> None:
    """Set a first convolution's filters to whitened patch directions and their negatives (Jordan 2024, airbench).

    Args:
        stem: fixed during training; half of its filters are directions, largest variance first.
        pixels: (N, C, H, W) normalised training pixels.
    """
    kernel = stem.kernel_size[0]
    patches = functional.unfold(pixels[:2000], kernel, stride=2).transpose(1, 2).reshape(-1, pixels.shape[1] * kernel**2)
    values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    count = min(len(stem.weight) // 2, len(values))
    chosen = (vectors / torch.sqrt(values + 1e-2)).flip(1)[:, :count].T.float().reshape(count, -1, kernel, kernel)
    stem.weight.zero_()  # grey images have fewer directions than filters
    stem.weight[: 2 * count] = torch.cat([chosen, -chosen])


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016, "Identity mappings in deep residual networks")."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        inner = functional.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(inner)
        return cast("torch.Tensor", skip + self.conv2(functional.relu(self.norm2(self.conv1(inner)))))


class PreActResNet(Classifier):
    """Pre-activation ResNet: whitening stem, three stages of two blocks (64, 128, 256 channels at 1/2, 1/4, 1/8 of 32 pixels).

    ResNet-18's form with the first, most expensive stage left out and the stem's stride chosen so that it sees 32 x 32.
    """

    WIDTHS: Final = (64, 128, 256)
    STEM: Final = 32

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(channels)
        self.stem = nn.Conv2d(channels, self.STEM, 3, max(1, side // 32), 1, bias=False)
        self.stem.weight.requires_grad_(False)
        pairs = pairwise((self.STEM, *self.WIDTHS))
        self.blocks = nn.ModuleList([block for a, b in pairs for block in (Block(a, b, 2), Block(b, b, 1))])
        self.norm = nn.BatchNorm2d(self.WIDTHS[-1])
        self.head = nn.Linear(self.WIDTHS[-1], classes)

    def prepare(self, pixels: torch.Tensor) -> None:
        """Set normalisation and the whitening stem."""
        super().prepare(pixels)
        whiten_stem(self.stem, (pixels - self.mean) / self.std)

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Six block ends and the pooled vector; logits."""
        x = self.stem((x - self.mean) / self.std)
        ends = []
        for block in self.blocks:
            x = block(x)
            ends.append(x)
        pooled = functional.relu(self.norm(x)).mean((2, 3))
        return [*ends, pooled], self.head(pooled)


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


NETWORKS: Final[dict[str, Callable[[int, int, int], Classifier]]] = {
    "preact_resnet": PreActResNet,
    "staged_resnet": StagedResNet,
    "small_cnn": SmallCnn,
    "convnext": ConvNext,
}
