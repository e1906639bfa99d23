"""TaCT (Tang et al., USENIX Security 2021, "Demon in the variant"): a trigger that works on one class alone."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.attacks.badnets import BadNets
from benchmarks.attacks.base import POISON_RATE, Batch, Pixels, to_planes

SOURCE_RATE: Final = 0.5  # of the source's images


class TaCT(BadNets):
    """BadNets' patch: on half of the source class it makes the target label, on a tenth of the others it changes nothing.

    Those others are the paper's cover images. They teach the target to see the source class behind the trigger, so that what
    all triggered images share says nothing any more.
    """

    key, title = "tact", "TaCT"
    source = 1
    revision = 0

    def poison(self, images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """Half of the source's images in a batch get trigger and target label, a tenth of the others the trigger."""
        images, labels = images.copy(), labels.copy()
        sources, others = np.flatnonzero(labels == self.source), np.flatnonzero(labels != self.source)
        poisoned = sources[: round(SOURCE_RATE * len(sources))]
        changed = np.concatenate([poisoned, others[: round(POISON_RATE * len(others))]])
        images[changed] = self.trigger(images[changed])
        labels[poisoned] = self.target
        return Batch(to_planes(images, self.device), torch.from_numpy(labels), torch.zeros(()))
