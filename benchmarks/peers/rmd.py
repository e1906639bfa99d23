"""Relative Mahalanobis distance."""

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model
from benchmarks.peers.gaussian import ClassGaussians, invert_root, join_taps


class Rmd:
    """Ren et al., 2021, "A simple fix to Mahalanobis distance for improving near-OOD detection" (arXiv 2106.09022).

    ``(z - mu_c)' S^-1 (z - mu_c) - (z - mu)' S_0^-1 (z - mu)``: the distance to the predicted class less the distance to one
    Gaussian of all clean latents. S_0 is S and the scatter of the class means, as in the unshrunk sample: each shrunk by an
    intensity of its own, S_0 would be the smaller one in directions of little variance, and far-off inputs the most normal.
    """

    name, title, cheap = "rmd", "RMD", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Class Gaussians and the one of all."""
        latents = join_taps(clean)
        self.gaussians = ClassGaussians(latents, clean.logits.astype(np.float64))
        self.mean = latents.mean(axis=0)
        means = self.gaussians.means[clean.logits.argmax(axis=1)] - self.mean
        between = means.T @ means / len(means)
        used = np.ix_(self.gaussians.used, self.gaussians.used)
        self.root = invert_root(self.gaussians.covariance + between[used])

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        latents = join_taps(inspected)
        own = self.gaussians.measure(latents, inspected.logits.astype(np.float64))
        return np.asarray(own - np.sum(((latents - self.mean)[:, self.gaussians.used] @ self.root) ** 2, axis=1))
