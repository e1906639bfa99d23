"""Posterior of the predicted label, per tap."""

import numpy as np

from benchmarks.peers.base import Matrix
from benchmarks.peers.discriminant import Discriminants
from benchmarks.peers.latent import Family, LatentPeer
from diffense.scoring import TINY, Evidence


class Posterior(Family[Discriminants]):
    """``log(-log p(predicted label | tap))`` by one linear discriminant a tap."""

    def learn(self, latents: Matrix, logits: Matrix, width: int, like: Discriminants | None) -> Discriminants:
        """One discriminant a tap."""
        return Discriminants(latents, logits, width)

    def measure(self, state: Discriminants, latents: Matrix, logits: Matrix) -> Matrix:
        """(N, K)."""
        return np.asarray(np.log(state.surprise(latents, logits.argmax(axis=1)) + TINY))

    def name_evidence(self, state: Discriminants) -> list[Evidence]:
        """One a tap."""
        return [Evidence("posterior", tap, -1, -1) for tap in range(len(state.offsets))]


def make() -> LatentPeer:
    """Mismatch by discriminants, Diffense's rule."""
    return LatentPeer("lda", "LDA posterior", Posterior())
