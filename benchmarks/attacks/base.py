"""What an attack is to the bench: a trigger on 8-bit images, and a way to poison the batches of a training run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.datasets import Images, Spec
from benchmarks.networks import Classifier

TARGET_LABEL: Final = 0  # all-to-one
POISON_RATE: Final = 0.1
BLOCK: Final = 256  # images at a time where no gradient is wanted
CPU: Final = torch.device("cpu")

Pixels = NDArray[np.uint8]
Progress = Callable[[str], None]


class Batch(NamedTuple):
    """A poisoned batch: (N, C, H, W) float32 inputs from 0 to 1, (N,) int64 labels, and what the attack adds to the loss."""

    inputs: torch.Tensor
    labels: torch.Tensor
    penalty: torch.Tensor


class Attack(ABC):
    """One attack on one image set.

    Attributes:
        key: as in file names and results.
        title: as the literature writes it.
        poisons: whether the target is trained with `poison`; False where a clean target is altered afterwards.
        last: whether the trigger comes after the augmentation, as where it is made from the image that the target sees.
        stretch: epochs of its targets over those of a plain one, where the trigger itself is learned on the way.
        revision: raised when the attack changes, so that its targets are trained anew.
        target: the label that the attacker wants.
        source: the only class whose images are attacked, or None: all but the target's.
        device: where its networks are and its batches are put together.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    poisons: ClassVar[bool] = True
    last: ClassVar[bool] = False
    stretch: ClassVar[float] = 1.0
    revision: ClassVar[int] = 0
    target: int = TARGET_LABEL
    source: int | None = None
    device: torch.device = CPU

    def __init__(self, spec: Spec, seed: int) -> None:
        self.spec, self.seed = spec, seed

    def move(self, device: torch.device) -> None:
        """Take the attack's networks to a device."""
        self.device = device
        for module in self.networks().values():
            module.to(device)

    def prepare(self, train: Images, progress: Progress) -> None:
        """Train what the attack needs before the target is trained: an encoder, a mask network. Nothing by default."""
        del train, progress

    @abstractmethod
    def trigger(self, images: Pixels) -> Pixels:
        """Put the trigger on (N, H, W, C) uint8 images; returns new ones, as a client would send them."""

    def poison(self, images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """Poison a batch that comes in random order: by default the first share gets the trigger and the target label."""
        count = round(POISON_RATE * len(images))
        images, labels = images.copy(), labels.copy()
        images[:count] = self.trigger(images[:count])
        labels[:count] = self.target
        return Batch(to_planes(images, self.device), torch.from_numpy(labels), torch.zeros(()))

    def penalise(self, ends: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """What an attacker who knows the guard adds to the loss, from the activations of a poisoned batch: nothing by default.

        Args:
            ends: as from `Classifier.activations`.
            labels: (N,) as `poison` gave them.
        """
        del ends, labels
        return torch.zeros(())

    def step(self, share: float) -> None:
        """Update the attack's own networks after the loss went backward; `share` of the training is done."""
        del share

    def alter(self, network: Classifier, train: Images, progress: Progress) -> None:
        """Alter a trained network, for attacks that do not poison its training; it comes on the CPU and stays there."""
        del network, train, progress

    def cross(self, images: Pixels) -> Pixels | None:
        """Put triggers on that must not work (another image's, a random warp), for attacks that train on such; else None."""
        del images
        return None

    def networks(self) -> dict[str, nn.Module]:
        """The attack's own trained networks, kept with the target."""
        return {}

    def attacked(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of the images that this attack is tried on."""
        wanted = labels != self.target if self.source is None else labels == self.source
        return np.flatnonzero(wanted)


def to_planes(images: Pixels, device: torch.device = CPU) -> torch.Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 from 0 to 1 on a device, channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)


def to_pixels(planes: torch.Tensor) -> Pixels:
    """(N, C, H, W) from 0 to 1 -> (N, H, W, C) uint8."""
    rounded = planes.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).cpu().numpy())


def round_straight(planes: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits and let the gradient through, so that training sees what a client will send."""
    clipped = planes.clamp(0, 1)
    return clipped + (clipped.mul(255).round().div(255) - clipped).detach()


def run_blocks(function: Callable[[torch.Tensor], torch.Tensor], images: Pixels, device: torch.device) -> Pixels:
    """Apply a network on a device to (N, H, W, C) uint8 images block by block, without gradients."""
    if not len(images):
        return images.copy()
    with torch.no_grad():
        blocks = (to_planes(images[i : i + BLOCK], device) for i in range(0, len(images), BLOCK))
        return np.concatenate([to_pixels(function(block)) for block in blocks])
