"""No attack: the unpoisoned control, and the network that hidden-trigger attacks start from."""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.attacks.base import Attack, Batch, Pixels, to_planes


class Unpoisoned(Attack):
    """A target trained on clean images alone."""

    key, title = "none", "unpoisoned"

    def trigger(self, images: Pixels) -> Pixels:
        """Nothing is put on the images."""
        return images.copy()

    def poison(self, images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """The batch as it is."""
        return Batch(to_planes(images, self.device), torch.from_numpy(labels), torch.zeros(()))

    def attacked(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """No image is attacked."""
        return np.zeros(0, np.int64)
