"""One variant on one cell: fit, score, measure. What variants share is fitted once."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation.variants import Variant
from benchmarks.latents import CellLatents, Matrix, Seen
from diffense import denoiser
from diffense.chain import Chain, fit_chain, shrink_covariance
from diffense.crossfit import FOLDS, VALIDATION_FOLD
from diffense.fit import FitSettings, spread_sigmas
from diffense.guard import open_denoiser
from diffense.guidance import Guidance, find_margin, fit_guidance, normalise_logits, one_hot, split_mean
from diffense.learning import Innovations, Learned, train_denoiser
from diffense.rule import combine, fit_rule, group_evidence
from diffense.sampling import Denoise, draw_noise, in_float32, lay_ladder, sample
from diffense.scoring import (
    TINY,
    WHOLE,
    Formula,
    allow,
    fit_allowance,
    lay_bands,
    list_evidence,
    list_parts,
    measure_mismatch,
)
from diffense.surprise import Surprise, find_surprise

TRAINING_STEPS: Final = FitSettings().training_steps
CHAIN_SIGMA: Final = FitSettings().chain_sigma
NO_CHAIN_SIGMA: Final = 1e6
UNCHANGED: Final = ("all", True, "shallower", True, False)
LABEL_WEIGHT: Final = 128.0  # images' worth of the shared covariance beside a label's own
BLOCK: Final = 512


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

    def _learn(self, parts: tuple[Any, ...], units: int, sigmas: tuple[Any, ...]) -> Learned:
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
        levels = spread_sigmas(sigmas, clean.latents.shape[1] // self.cell.width)
        return train_denoiser(
            pick(~held_out),
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


class Trial:
    """A variant fitted on a cell.

    Attributes:
        learned: its network, or None.
    """

    def __init__(self, fits: Fits, variant: Variant) -> None:
        self.fits, self.variant = fits, variant
        key = (variant.taps, variant.doubt, variant.chain, variant.divided, variant.by_label)
        self.whole, by_fold = fits.parts(*key)
        clean = fits.view(fits.cell.clean, variant.taps)
        self.width, self.used = fits.cell.width, clean.latents.any(axis=0)
        self.sigmas = spread_sigmas(variant.sigmas, len(self.used) // self.width)
        self.bands, self.names = lay_bands(self.used, self.width, variant.edges)
        self.parts = [p for p in list_parts(self.used, self.width) if variant.parts or p[1] == WHOLE]
        self.learned: Learned | None = None
        self.denoise: Denoise | None = None
        if variant.network:
            self.learned = fits.learn(key, variant.units, variant.sigmas)
            shape = (len(self.sigmas) * variant.draws, len(self.used) // self.width, self.width)
            graph = denoiser.build_denoiser(self.learned.weights, shape, variant.label_guidance)
            self.denoise = in_float32(open_denoiser(graph))
        self.noise = draw_noise(len(self.sigmas), variant.draws, len(self.used), fits.seed) * self.used
        self.fit_statistics(clean, by_fold)

    def fit_statistics(self, clean: Seen, by_fold: list[Part]) -> None:
        """Clean statistics of the evidence; where a network has a part, from the fold that it was not trained on."""
        folds = self.fits.cell.folds
        originals = np.arange(len(folds)) < self.fits.cell.originals
        strange, mismatch, doubt = [], [], []
        for fold, part in enumerate(by_fold):
            seen = take_rows(clean, originals & (folds == fold))
            if self.denoise is None or fold == VALIDATION_FOLD:
                strange.append(self.measure_strangeness(part, seen))
            mismatch.append(self.measure_mismatch(part, seen))
            doubt.append(self.find_doubt(seen))
        reference = np.concatenate(mismatch)
        self.allowance = fit_allowance(reference, np.concatenate(doubt))
        blocks = self.choose_kinds([np.concatenate(strange), self.excuse(reference, np.concatenate(doubt))])
        evidence = list_evidence(self.names, len(self.sigmas), self.parts)
        evidence = [e for e in evidence if e.kind in self.variant.kinds]
        self.rule = replace(fit_rule(blocks, evidence), weights=group_evidence(evidence, self.variant.deep)[1])
        self.moments = [(np.mean(block, axis=0), np.std(block, axis=0)) for block in blocks]

    def choose_kinds(self, blocks: list[Matrix]) -> list[Matrix]:
        """Of strangeness and mismatch what the variant counts."""
        return [b for b, kind in zip(blocks, ("strangeness", "mismatch"), strict=True) if kind in self.variant.kinds]

    def find_doubt(self, seen: Seen) -> Matrix:
        """(N, 1), also where the latents are not guided by it."""
        margin = find_margin(normalise_logits(seen.logits, False, np), one_hot(seen.logits), np)
        return np.asarray(find_surprise(self.fits.parts(*UNCHANGED)[0].guidance.doubt, -margin, np))

    def excuse(self, mismatch: Matrix, doubt: Matrix) -> Matrix:
        """The log mismatch, less what doubt excuses where the variant wants it."""
        return np.asarray(allow(self.allowance, mismatch, doubt, np)) if self.variant.allowance else mismatch

    def measure_mismatch(self, part: Part, seen: Seen) -> Matrix:
        """(N, M) log mismatch."""
        found = measure_mismatch(self.make_formula(part), seen.latents, one_hot(seen.logits), np)
        columns = [p in self.parts for p in list_parts(self.used, self.width)]
        return np.asarray(np.log(found[:, columns] + TINY))

    def make_formula(self, part: Part) -> Formula:
        """The guard's formula, as far as the mismatch reads it."""
        variant = self.variant
        ladder = lay_ladder(self.sigmas, variant.steps)
        return Formula(part.guidance, part.transform, self.bands, self.noise, ladder, variant.draws, self.width, 0.0, False)

    def measure_strangeness(self, part: Part, seen: Seen) -> Matrix:
        """(N, L B) log distances."""
        guide, innovation = part.split(seen)
        if self.denoise is None:
            return np.asarray(np.log(innovation**2 @ self.bands + TINY))
        blocks = [
            self.measure_block(self.denoise, innovation[i : i + BLOCK], guide[i : i + BLOCK])
            for i in range(0, len(innovation), BLOCK)
        ]
        return np.asarray(np.log(np.concatenate(blocks) + TINY))

    def measure_block(self, denoise: Denoise, innovation: Matrix, guide: Matrix) -> Matrix:
        """(N, L B) distances to the samples."""
        variant, levels = self.variant, len(self.sigmas)
        samples = sample(
            denoise,
            innovation,
            guide,
            noise=self.noise,
            ladder=lay_ladder(self.sigmas, variant.steps),
            draws=variant.draws,
            width=self.width,
            data_guidance=variant.data_guidance,
            xp=np,
        ).reshape(len(innovation), levels, variant.draws, -1)
        inspected = innovation[:, None, None]
        if variant.distance == "mean":
            found = (samples.mean(axis=2) - inspected[:, 0]) ** 2 @ self.bands
        else:
            each = (samples - inspected) ** 2 @ self.bands
            found = each.min(axis=2) if variant.distance == "nearest" else each.mean(axis=2)
        return np.asarray(found.reshape(len(innovation), -1))

    def score(self, seen: Seen) -> NDArray[np.float32]:
        """(N,) scores of latents of all taps."""
        seen = self.fits.view(seen, self.variant.taps)
        mismatch = self.excuse(self.measure_mismatch(self.whole, seen), self.find_doubt(seen))
        blocks = self.choose_kinds([self.measure_strangeness(self.whole, seen), mismatch])
        weights = self.rule.groups / self.rule.groups.sum(axis=0) @ self.rule.weights
        if self.variant.rule == "z":
            scaled = [(rows - mean) / (spread + TINY) for rows, (mean, spread) in zip(blocks, self.moments, strict=True)]
            return np.asarray(np.concatenate(scaled, axis=1) @ weights, np.float32)
        evidence = np.concatenate(blocks, axis=1)
        surprises = find_surprise(self.rule.pieces, evidence, np)
        scores = {
            "taps": lambda: combine(self.rule, evidence, np),
            "squares": lambda: np.sqrt(surprises**2 @ weights),
            "pieces": lambda: surprises @ weights,
            "max": lambda: surprises.max(axis=1),
        }
        return np.asarray(scores[self.variant.rule](), np.float32)
