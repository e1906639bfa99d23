"""One variant on one cell: fit, score, measure."""

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation.fits import Fits, Part, take_rows
from benchmarks.ablation.variants import DEFAULTS, Variant
from benchmarks.latents import Matrix, Seen
from diffense import denoiser
from diffense.crossfit import VALIDATION_FOLD
from diffense.guard import open_denoiser
from diffense.guidance import find_margin, normalise_logits, one_hot
from diffense.learning import Learned
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
from diffense.settings import spread_sigmas
from diffense.surprise import find_surprise

UNCHANGED: Final = ("all", True, "shallower", True, False)
BLOCK: Final = 512


class Trial:
    """A variant fitted on a cell.

    Attributes:
        learned: its network, or None.
    """

    def __init__(self, fits: Fits, variant: Variant) -> None:
        self.fits, self.variant = fits, variant
        key = (variant.taps, variant.doubt, variant.chain, variant.divided, variant.by_label)
        self.whole, self.by_fold = fits.parts(*key)
        clean = fits.view(fits.cell.clean, variant.taps)
        self.width, self.used = fits.cell.width, clean.latents.any(axis=0)
        levels = variant.lay_levels(len(self.used) // self.width)
        self.sigmas = spread_sigmas(levels, len(self.used) // self.width)
        self.bands, self.names = lay_bands(self.used, self.width, variant.edges)
        self.parts = [p for p in list_parts(self.used, self.width) if variant.parts or p[1] == WHOLE]
        self.learned: Learned | None = None
        self.denoise: Denoise | None = None
        if variant.network:
            strangest = self.find_strangest() if variant.strangest else ()
            self.learned = fits.learn(key, variant.units, levels, strangest)
            shape = (len(self.sigmas) * variant.draws, len(self.used) // self.width, self.width)
            graph = denoiser.build_denoiser(self.learned.weights, shape, variant.label_guidance)
            self.denoise = in_float32(open_denoiser(graph))
        self.noise = draw_noise(len(self.sigmas), variant.draws, len(self.used), fits.seed) * self.used
        self.fit_statistics(clean)

    def fit_statistics(self, clean: Seen) -> None:
        """Clean statistics of the evidence; where a network has a part, from the fold that it was not trained on."""
        folds = self.fits.cell.folds
        originals = np.arange(len(folds)) < self.fits.cell.originals
        strange, mismatch, doubt = [], [], []
        for fold, part in enumerate(self.by_fold):
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

    def find_strangest(self) -> tuple[int, ...]:
        """Clean rows that the closed form finds stranger than nearly all originals, through chains fitted without them."""
        closed = Trial(self.fits, replace(self.variant, network=False, sigmas=DEFAULTS.sigmas, span=None))
        folds, clean = self.fits.cell.folds, self.fits.cell.clean
        scores = np.zeros(len(folds))
        for fold, part in enumerate(self.by_fold):
            scores[folds == fold] = closed.score_through(part, take_rows(clean, folds == fold))
        least = np.quantile(scores[: self.fits.cell.originals], 1.0 - self.variant.strangest)
        return tuple(np.flatnonzero(scores > least).tolist())

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
        return self.score_through(self.whole, seen)

    def score_through(self, part: Part, seen: Seen) -> NDArray[np.float32]:
        """(N,) scores by the guidance and chain that were fitted on a part of the clean images."""
        seen = self.fits.view(seen, self.variant.taps)
        mismatch = self.excuse(self.measure_mismatch(part, seen), self.find_doubt(seen))
        blocks = self.choose_kinds([self.measure_strangeness(part, seen), mismatch])
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
