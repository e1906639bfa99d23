"""STRIP: predictions that do not waver when other images are laid over the input."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from benchmarks.peers.base import Inspected, Labels, Matrix, Model

OVERLAYS: Final = 64
SEED: Final = 0


class Strip:
    """Gao et al., ACSAC 2019, "STRIP: a defence against trojan attacks on deep neural networks".

    ``H(x) = 1/N sum_n -sum_c p_c log2 p_c`` with ``p = softmax(f(clip(x + c_n, 0, 255)))`` over N clean images ``c_n``; a
    trigger keeps its hold on the mixture, so LOW entropy is suspicious and the score is ``-H``.

    The paper's saturating sum, not the half-and-half blend of later toolboxes: it leaves a bright trigger at full contrast.
    N = 64 as those toolboxes take (the paper: 10 to 100). Every input meets the same
    clean images, or its score would depend on chance.
    """

    name, title, cheap = "strip", "STRIP", False

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Keep N clean images, (N, H, W, channels)."""
        generator = np.random.default_rng(SEED)
        few = len(clean.images) < OVERLAYS
        self.overlays = clean.images[generator.choice(len(clean.images), OVERLAYS, replace=few)]

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """64 forward passes an image."""
        total = np.zeros(len(inspected.images))
        for overlay in self.overlays:
            total += entropy(model.predict(superimpose(inspected.images, overlay)))
        return -total / len(self.overlays)


def superimpose(images: NDArray[np.uint8], overlay: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Saturating sum of (N, H, W, channels) and (H, W, channels)."""
    return np.minimum(images.astype(np.uint16) + overlay, 255).astype(np.uint8)


def entropy(logits: NDArray[np.float32]) -> Matrix:
    """Shannon entropy of the softmax in bits, (N, C) -> (N,)."""
    logs = log_softmax(logits.astype(np.float64), axis=1)
    return np.asarray(-np.sum(np.exp(logs) * logs, axis=1) / np.log(2.0))
