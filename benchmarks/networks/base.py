"""What every architecture gives: its logits and, for peers that look inside, the activations at its block ends."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional


class Classifier(nn.Module, ABC):
    """A classifier of (N, C, H, W) float32 pixels from 0 to 1.

    Attributes:
        head: the last linear layer.
        mean, std: (C, 1, 1) normalisation, part of the graph.
        pretrained: whether training starts from weights learned elsewhere.
        dense: whether most of the work is in convolutions over all channels, not depthwise ones.
        stretch: epochs over those of the image set's usual network.
        plain: trained as the literature on backdoors does, by SGD on small batches with hard labels.
    """

    pretrained = False
    plain = False
    dense = True
    stretch = 1.0
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
