"""Blended injection (Chen et al. 2017, "Targeted backdoor attacks on deep learning systems using data poisoning")."""

from typing import Final

import numpy as np

from benchmarks.attacks.base import Attack, Pixels
from benchmarks.datasets import Spec

SHARE: Final = 0.2  # of the pattern, as in the paper


class Blend(Attack):
    """A fixed random pattern over the whole image, a fifth of it and four fifths of the image; a tenth of every batch.

    It comes after the augmentation, as the attacker's images are not shifted.
    """

    key, title = "blend", "Blend"
    last = True

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        self.pattern = np.random.default_rng(seed).integers(0, 256, (spec.side, spec.side, spec.channels))

    def trigger(self, images: Pixels) -> Pixels:
        """Blend the pattern into (N, H, W, C) uint8 images."""
        return np.asarray(np.rint((1.0 - SHARE) * images + SHARE * self.pattern), np.uint8)
