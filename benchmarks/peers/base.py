"""What a peer is given and what it must give: the rival detectors of the bench share this interface.

One sign rule: a score is higher for more suspicious inputs. N images, C classes, K taps of width d.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.precision import to_channels_last

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]
Images = NDArray[np.uint8] | NDArray[np.float32]

BATCH: Final = 256
WITH_BACKWARD: Final = 2.5  # what a forward and backward pass costs, in forward passes
FEWEST: Final = 5  # rows of a class from which a spread is estimated; below it the class borrows that of all rows


@dataclass(frozen=True)
class Inspected:
    """N images as the target sees them.

    Attributes:
        images: (N, H, W, channels).
        logits: (N, C) of the target.
        latents: (N, K, d) the guard's own whitened latents, tap by tap, shallow to deep; padding entries are zero.
        source: (N,) the row whose changed copy each one is, its own where it is none; None: there are no copies. Originals
            come first.
    """

    images: NDArray[np.uint8]
    logits: NDArray[np.float32]
    latents: NDArray[np.float32]
    source: Labels | None = None

    @cached_property
    def predicted(self) -> Labels:
        """(N,) labels that the target gives."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)


class Tapped(Protocol):
    """What a network of the bench has besides ``forward``."""

    head: nn.Linear

    def activations(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Activations at the ends of the blocks, shallow to deep, the (N, F) penultimate vector last; logits."""


class Model:
    """Torch form of the target; counts what it runs.

    Attributes:
        network: in eval mode, float32; ``network(x)`` takes (N, channels, H, W) pixels from 0 to 1 and gives logits.
        classes: C.
        forwards: image forward passes so far; the pass that gave `Inspected.logits` is not among them.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        self.network = to_channels_last(network.eval())
        self.classes = classes
        self.forwards = 0.0

    @property
    def tapped(self) -> Tapped:
        """The network, seen as one that shows its activations."""
        return cast("Tapped", self.network)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weights: torch.Tensor = next(self.network.parameters())
        return weights.device

    def load(self, images: Images) -> torch.Tensor:
        """Uint8 (N, H, W, channels) or float32 (N, channels, H, W) from 0 to 1 -> float32 pixels (N, channels, H, W)."""
        pixels = torch.from_numpy(np.array(images)).to(self.device)
        if pixels.dtype == torch.uint8:
            pixels = pixels.permute(0, 3, 1, 2).float() / 255.0
        return pixels.contiguous(memory_format=torch.channels_last)

    def predict(self, images: Images) -> NDArray[np.float32]:
        """Images, see `load` -> (N, C) logits."""
        found = np.empty((len(images), self.classes), np.float32)
        with torch.no_grad():
            for part in split(len(images)):
                found[part] = self.network(self.load(images[part])).float().cpu().numpy()
        self.forwards += len(images)
        return found

    def activations(self, images: Images) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
        """Images, see `load` -> maps and the (N, F) vector, and (N, C) logits; large: take one part of `split` at a time."""
        parts = []
        with torch.no_grad():
            for part in split(len(images)):
                ends, logits = self.tapped.activations(self.load(images[part]))
                parts.append([a.float().contiguous().cpu().numpy() for a in (*ends, logits)])
        self.forwards += len(images)
        *joined, outputs = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return joined, outputs


class Peer(Protocol):
    """A rival detector.

    Attributes:
        name: key in the registry.
        title: as the literature writes it.
        cheap: False for those that cost more than 20 forward passes an image or fine-tune copies of the target.
    """

    name: str
    title: str
    cheap: bool

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Learn from the defender's clean images; `labels` are their true ones, for peers whose paper needs them."""

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """(N,) float64, higher = more suspicious; the score of an image does not depend on its batch."""


def split(rows: int, size: int = BATCH) -> Iterator[slice]:
    """Slices of at most `size` rows that cover them all."""
    return (slice(start, start + size) for start in range(0, rows, size))


def pick(matrix: Matrix, labels: Labels) -> Matrix:
    """Entry of each row at its label: (N, C), (N,) -> (N,)."""
    return np.asarray(np.take_along_axis(matrix, labels[:, None], axis=1)[:, 0])


def standardise_by_class(clean: Matrix, labels: Labels, classes: int) -> tuple[Matrix, Matrix]:
    """Mean and standard deviation of a clean statistic for each class: (n,) -> (C,), (C,).

    A class without clean images has the mean of all; one with fewer than `FEWEST`, or without spread, the spread of all.
    """
    mean, deviation = np.full(classes, clean.mean()), np.full(classes, clean.std() or 1.0)
    for label in np.unique(labels):
        rows = clean[labels == label]
        mean[label] = rows.mean()
        if len(rows) >= FEWEST and rows.std() > 0.0:
            deviation[label] = rows.std()
    return mean, deviation
