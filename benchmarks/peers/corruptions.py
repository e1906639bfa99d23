"""Fifteen corruptions at five severities in the manner of ImageNet-C, for TeCo.

Kinds and strengths after Hendrycks and Dietterich, ICLR 2019, "Benchmarking neural network robustness to common corruptions and
perturbations"; written anew with numpy and scipy. Lengths are meant for 224 pixels and are scaled to the image's side. Frost
photographs are replaced by fractal noise. Random fields are fixed, see `fields`. Each takes (N, H, W, channels) from 0 to 1
and a severity from 1 to 5; 1 or 3 channels.
"""

import io
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers.blurs import SIDE, defocus_blur, elastic_transform, glass_blur, motion_blur, pixelate, zoom_blur
from benchmarks.peers.fields import Pixels, draw, draw_plasma, streak

SEVERITIES: Final = 5


def gaussian_noise(x: Pixels, severity: int) -> Pixels:
    """Normal noise."""
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * draw(0, severity).standard_normal(x.shape[1:], np.float32)


def shot_noise(x: Pixels, severity: int) -> Pixels:
    """Poisson noise; every image starts its generator anew."""
    rate = (60, 25, 12, 5, 3)[severity - 1]
    return np.array([draw(1, severity).poisson(image * rate) / rate for image in x], np.float32)


def impulse_noise(x: Pixels, severity: int) -> Pixels:
    """Salt and pepper."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    chance = draw(2, severity).random(x.shape[1:])
    return np.where(chance < share / 2, np.float32(0), np.where(chance > 1 - share / 2, np.float32(1), x))


def snow(x: Pixels, severity: int) -> Pixels:
    """Streaks of flakes over a whitened image."""
    mean, spread, threshold, trail, keep = (
        (0.1, 0.3, 0.5, (10, 4), 0.8), (0.2, 0.3, 0.5, (12, 4), 0.7), (0.55, 0.3, 0.9, (12, 8), 0.7),
        (0.55, 0.3, 0.85, (12, 8), 0.65), (0.55, 0.3, 0.85, (12, 12), 0.55),
    )[severity - 1]  # fmt: skip
    height, width = x.shape[1:3]
    flakes = mean + spread * draw(7, severity).standard_normal((1, height, width, 1), np.float32)
    flakes = np.clip(np.where(flakes < threshold, np.float32(0), flakes), 0, 1)
    # Never shorter than three pixels, or flakes of one pixel would stay so bright that small images vanish behind them.
    layer = streak(flakes, max(3.0, trail[0] * height / SIDE), max(1.5, trail[1] * height / SIDE), -60.0)
    grey = x.mean(axis=3, keepdims=True)
    return np.asarray(keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5) + layer + layer[:, ::-1, ::-1], np.float32)


def frost(x: Pixels, severity: int) -> Pixels:
    """Image darkened, crystals (sharpened fractal noise) added."""
    keep, ice = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    crystals = np.abs(2 * draw_plasma(x.shape[1], x.shape[2], 1.3, 8) - 1) ** np.float32(0.7)
    return np.asarray(keep * x + ice * crystals[:, :, None], np.float32)


def fog(x: Pixels, severity: int) -> Pixels:
    """Fractal noise added, the brightest value kept."""
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    plasma = draw_plasma(x.shape[1], x.shape[2], decay, 9)[:, :, None]
    return np.asarray((x + amount * plasma) * brightest / (brightest + amount), np.float32)


def brightness(x: Pixels, severity: int) -> Pixels:
    """HSV value raised; hue and saturation stay."""
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + np.float32(severity / 10), 1)
    return np.where(value > 0, x * raised / np.maximum(value, np.float32(1e-6)), raised)


def contrast(x: Pixels, severity: int) -> Pixels:
    """Distance to each channel's mean reduced."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    return np.asarray((x - mean) * np.float32((0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]) + mean)


def jpeg_compression(x: Pixels, severity: int) -> Pixels:
    """JPEG at quality 25 to 7."""
    quality = (25, 18, 15, 10, 7)[severity - 1]
    found = np.empty_like(x)
    for i, image in enumerate(quantise(x)):
        buffer = io.BytesIO()
        Image.fromarray(image if x.shape[3] == 3 else image[:, :, 0]).save(buffer, "JPEG", quality=quality)
        found[i] = np.asarray(Image.open(buffer), np.float32).reshape(image.shape) / 255
    return found


def quantise(x: Pixels) -> NDArray[np.uint8]:
    """Back to 8 bits."""
    return np.asarray(np.rint(np.clip(x, 0, 1) * 255), np.uint8)


def on_bytes(corrupt: Callable[[Pixels, int], Pixels]) -> Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]:
    """The corruption of 8-bit images."""
    return lambda images, severity: quantise(corrupt(images.astype(np.float32) / 255, severity))


KINDS: Final = (
    gaussian_noise,
    shot_noise,
    impulse_noise,
    defocus_blur,
    glass_blur,
    motion_blur,
    zoom_blur,
    snow,
    frost,
    fog,
    brightness,
    contrast,
    elastic_transform,
    pixelate,
    jpeg_compression,
)
CORRUPTIONS: Final = {kind.__name__: on_bytes(kind) for kind in KINDS}
