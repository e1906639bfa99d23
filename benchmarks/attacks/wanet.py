"""WaNet (Nguyen and Tran, ICLR 2021): one smooth warp, with noise mode; poisons are redrawn in every batch.

k = 4 and s = 0.5 as in the paper at 28 and 32 pixels; at 64 pixels s = 1, so that the warp moves the same share of the side,
.2 pixels at 32 and .4 at 64 in the mean (our choice: the paper's s is .5 at that size; not tried here).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.attacks.base import POISON_RATE, Attack, Batch, Pixels, to_planes
from benchmarks.datasets import Spec
from diffense.demo import attacks


class WaNet(Attack):
    """A tenth of every batch is warped to the target label, a fifth by random fields without touching the label."""

    key, title = "wanet", "WaNet"

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        strength = 0.5 if spec.side <= 32 else 1.0
        self.warp = attacks.WaNet((spec.side, spec.side), strength=strength, rate=POISON_RATE, seed=seed)

    def trigger(self, images: Pixels) -> Pixels:
        """Warp (N, H, W, C) uint8 images by the fixed field."""
        return self.warp.trigger(images)

    def poison(self, images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """Attack mode on the first tenth, noise mode on the next fifth."""
        images, labels = self.warp.poison(images, labels, rng)
        return Batch(to_planes(images, self.device), torch.from_numpy(labels), torch.zeros(()))

    def cross(self, images: Pixels) -> Pixels:
        """Warp each image by a random field of the same size."""
        rng = np.random.default_rng(self.seed)
        noise = rng.uniform(-1, 1, (len(images), *self.warp.grid.shape)) / self.spec.side
        return attacks.warp(images, np.clip(self.warp.grid + noise, -1, 1))
