"""Calibration where clean images, or groups of them, are few: each is scored by a scorer that was fitted on the other folds.

Vovk 2015, "Cross-conformal predictors": all images are fitted on and all calibrate. The false-alarm rate can exceed alpha, up
to twice in the worst case; since the guard itself is fitted on more images than any fold's scorer, it is below it as a rule.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from diffense.chain import assign_folds
from diffense.clean import CleanSet
from diffense.settings import ignore_progress

FOLDS: Final = 10  # nine tenths of few images give scores nearer to the guard's own than four fifths

Matrix = NDArray[np.float64]
Score = Callable[[Matrix, list[Matrix]], NDArray[np.float32]]
"""((N, C) logits, the (N, P) pooled features of each tap) -> (N,) scores."""


def score_crossed(
    clean: CleanSet,
    fit: Callable[[CleanSet], Score],
    generator: np.random.Generator,
    report: Callable[[int, int], None] = ignore_progress,
) -> NDArray[np.float32]:
    """(n,) scores of the originals, each from what was fitted on the other folds and their copies.

    Args:
        clean: what the guard is fitted on.
        fit: makes a scorer of a part of it.
        generator: of the folds.
        report: told (folds done, folds).
    """
    folds = assign_folds(clean.labels[: clean.originals], FOLDS, generator, clean.groups)
    scores = np.empty(clean.originals, np.float32)
    # Small products gain nothing by threads, and on cores that others use these wait for each other: minutes for seconds.
    with threadpool_limits(1, "blas"):
        for done, fold in enumerate(np.unique(folds)):
            report(done, FOLDS)
            held = np.flatnonzero(folds == fold)
            score = fit(clean.take(folds[clean.source] != fold))
            scores[held] = score(clean.logits[held], [tap[held] for tap in clean.pooled])
    report(FOLDS, FOLDS)
    return scores
