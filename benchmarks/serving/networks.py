"""Classifiers whose speed is what counts: usual sizes, random weights, heads that use all their classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.targets import export_network
from diffense.demo.digits import SIDE
from diffense.demo.training import WIDTHS, make_classifier
from diffense_export.parity import draw_smooth_noise

CLASSES: Final = 10


class Residual(nn.Module):
    """Convolutions with batch norm, added to their input (He et al. 2016, "Deep residual learning")."""

    def __init__(self, inputs: int, outputs: int, inner: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, (a, b, kernel, stride) in enumerate(inner):
            layers += [nn.ReLU()] if place else []
            layers += [nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b)]
        self.inner = nn.Sequential(*layers)
        stride = max(step for *_, step in inner)
        changed = stride > 1 or inputs != outputs
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changed else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        return torch.relu(self.inner(x) + self.skip(x))


class Pooled(nn.Module):
    """A body, the mean over places or tokens, a linear head."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, CLASSES)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) or (N, T, C) -> (N, C)."""
        x = self.body(x)
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 10)."""
        return cast("torch.Tensor", self.head(self.pool(x)))


class Attention(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, ViT)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, width) -> the same."""
        parts = self.mix(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + cast("torch.Tensor", self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """Image -> tokens with their places."""

    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, T, width)."""
        return cast("torch.Tensor", self.cut(x).flatten(2).transpose(1, 2)) + self.places


def make_resnet18() -> Pooled:
    """ResNet-18 as it is used at 32 x 32: a 3 x 3 stem and no pooling after it."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for step in (stride, 1):
            layers.append(Residual(width, outputs, [(width, outputs, 3, step), (outputs, outputs, 3, 1)]))
            width = outputs
    return Pooled(nn.Sequential(*layers), width)


def make_resnet50() -> Pooled:
    """ResNet-50 at 224 x 224."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for inner, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for place in range(count):
            step = stride if place == 0 else 1
            layers.append(Residual(width, 4 * inner, [(width, inner, 1, 1), (inner, inner, 3, step), (inner, 4 * inner, 1, 1)]))
            width = 4 * inner
    return Pooled(nn.Sequential(*layers), width)


def make_vit_small() -> Pooled:
    """ViT-S/16 at 224 x 224, the mean of its tokens instead of a class token."""
    body = nn.Sequential(Patches(224, 16, 384), *(Attention(384, 6) for _ in range(12)), nn.LayerNorm(384))
    return Pooled(body, 384)


def make_demo() -> Pooled:
    """The classifier of ``diffense demo``."""
    demo = make_classifier(0)
    return Pooled(nn.Sequential(demo.stem, nn.ReLU(), demo.stages), WIDTHS[-1])


class Network(NamedTuple):
    """One network: height and width of its images, their channels, and what makes it."""

    side: int
    channels: int
    make: Callable[[], Pooled]


NETWORKS: Final = {
    "demo": Network(SIDE, 1, make_demo),
    "resnet18_32": Network(32, 3, make_resnet18),
    "resnet50_224": Network(224, 3, make_resnet50),
    "vit_small_224": Network(224, 3, make_vit_small),
}


def draw_images(name: str, count: int) -> NDArray[np.uint8]:
    """(count, side, side, channels) smooth noise, as large as a network takes it."""
    side, channels, _ = NETWORKS[name]
    return draw_smooth_noise(count, (side, side), channels)


def write_network(name: str, images: NDArray[np.uint8], path: Path) -> None:
    """Write a network as ONNX; its head is turned so that these (N, side, side, channels) images get all kinds of labels."""
    torch.manual_seed(0)
    network = NETWORKS[name].make().eval()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    with torch.no_grad():
        pooled = torch.cat([network.pool(x[i : i + 16]) for i in range(0, len(x), 16)])
        spread = torch.linalg.svd(pooled - pooled.mean(0), full_matrices=False)
        directions = spread.Vh[:CLASSES] / spread.S[:CLASSES, None] * len(x) ** 0.5
        turn = torch.linalg.qr(torch.randn(CLASSES, CLASSES)).Q
        network.head.weight.copy_(turn @ directions)
        network.head.bias.copy_(-network.head.weight @ pooled.mean(0))
    export_network(network, images.shape[3], images.shape[1], path)
