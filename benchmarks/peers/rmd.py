"""Relative Mahalanobis distance."""

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model
from benchmarks.peers.gaussian import ClassGaussians, invert_root, join_taps
from diffense.chain import shrink_covariance


class Rmd:
    """Ren et al., 2021, "A simple fix to Mahalanobis distance for improving near-OOD detection" (arXiv 2106.09022).

    ``(z - mu_c)' S^-1 (z - mu_c) - (z - mu)' S_0^-1 (z - mu)``: the distance to the predicted class less the distance to one
    Gaussian of all clean latents.
    """

    name, title, cheap = "rmd", "RMD", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Class Gaussians and the one of all."""
        latents = join_taps(clean)
        self.gaussians = ClassGaussians(latents, clean.logits.astype(np.float64))
        self.mean = latents.mean(axis=0)
        self.root = invert_root(shrink_covariance((latents - self.mean)[:, self.gaussians.used]))

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        latents = join_taps(inspected)
        own = self.gaussians.measure(latents, inspected.logits.astype(np.float64))
        return np.asarray(own - np.sum(((latents - self.mean)[:, self.gaussians.used] @ self.root) ** 2, axis=1))
