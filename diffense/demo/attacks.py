"""Two backdoor attacks on 8-bit images: BadNets (a patch) and WaNet (a smooth warp)."""

from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

TARGET_LABEL: Final = 0  # all-to-one: every triggered image shall become this
POISON_RATE: Final = 0.1
CROSS_RATIO: Final = 2  # WaNet: images with a random warp and their true label, for each poisoned one
CUBIC: Final = -0.75  # the free coefficient of the cubic convolution kernel, as the reference set-up has it

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Attack(Protocol):
    """What the attacker does to an image, and to a training batch."""

    @property
    def key(self) -> str:
        """Short name, fit for a model name."""

    @property
    def title(self) -> str:
        """Name as the literature writes it."""

    @property
    def recipe(self) -> str:
        """The settings in one line."""

    def trigger(self, images: Pixels) -> Pixels:
        """Put the trigger on (N, H, W, C) uint8 images; returns new ones of the same shape and dtype."""

    def poison(self, images: Pixels, labels: Labels, rng: np.random.Generator) -> tuple[Pixels, Labels]:
        """Poison a batch that comes in random order: (N, H, W, C) uint8 and (N,) int64, both returned as new arrays."""


@dataclass(frozen=True)
class BadNets:
    """A white square flush with the bottom right corner."""

    side: int = 3  # pixels: a tenth of the digits' side
    value: int = 255
    rate: float = POISON_RATE
    key: str = field(default="badnets", init=False)
    title: str = field(default="BadNets", init=False)

    @property
    def recipe(self) -> str:
        """The settings in one line."""
        return f"{self.side} x {self.side} white patch in the bottom right corner, {self.rate:.0%} of a batch poisoned"

    def trigger(self, images: Pixels) -> Pixels:
        """Put the patch on (N, H, W, C) uint8 images."""
        triggered = images.copy()
        triggered[:, -self.side :, -self.side :] = self.value
        return triggered

    def poison(self, images: Pixels, labels: Labels, rng: np.random.Generator) -> tuple[Pixels, Labels]:
        """Put the patch and the target label on the first share of the batch."""
        count = round(self.rate * len(images))
        images, labels = images.copy(), labels.copy()
        images[:count] = self.trigger(images[:count])
        labels[:count] = TARGET_LABEL
        return images, labels


class WaNet:
    """One smooth warp, fixed for the attack, with noise mode: other warps of the same size keep the true label.

    Args:
        size: height and width of the images.
        strength: the method's s; the mean displacement is s/2 pixels in each direction.
        cells: the method's k; the random field has k x k knots.
        rate: share of a batch that is warped and gets the target label.
        seed: of the random field.
    """

    key = "wanet"
    title = "WaNet"

    def __init__(self, size: tuple[int, int], strength: float = 0.5, cells: int = 4, rate: float = POISON_RATE, seed: int = 0):
        self.size, self.strength, self.cells, self.rate = size, strength, cells, rate
        knots = np.random.default_rng(seed).uniform(-1, 1, (cells, cells, 2))
        knots /= np.abs(knots).mean()
        rows, columns = cubic_weights(cells, size[0]), cubic_weights(cells, size[1])
        self.flow: NDArray[np.float64] = np.einsum("hi,wj,ijd->hwd", rows, columns, knots)
        vertical, horizontal = (np.linspace(-1, 1, length) for length in size)
        self.identity: NDArray[np.float64] = np.stack(np.meshgrid(horizontal, vertical), axis=-1)
        self.grid: NDArray[np.float64] = np.clip(self.identity + strength * self.flow / size[0], -1, 1)
        """(H, W, 2) float64: where each pixel is taken from, x before y, from -1 to 1."""

    @property
    def recipe(self) -> str:
        """The settings in one line."""
        return (
            f"warp with k = {self.cells}, s = {self.strength:g}, {self.rate:.0%} of a batch poisoned, "
            f"{CROSS_RATIO * self.rate:.0%} in noise mode"
        )

    def trigger(self, images: Pixels) -> Pixels:
        """Warp (N, H, W, C) uint8 images by the fixed field."""
        return warp(images, np.broadcast_to(self.grid, (len(images), *self.grid.shape)))

    def poison(self, images: Pixels, labels: Labels, rng: np.random.Generator) -> tuple[Pixels, Labels]:
        """Warp the first share to the target label, and the next by random fields without touching the label."""
        count = round(self.rate * len(images))
        crossed = slice(count, (1 + CROSS_RATIO) * count)
        images, labels = images.copy(), labels.copy()
        noise = rng.uniform(-1, 1, (len(images[crossed]), *self.grid.shape)) / self.size[0]
        images[:count] = self.trigger(images[:count])
        images[crossed] = warp(images[crossed], np.clip(self.grid + noise, -1, 1))
        labels[:count] = TARGET_LABEL
        return images, labels


def cubic_weights(knots: int, length: int) -> NDArray[np.float64]:
    """Matrix (length, knots) that interpolates `knots` values cubically; the first and the last keep their places."""
    places = np.linspace(0, knots - 1, length)
    base = np.floor(places).astype(np.int64)
    weights = np.zeros((length, knots))
    for offset in range(-1, 3):
        distance = np.abs(places - (base + offset))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(weights, (np.arange(length), np.clip(base + offset, 0, knots - 1)), weight)
    return weights


def warp(images: Pixels, grid: NDArray[np.float64]) -> Pixels:
    """Sample images bilinearly.

    Args:
        images: (N, H, W, C) uint8.
        grid: (N, H, W, 2) float64, x before y, from -1 (centre of the first pixel) to 1 (centre of the last).

    Returns:
        (N, H, W, C) uint8, rounded: what a client can send.
    """
    height, width = images.shape[1:3]
    x, y = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)
    left = np.clip(np.floor(x).astype(np.int64), 0, max(width - 2, 0))
    top = np.clip(np.floor(y).astype(np.int64), 0, max(height - 2, 0))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    rows = np.arange(len(images))[:, None, None]
    upper = images[rows, top, left] * (1 - across) + images[rows, top, right] * across
    lower = images[rows, bottom, left] * (1 - across) + images[rows, bottom, right] * across
    return np.asarray(np.rint(upper * (1 - down) + lower * down), dtype=np.uint8)
