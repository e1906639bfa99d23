"""Clean images, split and seen through the target's taps: what a guard is fitted on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffense.calibration import needed_images
from diffense.clean import (
    FEW_COPIES,
    FEW_IMAGES,
    FEWEST_FIT_IMAGES,
    CleanSet,
    collect_clean,
    count_calibration,
    decide_guide,
    find_finite,
    split_rows,
)
from diffense.errors import ImageError
from diffense.guidance import Kind
from diffense.images import Preprocessing
from diffense.latent import GRID, Whitening
from diffense.tapping import open_pooling, whiten
from diffense.taps import Tap
from diffense.target import Target


@dataclass(frozen=True)
class Prepared:
    """Clean images, split and seen through the target's taps; what the scorer is fitted on.

    Attributes:
        labels: (N,) predicted labels of all clean images.
        fit_rows, calibration_rows: row numbers, disjoint, or both all of them.
        clean: logits and pooled features of the rows to fit on, and of their copies.
        whitenings: of each tap.
        latents: (n, K d) of the clean set.
        kind: what guides the latents.
        generator: the seed's random numbers, as far as they are used up.
    """

    labels: NDArray[np.int64]
    fit_rows: NDArray[np.int64]
    calibration_rows: NDArray[np.int64]
    clean: CleanSet
    whitenings: list[Whitening]
    latents: NDArray[np.float64]
    kind: Kind
    generator: np.random.Generator

    @property
    def crossed(self) -> bool:
        """Whether the same images are fitted on and calibrate."""
        return np.array_equal(self.fit_rows, self.calibration_rows)


def prepare_clean(
    target: Target,
    images: NDArray[np.uint8],
    taps: Sequence[Tap],
    preprocessing: Preprocessing,
    alpha: float,
    guide: Literal["auto", "label", "logits"],
    seed: int,
    notify: Callable[[str], None],
    grid: int = GRID,
    groups: NDArray[np.int64] | None = None,
) -> Prepared:
    """Run the target on the clean images, split them, add copies, whiten the taps.

    Args:
        target: the classifier.
        images: (N, H, W, C) uint8 clean images.
        taps: to read, shallow to deep.
        preprocessing: how pixels become the target's input.
        alpha: false-alarm rate, which decides how many images calibrate.
        guide: what guides the latents.
        seed: of split and copies.
        notify: told, in one line each, what the user should know.
        grid: parts of a map each way whose means are read.
        groups: (N,) which images belong together; None where each stands alone.

    Raises:
        TooFewImagesError: too few clean images or groups for alpha, or too few images for a class.
        OptionError: alpha is not between 0 and 1.
        ImageError: the target overflows on an image.
    """
    group_count = None if groups is None else len(np.unique(groups))
    calibration_size = count_calibration(len(images), alpha, group_count)
    generator = np.random.default_rng(seed)
    run = open_pooling(target, taps, preprocessing, grid)
    logits, pooled = run(images)
    broken = np.flatnonzero(~find_finite([logits, *pooled]))
    if len(broken) == len(images):
        raise ImageError("the target gives no numbers on any clean image; check its file, and --scale, --mean and --std")
    if len(broken):
        raise ImageError(f"image {broken[0]} makes the target's features overflow; check --scale, --mean and --std")
    if all((features == features[0]).all() for features in pooled):
        raise ImageError("the target's features are the same on all clean images; check its file, --scale, --mean and --std")
    labels = logits.argmax(axis=1)
    if calibration_size == len(images):
        fit_rows = calibration_rows = np.arange(len(images))
    else:
        fit_rows, calibration_rows = split_rows(labels, calibration_size, generator, groups)
        # Groups differ in size: those that calibrate may be too few for alpha, or leave too little to fit on.
        reached = groups is None or len(np.unique(groups[calibration_rows])) >= needed_images(alpha)
        if not reached or len(fit_rows) < FEWEST_FIT_IMAGES:
            fit_rows = calibration_rows = np.arange(len(images))
    kind = decide_guide(labels[fit_rows], target.classes, guide, notify)
    fitted = images[fit_rows], logits[fit_rows], [p[fit_rows] for p in pooled]
    copies = FEW_COPIES if len(images) < FEW_IMAGES else 1
    clean = collect_clean(*fitted, run, generator, copies, None if groups is None else groups[fit_rows])
    whitenings, latents = whiten(clean, kind, target.probabilities)
    return Prepared(labels, fit_rows, calibration_rows, clean, whitenings, latents, kind, generator)
