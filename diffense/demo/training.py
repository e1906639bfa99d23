"""A small residual classifier, trained the way the attacker does it, and written as an ONNX file."""

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffense.demo.attacks import Attack
from diffense.demo.digits import CLASSES, SIDE, Digits

WIDTHS: Final = (12, 24, 48)
EPOCHS: Final = 24
BATCH: Final = 60
PEAK_RATE: Final = 0.02
WEIGHT_DECAY: Final = 5e-4
SHIFT: Final = 2  # pixels, largest
OPSET: Final = 17
IR_VERSION: Final = 8
INPUT: Final = "image"
OUTPUT: Final = "logits"

Progress = Callable[[float], None]  # share of the training that is done

_SEEDING = threading.Lock()  # the generator of initial weights is one for the whole process


class Unit(nn.Module):
    """A 3 x 3 convolution and its batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) float32 -> (N, outputs, H/stride, W/stride), before the activation."""
        normalised: torch.Tensor = self.norm(self.convolution(x))
        return normalised


class Stage(nn.Module):
    """A unit of stride two and a residual block."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.down, self.first, self.second = Unit(inputs, outputs, 2), Unit(outputs, outputs), Unit(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) float32 -> (N, outputs, H/2, W/2)."""
        x = functional.relu(self.down(x))
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class Classifier(nn.Module):
    """Stem, then a stage for each further width, then the mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(1, WIDTHS[0])
        self.stages = nn.Sequential(*(Stage(*pair) for pair in pairwise(WIDTHS)))
        self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 28, 28) float32 from 0 to 1 -> logits (N, 10) float32."""
        logits: torch.Tensor = self.head(self.stages(functional.relu(self.stem(x))).mean((2, 3)))
        return logits


def make_classifier(seed: int) -> Classifier:
    """Make an untrained classifier; the same seed gives the same weights, also from several threads at once."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier()


def train_classifier(train: Digits, attack: Attack, seed: int, progress: Progress = lambda share: None) -> Classifier:
    """Train a classifier with a backdoor; poisons are redrawn in every batch and made before the augmentation."""
    rng = np.random.default_rng(seed)
    classifier = make_classifier(seed)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(classifier.parameters(), PEAK_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps, pct_start=0.25)
    classifier.train()
    for step in range(steps):
        place = step % (steps // EPOCHS)
        if place == 0:
            order = rng.permutation(len(train))
        chosen = order[place * BATCH : (place + 1) * BATCH]
        images, labels = attack.poison(train.pixels[chosen], train.labels[chosen], rng)
        logits = classifier(augment(images, rng))
        loss = functional.cross_entropy(logits, torch.from_numpy(labels))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        progress((step + 1) / steps)
    classifier.eval()
    return classifier


def augment(images: NDArray[np.uint8], rng: np.random.Generator) -> torch.Tensor:
    """Shift (N, H, W, 1) uint8 images by whole pixels; returns (N, 1, H, W) float32 from 0 to 1.

    Turning or zooming would interpolate, and that wipes out a warp of a quarter of a pixel.
    """
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    down, across = rng.integers(0, 2 * SHIFT + 1, (2, len(images), 1, 1))
    rows, columns = down + np.arange(height)[:, None], across + np.arange(width)
    shifted = padded[np.arange(len(images))[:, None, None], rows, columns]
    planes = torch.from_numpy(shifted).permute(0, 3, 1, 2).float() / 255
    return planes.contiguous(memory_format=torch.channels_last)


def build_onnx(classifier: Classifier) -> onnx.ModelProto:
    """Write a classifier as an ONNX graph: ``image`` (N, 1, 28, 28) float32 -> ``logits`` (N, 10) float32.

    Batch normalisation is folded into the convolutions, as exporters do.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: NDArray[np.float32]) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def convolve(unit: Unit, source: str, name: str) -> str:
        folded = fuse_conv_bn_eval(unit.convolution, unit.norm).state_dict()
        weights = [constant(f"{name}.{part}", folded[part].contiguous().numpy()) for part in ("weight", "bias")]
        stride = list(unit.convolution.stride)
        return node("Conv", [source, *weights], name, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=stride)

    x = node("Relu", [convolve(classifier.stem, INPUT, "stem")], "stem.relu")
    for number, module in enumerate(classifier.stages, 1):
        stage, name = cast("Stage", module), f"stage{number}"
        x = node("Relu", [convolve(stage.down, x, f"{name}.down")], f"{name}.down.relu")
        y = node("Relu", [convolve(stage.first, x, f"{name}.first")], f"{name}.first.relu")
        y = convolve(stage.second, y, f"{name}.second")
        x = node("Relu", [node("Add", [x, y], f"{name}.sum")], f"{name}.relu")
    pooled = node("Flatten", [node("GlobalAveragePool", [x], "pool")], "features", axis=1)
    weight = constant("head.weight", classifier.head.weight.detach().numpy())
    node("Gemm", [pooled, weight, constant("head.bias", classifier.head.bias.detach().numpy())], OUTPUT, transB=1)

    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "digits", [image], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def save_onnx(classifier: Classifier, path: Path) -> None:
    """Write the classifier to `path`; a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    onnx.save(build_onnx(classifier), partial)
    partial.replace(path)
