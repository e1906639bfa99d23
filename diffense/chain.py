"""The linear part in closed form: each tap from the label and the shallower taps, and what is left over.

All statistics are float64. W = K d entries: K taps of width d each; a tap with fewer usable directions is padded with zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """``innovation = residual @ transform``.

    Attributes:
        transform: (W, W), block upper triangular; columns of tap k read the rows of taps 0..k.
    """

    transform: Matrix


def shrink_covariance(centred: Matrix, independent: int | None = None) -> Matrix:
    """Ledoit–Wolf covariance of rows that are already centred, (n, p) -> (p, p).

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", lemma 3.4; the estimate
    turns with the data under an orthogonal map. Of rows that repeat each other no more than `independent` count.
    """
    n, p = centred.shape
    sample = centred.T @ centred / n
    scale = np.trace(sample) / p
    spread = np.sum((sample - scale * np.eye(p)) ** 2)
    norms = np.sum(centred**2, axis=1)
    noise = (np.sum(norms**2) / n - np.sum(sample**2)) / min(n, independent or n)
    weight = min(1.0, noise / spread) if spread > 0.0 else 1.0
    return np.asarray((1.0 - weight) * sample + weight * scale * np.eye(p))


def fit_chain(
    residual: Matrix,
    width: int,
    used: NDArray[np.bool_],
    sigma: float,
    independent: int | None = None,
) -> Chain:
    """Fit the chain on clean residuals.

    Tap k is guessed from the shallower taps o, seen at noise sigma: ``B = C_ko (C_oo + sigma^2 I)^-1``; its error has the
    covariance ``V = C_kk - B C_ok``, and the innovation is ``V^(-1/2) (r_k - B r_o)`` with V's symmetric root, so that an entry
    of the innovation belongs to the entry of the tap: leading entries are the directions that vary most within classes.

    Args:
        residual: (n, W) clean latents minus their guided mean.
        width: d.
        used: (W,) False where an entry is padding.
        sigma: noise at which the shallower taps are seen, > 0.
        independent: how many of the rows count as independent, all by default.

    Returns:
        The chain; innovations of the fitted rows have about unit variance.
    """
    size = residual.shape[1]
    covariance = np.zeros((size, size))
    covariance[np.ix_(used, used)] = shrink_covariance(residual[:, used], independent)
    transform = np.zeros((size, size))
    for tap in range(size // width):
        k = np.flatnonzero(used[tap * width : (tap + 1) * width]) + tap * width
        o = np.flatnonzero(used[: tap * width])
        seen = covariance[np.ix_(o, o)] + sigma**2 * np.eye(len(o))
        guess = np.linalg.solve(seen, covariance[np.ix_(o, k)]).T  # B, (d_k, |o|)
        error = covariance[np.ix_(k, k)] - guess @ covariance[np.ix_(o, k)]
        values, vectors = np.linalg.eigh((error + error.T) / 2.0)
        values = np.maximum(values, 1e-9 * values.max(initial=0.0))  # a tap that never moves has none
        whiten = (vectors / np.sqrt(values)) @ vectors.T
        out = slice(tap * width, tap * width + len(k))
        transform[k, out] = whiten
        transform[o, out] = -guess.T @ whiten
    return Chain(transform)


def assign_folds(
    labels: NDArray[np.int64], folds: int, generator: np.random.Generator, groups: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Give each row a fold, evenly within its label, (n,) -> (n,) in 0..folds-1; rows of one group get the same."""
    result = np.empty(len(labels), np.int64)
    start = 0
    for members in shuffle_groups(labels, groups, generator):
        for place, rows in enumerate(members):
            result[rows] = (place + start) % folds
        start += len(members)
    return result


def shuffle_groups(
    labels: NDArray[np.int64], groups: NDArray[np.int64] | None, generator: np.random.Generator
) -> Iterator[list[NDArray[np.int64]]]:
    """For each label, the row numbers of each of its groups, in random order; a group has the label of its first row.

    Args:
        labels: (n,).
        groups: (n,) which rows belong together; None where each stands alone.
        generator: of the order.
    """
    if groups is None:
        for label in np.unique(labels):
            yield list(generator.permutation(np.flatnonzero(labels == label))[:, None])
        return
    first, group = np.unique(groups, return_index=True, return_inverse=True)[1:]
    for label in np.unique(labels[first]):
        yield [np.flatnonzero(group == number) for number in generator.permutation(np.flatnonzero(labels[first] == label))]
