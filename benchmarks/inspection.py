"""Images seen through a guard's taps: the target runs once for the guard and every latent peer."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import Images, Pixels
from benchmarks.peers.base import Inspected
from diffense.clean import count_split, split_rows
from diffense.guard import Guard


def inspect_images(guard: Guard, pixels: Pixels) -> Inspected:
    """Run the target once: (N, H, W, C) uint8 -> logits and latents."""
    if not len(pixels):
        taps, width = len(guard.manifest.taps), guard.manifest.tap_width
        return Inspected(pixels, np.zeros((0, guard.manifest.classes), np.float32), np.zeros((0, taps, width), np.float32))
    logits, latents = guard.run(pixels)
    return Inspected(pixels, logits, latents.reshape(len(pixels), -1, guard.manifest.tap_width))


def score_inspected(guard: Guard, view: Inspected) -> NDArray[np.float32]:
    """(N,) scores of the guard."""
    flat = view.latents.reshape(len(view.logits), guard.manifest.latent_dim)
    parts = [
        guard.scorer.score(view.logits[i : i + 256], flat[i : i + 256], guard.denoise).scores for i in range(0, len(flat), 256)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def take(view: Inspected, rows: NDArray[np.int64]) -> Inspected:
    """These rows of what was inspected."""
    return Inspected(view.images[rows], view.logits[rows], view.latents[rows])


def split_defender(guard: Guard, clean: Images) -> tuple[Inspected, NDArray[np.int64], NDArray[np.int64]]:
    """Look at the defender's images, and split them as the guard's fit did where it splits them: fit, calibration rows."""
    defender = inspect_images(guard, clean.pixels)
    size = count_split(len(clean), guard.manifest.alpha)
    return defender, *split_rows(defender.predicted, size, np.random.default_rng(guard.manifest.seed), clean.groups)
