"""Gaussians of the guard's latents, shared by the peers that measure distances on them."""

import numpy as np

from benchmarks.peers.base import Inspected, Matrix
from diffense.chain import shrink_covariance
from diffense.guidance import average_by_label, one_hot


def join_taps(inspected: Inspected) -> Matrix:
    """Latents of all taps in one row, (N, K, d) -> (N, K d)."""
    return inspected.latents.reshape(len(inspected.latents), -1).astype(np.float64)


class ClassGaussians:
    """A mean for each predicted class (that of all where it has no clean images), one Ledoit-Wolf shrunk covariance.

    Attributes:
        used: (W,) entries that move on clean images.
        means: (C, W).
        covariance: S, (w, w), of the used entries.
        root: (w, w) with ``root root' = S^-1``.
    """

    def __init__(self, latents: Matrix, logits: Matrix) -> None:
        """Fit on (n, W) clean latents and (n, C) logits."""
        self.used = latents.any(axis=0)
        self.means = average_by_label(latents, one_hot(logits), latents.mean(axis=0))
        residual = latents - self.means[logits.argmax(axis=1)]
        self.covariance = shrink_covariance(residual[:, self.used])
        self.root = invert_root(self.covariance)

    def measure(self, latents: Matrix, logits: Matrix) -> Matrix:
        """Squared Mahalanobis distance to the predicted class, (N, W) -> (N,)."""
        residual = latents - one_hot(logits) @ self.means
        return np.asarray(np.sum((residual[:, self.used] @ self.root) ** 2, axis=1))


def invert_root(covariance: Matrix) -> Matrix:
    """(p, p) covariance S -> R with ``R R' = S^-1``."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors / np.sqrt(np.maximum(values, 1e-9 * values.max(initial=1e-30))))
