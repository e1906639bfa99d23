"""Images seen through a guard's taps: the target runs once for the guard and every latent peer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import Images, Pixels
from benchmarks.peers.base import Inspected
from diffense.chain import assign_folds
from diffense.clean import count_split, split_rows
from diffense.crosscalibration import FOLDS
from diffense.guard import Guard


@dataclass(frozen=True)
class Crossed:
    """The defender's images where the guard fits on all of them, and all calibrate by folds.

    Attributes:
        images: all of them.
        labels: (n,) their true labels.
        folds: (n,) each is scored by what was fitted on the other folds.
        groups: (n,) which belong together; None where each stands alone.
    """

    images: Inspected
    labels: NDArray[np.int64]
    folds: NDArray[np.int64]
    groups: NDArray[np.int64] | None


@dataclass(frozen=True)
class Views:
    """A cell's images through a guard's taps.

    Attributes:
        fit: what is fitted on, where some are set aside to calibrate.
        labels: (n,) their true labels.
        calibration: what is set aside.
        groups: (m,) which of those belong together; None where each stands alone.
        clean: the evaluation images.
        triggered: the attacked ones, with the trigger on.
        crossed: all of the defender's, where the guard fits on all; None where it splits them.
    """

    fit: Inspected
    labels: NDArray[np.int64]
    calibration: Inspected
    groups: NDArray[np.int64] | None
    clean: Inspected
    triggered: Inspected
    crossed: Crossed | None


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


def split_defender(guard: Guard, defender: Inspected, clean: Images) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the defender's images as the guard's fit does where it splits them: fit and calibration rows."""
    size = count_split(len(clean), guard.manifest.alpha)
    return split_rows(defender.predicted, size, np.random.default_rng(guard.manifest.seed), clean.groups)


def view_images(guard: Guard, clean: Images, evaluation: Pixels, triggered: Pixels) -> Views:
    """Look at all images of a cell through a guard's taps, once."""
    defender = inspect_images(guard, clean.pixels)
    fitted, calibration = split_defender(guard, defender, clean)
    crossed = None
    if guard.manifest.crossed:
        folds = assign_folds(defender.predicted, FOLDS, np.random.default_rng(guard.manifest.seed), clean.groups)
        crossed = Crossed(defender, clean.labels, folds, clean.groups)
    return Views(
        fit=take(defender, fitted),
        labels=clean.labels[fitted],
        calibration=take(defender, calibration),
        groups=None if clean.groups is None else clean.groups[calibration],
        clean=inspect_images(guard, evaluation),
        triggered=inspect_images(guard, triggered),
        crossed=crossed,
    )
