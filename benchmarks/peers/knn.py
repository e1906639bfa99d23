"""Distance to the k-th nearest clean latent."""

from typing import Final

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, split
from benchmarks.peers.gaussian import join_taps

NEIGHBOURS: Final = 50  # the paper's, for a bank of 50,000


class Knn:
    """Sun et al., ICML 2022, "Out-of-distribution detection with deep nearest neighbors".

    Distance of the L2-normalised latent (all taps in one vector) to its k-th nearest in the clean bank; k = 50 as in the
    paper, but never more than half a class's share of a small bank, beyond which the k-th neighbour is of another class.
    """

    name, title, cheap = "knn", "KNN", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Keep the normalised clean latents."""
        self.bank = normalise(join_taps(clean))
        self.k = min(NEIGHBOURS, max(1, len(self.bank) // (2 * model.classes)))

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        latents = normalise(join_taps(inspected))
        found = np.empty(len(latents))
        for part in split(len(latents), 1024):
            cosine = latents[part] @ self.bank.T
            found[part] = np.partition(cosine, len(self.bank) - self.k, axis=1)[:, len(self.bank) - self.k]
        return np.asarray(np.sqrt(np.maximum(2.0 - 2.0 * found, 0.0)))


def normalise(rows: Matrix) -> Matrix:
    """Rows of length one."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
