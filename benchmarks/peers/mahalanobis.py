"""Mahalanobis distance to the predicted class."""

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model
from benchmarks.peers.gaussian import ClassGaussians, join_taps


class Mahalanobis:
    """Lee et al., NeurIPS 2018, "A simple unified framework for detecting out-of-distribution samples and adversarial attacks".

    ``(z - mu_c)' S^-1 (z - mu_c)`` with the predicted class c (a guard knows it; the paper takes the nearest class) and one
    shared, Ledoit-Wolf shrunk S, over the guard's latents of all taps in one vector.
    """

    name, title, cheap = "mahalanobis", "Mahalanobis", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Class means and covariance; predicted labels, so none are needed."""
        self.gaussians = ClassGaussians(join_taps(clean), clean.logits.astype(np.float64))

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        return self.gaussians.measure(join_taps(inspected), inspected.logits.astype(np.float64))
