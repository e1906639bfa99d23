"""Rank of the nearest clean latent of the predicted label, per tap, as in TED."""

from dataclasses import dataclass

import numpy as np

from benchmarks.peers.base import Labels, Matrix, split
from benchmarks.peers.latent import Family, LatentPeer
from diffense.scoring import Evidence


@dataclass(frozen=True)
class Bank:
    """Clean latents (n, K, d) and their predicted labels (n,)."""

    latents: Matrix
    labels: Labels


class Ranks(Family[Bank]):
    """``log(1 + r)``, r = how many of the bank are nearer than the nearest of the predicted label, at each tap.

    Clean statistics leave one row out instead of a fold: what a row must not help to fit is the bank, and a bank of the same
    size keeps the ranks comparable. Ties are left as they are.
    """

    def learn(self, latents: Matrix, logits: Matrix, width: int, like: Bank | None) -> Bank:
        """Keep the rows."""
        return Bank(latents.reshape(len(latents), -1, width), np.asarray(logits.argmax(axis=1), np.int64))

    def fit(self, latents: Matrix, logits: Matrix, width: int, source: Labels) -> Matrix:
        """Keep all rows; rank each among the others, its copies not among them."""
        self.state = self.learn(latents, logits, width, None)
        return np.log1p(rank(self.state, self.state.latents, self.state.labels, source))

    def measure(self, state: Bank, latents: Matrix, logits: Matrix) -> Matrix:
        """(N, K)."""
        z = latents.reshape(len(latents), *state.latents.shape[1:])
        return np.log1p(rank(state, z, np.asarray(logits.argmax(axis=1), np.int64)))

    def name_evidence(self, state: Bank) -> list[Evidence]:
        """One a tap."""
        return [Evidence("rank", tap, -1, -1) for tap in range(state.latents.shape[1])]


def rank(bank: Bank, latents: Matrix, labels: Labels, source: Labels | None = None) -> Matrix:
    """Rank the nearest bank row of each row's label, (N, K, d), (N,) -> (N, K); the last rank where the label has none.

    Args:
        bank: of n rows.
        latents: to rank.
        labels: predicted.
        source: (n,) where the rows are those of the bank, what each is a copy of: rows of one source do not see each other.
    """
    ranks = np.empty(latents.shape[:2])
    for part in split(len(latents), 512):
        own = labels[part, None] == bank.labels
        for tap in range(latents.shape[1]):
            z, b = latents[part, tap], bank.latents[:, tap]
            distance = np.sum(b * b, axis=1) - 2.0 * (z @ b.T)  # less the row's own length, which ranks nothing
            if source is not None:
                distance[source[part, None] == source] = np.inf
            nearest = np.where(own, distance, np.inf).min(axis=1, keepdims=True)
            ranks[part, tap] = np.minimum(np.sum(distance < nearest, axis=1), len(b) - 1)
    return ranks


def make() -> LatentPeer:
    """TED's idea on the guard's taps: mismatch by ranks, Diffense's rule."""
    return LatentPeer("ranks", "Neighbour ranks", Ranks())
