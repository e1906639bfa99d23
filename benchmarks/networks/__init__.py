"""Architectures of the targets. Adding one: a file here and a line in `NETWORKS`."""

from collections.abc import Callable
from typing import Final

from benchmarks.networks.base import Classifier
from benchmarks.networks.convnext import ConvNext
from benchmarks.networks.efficientnet import EfficientNetLite
from benchmarks.networks.resnet18 import NarrowResNet18
from benchmarks.networks.resnets import StagedResNet
from benchmarks.networks.small_cnn import SmallCnn

__all__ = ["NETWORKS", "Classifier"]

NETWORKS: Final[dict[str, Callable[[int, int, int], Classifier]]] = {
    "staged_resnet": StagedResNet,
    "narrow_resnet18": NarrowResNet18,
    "small_cnn": SmallCnn,
    "convnext": ConvNext,
    "efficientnet_lite": EfficientNetLite,
}
