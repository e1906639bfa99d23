"""How surprising a number is on clean images: ``-log p`` as a piecewise linear function, so that it runs anywhere."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

QUANTILES: Final = tuple(np.linspace(0.0, 0.9, 10))
TAIL: Final = 0.1  # share of clean images above the last knot


@dataclass(frozen=True)
class Surprise:
    """Piecewise linear maps from a number that grows with suspicion to ``-log p`` on clean images.

    Attributes:
        knots: (E, J) of the E numbers, log distances for instance.
        slopes: (E, J) change of slope at each knot; ``h(x) = sum_j slopes_j max(x - knots_j, 0)``.
    """

    knots: NDArray[np.float64]
    slopes: NDArray[np.float64]


def fit_surprise(numbers: NDArray[np.float64], resolution: float = 1e-6) -> Surprise:
    """Fit ``-log p`` on clean images: empirical up to the 90th percentile, an exponential tail above it.

    Args:
        numbers: (n, E) of clean images that did not help to fit what gives the numbers.
        resolution: least distance of two knots, above the rounding errors of float32.
    """
    knots = np.quantile(numbers, QUANTILES, axis=0).T  # (E, J)
    steps = np.maximum(np.diff(knots, axis=1), resolution)
    knots = np.concatenate([knots[:, :1], knots[:, :1] + np.cumsum(steps, axis=1)], axis=1)
    heights = -np.log(1.0 - np.array(QUANTILES))
    excess = np.maximum(numbers - knots[:, -1], 0.0).sum(axis=0) / max(1.0, TAIL * len(numbers))
    slope = np.diff(heights) / steps
    tail = 1.0 / np.maximum(excess, 1e-3)
    slope = np.concatenate([slope, tail[:, None]], axis=1)
    return Surprise(knots, np.diff(slope, axis=1, prepend=0.0))


def find_surprise(surprise: Surprise, numbers: Any, xp: Any) -> Any:
    """(N, E) numbers -> (N, E) ``-log p``, zero for what is below any clean image."""
    pieces = surprise.knots.shape[0]
    above = xp.maximum(xp.reshape(numbers, (-1, pieces, 1)) - surprise.knots, 0.0)
    return xp.sum(above * surprise.slopes, axis=2)
