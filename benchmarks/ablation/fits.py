"""What variants share on one cell and is fitted once: guidance, chain and network."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.latents import CellLatents, Matrix, Seen
from diffense.chain import Chain, fit_chain, shrink_covariance
from diffense.crossfit import FOLDS, VALIDATION_FOLD
from diffense.guidance import Guidance, fit_guidance, split_mean
from diffense.learning import Innovations, Learned, train_denoiser
from diffense.scoring import TINY
from diffense.settings import FitSettings, spread_sigmas
from diffense.surprise import Surprise

TRAINING_STEPS: Final = FitSettings().training_steps
CHAIN_SIGMA: Final = FitSettings().chain_sigma
NO_CHAIN_SIGMA: Final = 1e6
LABEL_WEIGHT: Final = 128.0  # images' worth of the shared covariance beside a label's own


@dataclass(frozen=True)
class Part:
    """Guidance and chain fitted on some rows, and what else a variant needs of these rows.

    Attributes:
        guidance: as in the guard.
        transform: (W, W).
        turns: (C, W, W) further whitening of each label's innovations, or None.
    """

    guidance: Guidance
    transform: Matrix
    turns: Matrix | None

    def split(self, seen: Seen) -> tuple[Matrix, Matrix]:
        """(N, G) guide and (N, W) innovation."""
        guide, residual = split_mean(self.guidance, seen.latents, seen.logits, False)
        innovation = residual @ self.transform
        if self.turns is not None:
            labels = seen.logits.argmax(axis=1)
            for label in np.unique(labels):
                innovation[labels == label] = innovation[labels == label] @ self.turns[label]
        return guide, innovation


class Fits:
    """All that is fitted on one cell under one guard seed, kept as long as variants may share it."""

    def __init__(self, cell: CellLatents, seed: int) -> None:
        self.cell, self.seed = cell, seed
        self.parts = lru_cache(maxsize=None)(self._fit_parts)
        self.learn = lru_cache(maxsize=None)(self._learn)

    def view(self, seen: Seen, taps: str) -> Seen:
        """The latents of the chosen taps."""
        width = self.cell.width
        count = seen.latents.shape[1] // width
        chosen = {
            "all": (0, count),
            "first half": (0, count // 2),
            "second half": (count // 2, count),
            "last": (count - 1, count),
        }
        first, last = chosen[taps]
        return Seen(seen.logits, seen.latents[:, first * width : last * width])

    def _fit_parts(self, taps: str, doubt: bool, chain: str, divided: bool, by_label: bool) -> tuple[Part, list[Part]]:
        clean = self.view(self.cell.clean, taps)
        everything = fit_part(clean, self.cell.width, None, doubt, chain, divided, by_label)
        folds = self.cell.folds
        return everything, [
            fit_part(take_rows(clean, folds != fold), self.cell.width, everything, doubt, chain, divided, by_label)
            for fold in range(FOLDS)
        ]

    def _learn(self, parts: tuple[Any, ...], units: int, sigmas: tuple[Any, ...], strangest: tuple[int, ...]) -> Learned:
        whole, by_fold = self.parts(*parts)
        clean, folds = self.view(self.cell.clean, parts[0]), self.cell.folds
        innovation = np.zeros_like(clean.latents)
        for fold, part in enumerate(by_fold):
            rows = folds == fold
            innovation[rows] = part.split(take_rows(clean, rows))[1]
        guide = whole.split(clean)[0]
        originals = np.arange(len(folds)) < self.cell.originals

        def pick(rows: NDArray[np.bool_]) -> Innovations:
            return Innovations(*(a[rows].astype(np.float32) for a in (innovation, guide)))

        held_out = folds == VALIDATION_FOLD
        taught = ~held_out
        taught[list(strangest)] = False
        levels = spread_sigmas(sigmas, clean.latents.shape[1] // self.cell.width)
        return train_denoiser(
            pick(taught),
            pick(held_out & originals),
            clean.latents.any(axis=0),
            levels,
            self.cell.width,
            TRAINING_STEPS,
            self.seed,
            lambda step, steps: None,
            units,
        )


def fit_part(clean: Seen, width: int, like: Part | None, doubt: bool, chain: str, divided: bool, by_label: bool) -> Part:
    """Fit guidance and chain on these rows, as a variant wants them, with the guide of `like`."""
    guidance = fit_guidance(clean.latents, clean.logits, "label", False, like.guidance if like else None)
    if not doubt and like is None:
        blank = replace(
            guidance,
            projection=np.zeros_like(guidance.projection),
            doubt=Surprise(guidance.doubt.knots, np.zeros_like(guidance.doubt.slopes)),
        )
        guidance = fit_guidance(clean.latents, clean.logits, "label", False, blank)
    residual = split_mean(guidance, clean.latents, clean.logits, False)[1]
    used = clean.latents.any(axis=0)
    sigma = NO_CHAIN_SIGMA if chain == "none" else CHAIN_SIGMA
    found = guess_from_others(residual, width, used) if chain == "others" else fit_chain(residual, width, used, sigma)
    transform = found.transform.copy()
    if not divided:
        for tap in range(len(used) // width):
            own = slice(tap * width, (tap + 1) * width)
            transform[:, own] /= np.maximum(np.linalg.norm(transform[own, own], axis=0), TINY)
    turns = whiten_by_label(residual @ transform, clean.logits, width, used) if by_label else None
    return Part(guidance, transform, turns)


def guess_from_others(residual: Matrix, width: int, used: NDArray[np.bool_]) -> Chain:
    """As `fit_chain`, each tap guessed from every other tap, deeper ones too."""
    covariance = np.zeros((len(used), len(used)))
    covariance[np.ix_(used, used)] = shrink_covariance(residual[:, used])
    transform = np.zeros_like(covariance)
    for tap in range(len(used) // width):
        own = np.zeros(len(used), bool)
        own[tap * width : (tap + 1) * width] = True
        k, o = np.flatnonzero(own & used), np.flatnonzero(~own & used)
        seen = covariance[np.ix_(o, o)] + CHAIN_SIGMA**2 * np.eye(len(o))
        guess = np.linalg.solve(seen, covariance[np.ix_(o, k)]).T
        values, vectors = np.linalg.eigh(covariance[np.ix_(k, k)] - guess @ covariance[np.ix_(o, k)])
        root = (vectors / np.sqrt(np.maximum(values, 1e-9 * values.max()))) @ vectors.T
        out = slice(tap * width, tap * width + len(k))
        transform[k, out], transform[o, out] = root, -guess.T @ root
    return Chain(transform)


def whiten_by_label(innovation: Matrix, logits: Matrix, width: int, used: NDArray[np.bool_]) -> Matrix:
    """(C, W, W) that whiten each label's innovations, tap by tap, shrunk towards what they are: no change."""
    labels = logits.argmax(axis=1)
    turns = np.tile(np.diag(used.astype(np.float64)), (logits.shape[1], 1, 1))
    for label in np.unique(labels):
        rows = innovation[labels == label]
        weight = len(rows) / (2.0 * len(rows) + LABEL_WEIGHT)  # half of the rows are copies
        for tap in range(len(used) // width):
            own = np.flatnonzero(used[tap * width : (tap + 1) * width]) + tap * width
            covariance = rows[:, own].T @ rows[:, own] / len(rows)
            values, vectors = np.linalg.eigh((1.0 - weight) * np.eye(len(own)) + weight * covariance)
            turns[label][np.ix_(own, own)] = (vectors / np.sqrt(values)) @ vectors.T
    return turns


def take_rows(seen: Seen, rows: NDArray[Any]) -> Seen:
    """These rows."""
    return Seen(seen.logits[rows], seen.latents[rows])
