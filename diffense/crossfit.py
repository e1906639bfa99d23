"""Clean statistics that no row has helped to fit: whitening and chain by folds, the denoiser on all folds but the first."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diffense.chain import Chain, assign_folds, fit_chain
from diffense.clean import count_independent
from diffense.errors import OptionError
from diffense.guidance import Guidance, Kind, fit_guidance, one_hot, split_mean
from diffense.manifest import NetworkReport
from diffense.sampling import Denoise, in_float32
from diffense.scoring import TINY, Formula, measure_mismatch, measure_strangeness
from diffense.settings import FitSettings

Matrix = NDArray[np.float64]
Rewhiten = Callable[[NDArray[np.bool_]], Matrix]
"""(n,) rows to fit on -> (n, W) latents of all rows, whitened by those alone."""

FOLDS: Final = 5
BLOCK: Final = 1024
VALIDATION_FOLD: Final = 0
FEWEST_ROWS: Final = 400  # originals to fit on, below which no network learns anything that a Gaussian does not know
GAIN: Final = 0.97  # of the Gaussian's held-out loss; a network that gains less loses on triggered inputs (docs/decisions/0007)


@dataclass(frozen=True)
class LatentSet:
    """Clean latents to fit on.

    Attributes:
        latents: (n, W).
        logits: (n, C).
        source: (n,) index of the original image of each row.
        originals: how many rows are originals; they come first.
        used: (W,) False where an entry is padding.
        width: d.
        kind: what guides the latents.
        probabilities: whether the logits are a softmax.
        chain_sigma: noise at which the shallower taps are seen.
    """

    latents: Matrix
    logits: Matrix
    source: NDArray[np.int64]
    originals: int
    used: NDArray[np.bool_]
    width: int
    kind: Kind
    probabilities: bool
    chain_sigma: float

    def fit_linear(self, rows: NDArray[np.bool_], like: Guidance | None = None) -> tuple[Guidance, Chain]:
        """Fit guidance and chain on these rows; with the guidance of the whole set given, their guide is the same."""
        guidance = fit_guidance(self.latents[rows], self.logits[rows], self.kind, self.probabilities, like)
        residual = self.guide(guidance, rows)[1]
        return guidance, fit_chain(residual, self.width, self.used, self.chain_sigma, count_independent(self.source[rows]))

    def guide(self, guidance: Guidance, rows: NDArray[np.bool_] | NDArray[np.int64]) -> tuple[Matrix, Matrix]:
        """(n, G) guide and (n, W) residual of these rows."""
        return split_mean(guidance, self.latents[rows], self.logits[rows], self.probabilities)


@dataclass(frozen=True)
class Part:
    """What one fold is seen through.

    Attributes:
        seen: all rows, whitened without this fold's, or by all where folds share a whitening. A direction that the other folds
            lack is padding here.
        guidance: fitted on the other folds.
        chain: likewise.
    """

    seen: LatentSet
    guidance: Guidance
    chain: Chain


@dataclass(frozen=True)
class CrossFit:
    """Every row seen through a chain, and where rows are few a whitening, that was fitted without it.

    Attributes:
        folds: (n,) fold of each row; copies share their original's, originals that of their group.
        parts: one a fold.
    """

    folds: NDArray[np.int64]
    parts: list[Part]


def cross_fit(
    clean: LatentSet,
    whole: Guidance,
    generator: np.random.Generator,
    rewhiten: Rewhiten | None = None,
    groups: NDArray[np.int64] | None = None,
) -> CrossFit:
    """Fit guidance and chain once for each fold, on the rows of the others, with the guide of the `whole`.

    Args:
        clean: all rows.
        whole: guidance fitted on all of them.
        generator: of the folds.
        rewhiten: without it a fold is whitened with the others, which misjudges it where rows are few
            (docs/decisions/0027). No network can be trained on what it gives: every fold has directions of its own.
        groups: (originals,) which of them share a fold; None where each stands alone.
    """
    labels = clean.logits[: clean.originals].argmax(axis=1)
    folds = assign_folds(labels, FOLDS, generator, groups)[clean.source]
    parts = []
    for others in (folds != fold for fold in range(FOLDS)):
        seen = clean
        if rewhiten is not None:
            latents = rewhiten(others)
            seen = replace(clean, latents=latents, used=latents.any(axis=0))
        parts.append(Part(seen, *seen.fit_linear(others, whole)))
    return CrossFit(folds, parts)


def learn_network(
    clean: LatentSet,
    crossed: CrossFit,
    guidance: Guidance,
    sigmas: Matrix,
    settings: FitSettings,
    report: Callable[[int, int], None],
    choose_typical: Callable[[], NDArray[np.bool_]],
) -> tuple[dict[str, NDArray[np.float32]] | None, NetworkReport]:
    """Train the denoiser and decide whether it is used.

    Args:
        clean: all rows.
        crossed: the parts through which each fold is seen.
        guidance: of all rows.
        sigmas: (L, K) the guard's levels.
        settings: whether it is used (``auto`` asks the held-out rows), most optimiser steps, seed.
        report: told (step, steps).
        choose_typical: gives the (n,) rows that may be learned from; asked only where something is learned. All held-out
            originals judge.

    Returns:
        The weights, or None when it stays off, and the reason.

    Raises:
        OptionError: so few steps that no check would ever take place.
    """
    mode, steps = settings.network, settings.training_steps
    if mode == "off":
        return None, NetworkReport(used=False, reason="switched off")
    if mode == "auto" and clean.originals < FEWEST_ROWS:
        reason = f"{clean.originals} images to fit on, a network needs {FEWEST_ROWS}"
        return None, NetworkReport(used=False, reason=reason)
    from diffense.learning import CHECK_EVERY, Innovations, train_denoiser  # torch, only where something is trained

    if steps < CHECK_EVERY:
        raise OptionError(
            f"training_steps is {steps}; the network is first checked after {CHECK_EVERY}, give at least that many"
        )
    size = clean.latents.shape[1]
    innovation = np.zeros((len(clean.source), size))
    for fold, part in enumerate(crossed.parts):
        rows = crossed.folds == fold
        innovation[rows] = part.seen.guide(part.guidance, rows)[1] @ part.chain.transform
    everything = np.ones(len(clean.source), bool)
    guide = clean.guide(guidance, everything)[0]
    held_out = crossed.folds == VALIDATION_FOLD
    originals = np.arange(len(clean.source)) < clean.originals

    def pick(rows: NDArray[np.bool_]) -> Innovations:
        return Innovations(*(a[rows].astype(np.float32) for a in (innovation, guide)))

    typical = choose_typical()
    taught, judges = pick(~held_out & typical), pick(held_out & originals)
    learned = train_denoiser(taught, judges, clean.used, sigmas, clean.width, steps, settings.seed, report)
    better = learned.loss <= GAIN * learned.gaussian_loss
    what = f"held-out loss {learned.loss:.3f} against {learned.gaussian_loss:.3f} of the Gaussian"
    used = better or mode == "on"
    reason = what if better else f"{what}: no gain" + (", used because asked for" if used else "")
    losses = {"loss": round(learned.loss, 6), "gaussian_loss": round(learned.gaussian_loss, 6)}
    left_out = int((~typical).sum())
    found = NetworkReport(used=used, reason=reason, steps=learned.steps, left_out=left_out, **losses)
    return learned.weights if used else None, found


@dataclass(frozen=True)
class Reference:
    """Evidence of clean rows that helped to fit neither their guidance and chain nor, where it matters, the denoiser.

    Attributes:
        strange: (n_s, L B) log strangeness; with a network only the rows of the validation fold, without one (n, B).
        mismatch: (n, M) log mismatch, which no network has a part in.
        doubt: (n, 1).
        rows: (n,) which rows of the set these are; they stand fold by fold.
    """

    strange: Matrix
    mismatch: Matrix
    doubt: Matrix
    rows: NDArray[np.int64]

    def take(self, chosen: NDArray[np.bool_]) -> "Reference":
        """Some of the rows, of evidence without a network."""
        return Reference(self.strange[chosen], self.mismatch[chosen], self.doubt[chosen], self.rows[chosen])


def split_blocks(rows: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """(n,) which rows -> their numbers, at most `BLOCK` at a time: a mismatch holds every class of every row at once."""
    numbers = np.flatnonzero(rows)
    return [numbers[i : i + BLOCK] for i in range(0, len(numbers), BLOCK)]


def measure_reference(
    clean: LatentSet, crossed: CrossFit, formula: Formula, denoise: Denoise | None, chosen: NDArray[np.bool_]
) -> Reference:
    """Measure clean rows, each through the part that was fitted without it.

    Args:
        clean: all rows.
        crossed: the parts, whose guidance and chain take the place of the formula's.
        formula: of the guard.
        denoise: one guided step, or None for the closed form.
        chosen: (n,) which rows.
    """
    strange, mismatch, doubt, places = [], [], [], []
    step = None if denoise is None else in_float32(denoise)
    parts = enumerate(crossed.parts)
    for fold, part, rows in ((f, p, b) for f, p in parts for b in split_blocks(chosen & (crossed.folds == f))):
        own = replace(formula, guidance=part.guidance, transform=part.chain.transform)
        guide, residual = part.seen.guide(part.guidance, rows)
        if denoise is None or fold == VALIDATION_FOLD:
            strange.append(np.log(measure_strangeness(own, residual, guide, step, np) + TINY))
        mismatch.append(np.log(measure_mismatch(own, part.seen.latents[rows], one_hot(clean.logits[rows]), np) + TINY))
        doubt.append(guide[:, -1:])
        places.append(rows)
    return Reference(np.concatenate(strange), np.concatenate(mismatch), np.concatenate(doubt), np.concatenate(places))
