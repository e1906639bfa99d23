"""The latent peers: distances, ratios, posteriors and ranks on the guard's own taps, bands and rule of combination.

"Diffense without a network": log evidence, cross-fitted clean statistics, the guard's rule.
n clean rows, W = K d latent entries, E pieces of evidence.
"""

from abc import ABC, abstractmethod
from typing import Any, Final, Generic, TypeVar

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model
from benchmarks.peers.gaussian import join_taps
from diffense.chain import assign_folds
from diffense.crossfit import FOLDS
from diffense.guidance import MARGIN_RESOLUTION, find_margin, normalise_logits, one_hot
from diffense.rule import combine, fit_rule
from diffense.scoring import Evidence, allow, fit_allowance
from diffense.surprise import find_surprise, fit_surprise

SEED: Final = 0
State = TypeVar("State")


class Family(ABC, Generic[State]):
    """One kind of evidence; a state is what it learned from some clean rows."""

    @abstractmethod
    def learn(self, latents: Matrix, logits: Matrix, width: int, like: State | None) -> State:
        """Learn from (n, W) latents and (n, C) logits; in the coordinates of `like`, so that folds can be compared."""

    @abstractmethod
    def measure(self, state: State, latents: Matrix, logits: Matrix) -> Matrix:
        """(N, E) log distances, higher = more suspicious."""

    @abstractmethod
    def name_evidence(self, state: State) -> list[Evidence]:
        """The E columns."""

    def fit(self, latents: Matrix, logits: Matrix, width: int, source: Labels) -> Matrix:
        """Learn from all rows; give evidence of each row by what was learned without it and without its copies, (n, E)."""
        self.state = self.learn(latents, logits, width, None)
        reference = np.empty((len(latents), len(self.name_evidence(self.state))))
        originals = logits[: source.max() + 1]
        folds = assign_folds(originals.argmax(axis=1), FOLDS, np.random.default_rng(SEED))[source]
        for fold in np.unique(folds):
            held = folds == fold
            part = self.learn(latents[~held], logits[~held], width, self.state)
            reference[held] = self.measure(part, latents[held], logits[held])
        return reference


class LatentPeer:
    """Families of evidence, combined as Diffense combines its own; all kinds count alike.

    With `allowing`, the target's doubt excuses some of all but the strangeness, as it does of Diffense's mismatch.
    """

    cheap = True

    def __init__(self, name: str, title: str, *families: Family[Any], allowing: bool = False) -> None:
        self.name, self.title, self.families, self.allowing = name, title, families, allowing

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Learn each family and the clean statistics of its evidence; predicted labels only."""
        latents, logits = join_taps(clean), clean.logits.astype(np.float64)
        source = np.arange(len(latents)) if clean.source is None else clean.source
        width = clean.latents.shape[2]
        reference = np.concatenate([family.fit(latents, logits, width, source) for family in self.families], axis=1)
        evidence = [e for family in self.families for e in family.name_evidence(family.state)]
        self.excused = np.array([self.allowing and e.kind != "strangeness" for e in evidence])
        self.doubt = fit_surprise(-find_margins(logits), MARGIN_RESOLUTION)
        self.allowance = fit_allowance(reference[:, self.excused], self.find_doubt(logits))
        self.rule = fit_rule([self.excuse(reference, logits)], evidence)

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        latents, logits = join_taps(inspected), inspected.logits.astype(np.float64)
        evidence = np.concatenate([family.measure(family.state, latents, logits) for family in self.families], axis=1)
        return np.asarray(combine(self.rule, self.excuse(evidence, logits), np))

    def find_doubt(self, logits: Matrix) -> Matrix:
        """(N, C) -> (N, 1), as `guidance.guide_by` has it."""
        return np.asarray(find_surprise(self.doubt, -find_margins(logits), np))

    def excuse(self, evidence: Matrix, logits: Matrix) -> Matrix:
        """(N, E) log evidence less what doubt excuses."""
        result = evidence.copy()
        result[:, self.excused] = allow(self.allowance, evidence[:, self.excused], self.find_doubt(logits), np)
        return result


def find_margins(logits: Matrix) -> Matrix:
    """(N, C) -> (N, 1)."""
    return np.asarray(find_margin(normalise_logits(logits, False, np), one_hot(logits), np))
