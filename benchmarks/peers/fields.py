"""Fixed random fields and resampling for the corruptions: the same for every image, so that no score depends on its batch."""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pixels = NDArray[np.float32]  # (N, H, W, channels) from 0 to 1

SEED: Final = 0
OCTAVES: Final = 6


def draw(*key: int) -> np.random.Generator:
    """A generator of its own for each corruption and severity."""
    return np.random.default_rng([SEED, *key])


@lru_cache(maxsize=64)
def draw_plasma(height: int, width: int, decay: float, key: int) -> Pixels:
    """Fractal noise from 0 to 1, (H, W): octaves of smooth noise, each finer one divided by `decay`."""
    generator = draw(key)
    total = np.zeros((height, width))
    for octave in range(OCTAVES):
        cells = min(2 ** (octave + 1), max(height, width))
        coarse = generator.random((cells + 1, cells + 1))
        grid = np.meshgrid(np.linspace(0, cells, height), np.linspace(0, cells, width), indexing="ij")
        total += ndimage.map_coordinates(coarse, grid, order=1) / decay**octave
    return np.asarray((total - total.min()) / np.ptp(total), np.float32)


@lru_cache(maxsize=64)
def draw_swaps(height: int, width: int, reach: int, rounds: int, key: int) -> NDArray[np.int64]:
    """Where each pixel comes from after neighbours were swapped at random, `reach` pixels at most, (H W,)."""
    generator = draw(key)
    order = np.arange(height * width).reshape(height, width)
    for _ in range(rounds):
        moves = generator.integers(-reach, reach + 1, (height, width, 2))
        for y in range(height - 1, -1, -1):
            for x in range(width - 1, -1, -1):
                to = (min(max(y + moves[y, x, 0], 0), height - 1), min(max(x + moves[y, x, 1], 0), width - 1))
                order[y, x], order[to] = order[to], order[y, x]
    return order.ravel()


@lru_cache(maxsize=64)
def draw_displacement(height: int, width: int, reach: float, smooth: float, key: int) -> NDArray[np.float64]:
    """Smooth random displacement in pixels, (2, H, W), `reach` at its largest."""
    field = draw(key).uniform(-1, 1, (2, height, width))
    field = ndimage.gaussian_filter(field, (0, smooth, smooth), mode="reflect")
    return np.asarray(field * reach / np.abs(field).max())


def resample(x: Pixels, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Pixels:
    """Bilinear samples at (H, W) places, those outside taken from the border."""
    height, width = x.shape[1:3]
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    v, u = ((rows - top)[..., None].astype(np.float32), (columns - left)[..., None].astype(np.float32))
    upper = x[:, top, left] * (1 - u) + x[:, top, right] * u
    lower = x[:, bottom, left] * (1 - u) + x[:, bottom, right] * u
    return np.asarray(upper * (1 - v) + lower * v)


def streak(x: Pixels, radius: float, sigma: float, degrees: float) -> Pixels:
    """Blur along one direction: trailing samples up to `radius` pixels away, weighted by a Gaussian."""
    height, width = x.shape[1:3]
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    steps = np.arange(0.0, radius + 0.25, 0.5)
    weights = np.exp(-((steps / sigma) ** 2) / 2.0)
    total = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        dy, dx = step * np.sin(np.radians(degrees)), step * np.cos(np.radians(degrees))
        total += np.float32(weight) * resample(x, rows + dy, columns + dx)
    return total


def enlarge(x: Pixels, factor: float) -> Pixels:
    """The middle of the image, `factor` times as large."""
    height, width = x.shape[1:3]
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    cy, cx = (height - 1) / 2, (width - 1) / 2
    return resample(x, cy + (rows - cy) / factor, cx + (columns - cx) / factor)
