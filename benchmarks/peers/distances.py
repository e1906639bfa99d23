"""Distances of the guard's latents to class means, in Diffense's own formula with nothing guided by shallower taps."""

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.peers.base import Matrix
from benchmarks.peers.latent import Family
from diffense.chain import fit_chain
from diffense.guidance import fit_guidance, one_hot, split_mean
from diffense.scoring import Evidence, Formula, lay_bands, list_evidence, list_parts, measure


@dataclass(frozen=True)
class Distances:
    """What was learned.

    Attributes:
        formula: class means as guidance; the transform whitens each tap within classes and links no taps.
        names: (tap, band) of each band.
    """

    formula: Formula
    names: list[tuple[int, int]]


class DistanceFamily(Family[Distances]):
    """``kind`` is "strangeness": mean squared distance to the predicted class's mean per tap and band of whitened
    within-class directions; or "mismatch": that distance over the one to the nearest other class, of a tap
    and of its parts.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def learn(self, latents: Matrix, logits: Matrix, width: int, like: Distances | None) -> Distances:
        """Class means, weighed as the guard weighs them, and the whitening of each tap alone: a chain of one tap."""
        guidance = fit_guidance(latents, logits, "label", probabilities=False)
        rest = np.zeros((len(guidance.slope) - len(guidance.means), latents.shape[1]))
        guidance = replace(guidance, slope=np.concatenate([guidance.means, rest]))  # the label alone, not the doubt
        residual = split_mean(guidance, latents, logits, probabilities=False)[1]
        size = latents.shape[1]
        used = like.formula.bands.any(axis=1) if like else latents.any(axis=0)
        bands, names = lay_bands(used, width)
        transform = np.zeros((size, size))
        for tap in range(size // width):
            block = slice(tap * width, (tap + 1) * width)
            if used[block].any():
                transform[block, block] = fit_chain(residual[:, block], width, used[block], 1.0).transform
        none, taps = np.zeros((1, size)), size // width
        formula = Formula(guidance, transform, bands, none, np.ones((2, 1, taps)), 1, width, 0.0, probabilities=False)
        return Distances(formula, names)

    def measure(self, state: Distances, latents: Matrix, logits: Matrix) -> Matrix:
        """(N, B) of the bands or (N, M) of the taps' parts."""
        found = np.asarray(measure(state.formula, logits, latents, one_hot(logits), None, np))
        bands = len(state.names)
        return found[:, :bands] if self.kind == "strangeness" else found[:, bands:]

    def name_evidence(self, state: Distances) -> list[Evidence]:
        """The columns of `measure`."""
        parts = list_parts(state.formula.bands.any(axis=1), state.formula.width)
        return [evidence for evidence in list_evidence(state.names, 1, parts) if evidence.kind == self.kind]
