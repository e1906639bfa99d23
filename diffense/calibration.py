"""Split conformal p-values, the threshold that belongs to alpha, and how sure the realised false-alarm rate is."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diffense.errors import OptionError, TooFewImagesError

SLACK: Final = 1e-9  # of a count of images: 0.3 - 0.2 is meant as 0.1
LEAST_ALPHA: Final = 1e-9  # a thousand million clean images


def rank_p_values(calibration: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(1 + #{calibration >= s}) / (n + 1)``; ties count against the input.

    Args:
        calibration: (n,) ascending scores of clean images that were used for nothing else.
        scores: (N,), higher = more suspicious.

    Returns:
        (N,) float64 in [1 / (n + 1), 1], lower = more suspicious.
    """
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return np.asarray((1.0 + at_least) / (len(calibration) + 1.0), dtype=np.float64)


def count_allowed(alpha: float, calibration_size: int) -> int:
    """The largest k <= n with ``k / (n + 1) <= alpha``: p-values are such fractions, and up to this one they are flagged."""
    return min(math.floor(alpha * (calibration_size + 1) + SLACK), calibration_size)


def flag(p_values: NDArray[np.float64], alpha: float, calibration_size: int) -> NDArray[np.bool_]:
    """(N,) p-values of `rank_p_values` -> whether each is at most alpha."""
    return np.asarray(np.rint(p_values * (calibration_size + 1)) <= count_allowed(alpha, calibration_size))


def needed_images(alpha: float) -> int:
    """Fewest calibration images for which ``p <= alpha`` can happen: the least n with ``1 / (n + 1) <= alpha``."""
    return max(1, math.ceil((1.0 - SLACK) / alpha) - 1)


def check_rate(alpha: float) -> None:
    """Refuse an alpha that is no rate.

    Raises:
        OptionError: alpha is not between 0 and 1, or so small that no set of images is large enough.
    """
    if not LEAST_ALPHA <= alpha < 1.0:
        raise OptionError(
            f"alpha is {alpha}, it must lie between 0 and 1 ({LEAST_ALPHA:g} at least): it is the false-alarm rate you accept"
        )


def check_reach(alpha: float, images: int, groups: int | None) -> None:
    """`check_alpha` for images that calibrate, or for the groups that they are of: each counts once.

    Raises:
        OptionError, TooFewImagesError: as `check_alpha`.
    """
    check_alpha(alpha, images)
    if groups is not None:
        check_alpha(alpha, groups, "groups")


def check_alpha(alpha: float, calibration_size: int, what: str = "images") -> None:
    """Refuse an alpha that no input could reach with so many calibration images, or groups of them.

    Raises:
        OptionError: alpha is not between 0 and 1.
        TooFewImagesError: alpha is below ``1 / (n + 1)``.
    """
    check_rate(alpha)
    if calibration_size < needed_images(alpha):
        raise TooFewImagesError(
            f"alpha {alpha:g} needs {needed_images(alpha)} calibration {what}, there are {calibration_size}; give more clean "
            f"{what} or an alpha of at least {math.ceil(1e4 / (calibration_size + 1)) / 1e4:g}"
        )


def find_threshold(calibration: NDArray[np.float32], alpha: float) -> float:
    """Give the largest score that still passes at alpha: an input is flagged when its score is *above* this one.

    Args:
        calibration: (n,) ascending scores.
        alpha: false-alarm rate, at least ``1 / (n + 1)``.
    """
    return float(calibration[len(calibration) - count_allowed(alpha, len(calibration))])


def count_groups_once(scores: NDArray[np.float32], groups: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """Give each group the same number of scores, so that a long scene says no more than a short one; all ascending.

    A new input is of a new group, and groups are what is exchangeable (Lee, Barber and Willett 2023, arXiv 2306.06342). Each
    gets as many as the mean group has, evenly spread over its own.

    Args:
        scores: (n,) of clean images.
        groups: (n,) which of them belong together; None where each stands alone.
    """
    if groups is None:
        return np.sort(scores)
    numbers = np.unique(groups)
    each = len(scores) // len(numbers)
    places = (np.arange(each) + 0.5) / each
    owned = (np.sort(scores[groups == number]) for number in numbers)
    return np.sort(np.concatenate([own[(places * len(own)).astype(np.int64)] for own in owned]))


def bound_false_alarms(
    calibration_size: int, alpha: float, confidence: float = 0.9, groups: int | None = None
) -> tuple[float, float]:
    """Give the central interval of the realised false-alarm rate over draws of the calibration set.

    With continuous scores the rate is Beta(k, n + 1 - k), ``k = floor(alpha (n + 1))`` (Vovk 2012, arXiv 1209.2673).

    Args:
        calibration_size: n.
        alpha: false-alarm rate that was asked for.
        confidence: of the interval.
        groups: how many groups the images are of, where they belong together. The interval is then that of so many images,
            as if all of a group had one score, with ``k = alpha (groups + 1)``: it is too wide rather than too narrow.

    Returns:
        Lower and upper end, as rates.
    """
    from scipy.stats import beta

    size, k = float(calibration_size), float(count_allowed(alpha, calibration_size))
    if groups is not None and groups < calibration_size:
        size, k = float(groups), alpha * (groups + 1)
    tail = (1.0 - confidence) / 2.0
    low, high = beta.ppf([tail, 1.0 - tail], k, size + 1 - k)
    return float(low), float(high)
