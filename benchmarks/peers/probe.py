"""Internal probes: layers that would have given another label."""

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model
from benchmarks.peers.discriminant import Discriminants
from benchmarks.peers.gaussian import join_taps


class Probe:
    """Linear probes (Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes") as a detector.

    One discriminant a tap, trained on predicted labels; score ``mean_k -log p(predicted label | tap k)``. No clean statistics
    enter: it is what a probe per layer gives without Diffense's rule of combination (that is the peer `lda`).
    """

    name, title, cheap = "probe", "Internal probes", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """One discriminant a tap."""
        self.discriminants = Discriminants(join_taps(clean), clean.logits.astype(np.float64), clean.latents.shape[2])

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        return np.asarray(self.discriminants.surprise(join_taps(inspected), inspected.predicted).mean(axis=1))
