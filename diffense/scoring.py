"""From latents to evidence: distances per (level, tap, band) and the label mismatch per tap; `rule` makes one score of it.

Evidence is higher for more suspicious inputs. N inputs, W = K d latent entries, C classes, G guide entries, E pieces of
evidence.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense.guidance import FAR, Guidance, guide_by
from diffense.sampling import Denoise, sample

BAND_EDGES: Final = (0, 4, 8, 16, 32, 64)  # fine where the error varies least: the signal sits in a few directions
LEADING: Final = 16  # directions of a tap by themselves in the mismatch; a warp shows in few, a pattern in the many others
WHOLE, LEAD, REST = -1, 0, 1  # parts of a tap in the mismatch
EXCUSED: Final = 2 / 3  # of the mismatch that doubt explains: triggered inputs may leave a target in doubt as well
UNSURE: Final = 1.5  # doubt (that of a fifth of the clean inputs is greater) beyond which another line holds
TINY: Final = 1e-9  # keeps the logarithm of a distance finite


@dataclass(frozen=True)
class Evidence:
    """One number per input that grows when something does not fit.

    Attributes:
        kind: ``strangeness`` (distance of innovation and sample) or ``mismatch`` (own over nearest other label).
        tap: index of the tap.
        band: index of the band; in the mismatch -1 for the whole tap, 0 for its leading directions, 1 for the rest.
        level: index of the noise level, -1 where no noise is involved.
    """

    kind: str
    tap: int
    band: int
    level: int


@dataclass(frozen=True)
class Allowance:
    """What doubt excuses of the log mismatch: ``a + b doubt + c max(doubt - UNSURE, 0)`` (docs/decisions/0017).

    Attributes:
        lines: (3, M) a, b and c of the M columns of `measure_mismatch`.
    """

    lines: NDArray[np.float64]


@dataclass(frozen=True)
class Half:
    """Some directions of every tap, d_h of them; worked out once, not at every request.

    Attributes:
        cut: (d, d_h) picks them.
        means: (K, d_h, C) class means times -2, laid out for one product a tap.
    """

    cut: NDArray[np.float64]
    means: NDArray[np.float64]


@dataclass(frozen=True)
class Formula:
    """Everything the score is computed from, besides the denoiser.

    Attributes:
        guidance: guided mean and class means.
        transform: (W, W) of the chain.
        bands: (W, B) averaging matrix of the bands.
        noise: (L R, W) noise bank.
        ladder: (steps + 1, L, K) sigmas.
        draws: R.
        width: d.
        data_guidance: weight of `sampling.pull`.
        probabilities: whether the logits output is a softmax.
        allowance: for the mismatch of doubtful inputs; None before it is fitted.
    """

    guidance: Guidance
    transform: NDArray[np.float64]
    bands: NDArray[np.float64]
    noise: NDArray[np.float64]
    ladder: NDArray[np.float64]
    draws: int
    width: int
    data_guidance: float
    probabilities: bool
    allowance: Allowance | None = None

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """The P parts whose distances are measured of every tap; a narrow one has no rest."""
        return (WHOLE, LEAD, REST) if self.width > LEADING else (WHOLE,)

    @cached_property
    def spans(self) -> NDArray[np.float64]:
        """(d, P) one where a direction belongs to a part."""
        lead = np.arange(self.width) < LEADING
        spans = {WHOLE: np.ones(self.width), LEAD: lead.astype(np.float64), REST: 1.0 - lead}
        return np.stack([spans[part] for part in self.parts], axis=1)

    @cached_property
    def halves(self) -> list[Half]:
        """A tap's leading directions and the rest, or a narrow tap as a whole."""
        cuts = np.split(np.eye(self.width), [LEADING], axis=1) if len(self.parts) > 1 else [np.eye(self.width)]
        return [Half(cut, np.ascontiguousarray(-2.0 * cut.T @ self._means)) for cut in cuts]

    @cached_property
    def lengths(self) -> NDArray[np.float64]:
        """(K P, C) squared lengths of the class means."""
        lengths = np.einsum("kdc,dp->kpc", self._means**2, self.spans)
        return np.asarray(lengths.reshape(-1, len(self.guidance.means)))

    @property
    def _means(self) -> NDArray[np.float64]:
        return self.guidance.means.reshape(len(self.guidance.means), -1, self.width).transpose(1, 2, 0)

    @cached_property
    def chosen_parts(self) -> NDArray[np.float64]:
        """(K P, M) picks what `list_parts` names from the parts of all taps; recorded graphs have no slices."""
        places = {name: i for i, name in enumerate(product(range(len(self.lengths) // len(self.parts)), self.parts))}
        columns = [places[name] for name in list_parts(self.bands.any(axis=1), self.width)]
        return np.eye(len(places))[:, columns]

    @cached_property
    def keeps_all(self) -> bool:
        """Whether `chosen_parts` leaves everything as it is, so that a graph need not multiply by it."""
        return np.array_equal(self.chosen_parts, np.eye(len(self.chosen_parts)))

    @cached_property
    def last_entry(self) -> NDArray[np.float64]:
        """(G, 1) picks the doubt, the guide's last entry; a product, because recorded graphs have no slices."""
        column = np.zeros((len(self.guidance.slope), 1))
        column[-1] = 1.0
        return column


def lay_bands(
    used: NDArray[np.bool_], width: int, edges: tuple[int, ...] = BAND_EDGES
) -> tuple[NDArray[np.float64], list[tuple[int, int]]]:
    """Make the averaging matrix of the bands.

    Args:
        used: (W,) False where an entry is padding (always the last entries of a tap).
        width: d.
        edges: lower ends of a tap's bands, ascending from 0.

    Returns:
        (W, B) matrix whose columns average one band, and the (tap, band) of each column; empty bands have none.
    """
    columns, names = [], []
    for tap in range(len(used) // width):
        usable = int(used[tap * width : (tap + 1) * width].sum())
        ends = [*(edge for edge in edges if edge < usable), usable]
        for band, (low, high) in enumerate(pairwise(ends)):
            column = np.zeros(len(used))
            column[tap * width + low : tap * width + high] = 1.0 / (high - low)
            columns.append(column)
            names.append((tap, band))
    return np.stack(columns, axis=1), names


def list_parts(used: NDArray[np.bool_], width: int) -> list[tuple[int, int]]:
    """(tap, part) of the M columns of `measure_mismatch`; a tap of few directions counts as a whole alone."""
    parts = []
    for tap, directions in enumerate(used.reshape(-1, width).sum(axis=1)):
        parts += [(tap, part) for part in ((WHOLE, LEAD, REST) if directions > LEADING else (WHOLE,))]
    return parts


def list_evidence(names: list[tuple[int, int]], levels: int, parts: list[tuple[int, int]]) -> list[Evidence]:
    """Name the E columns that `measure` gives, in order: `lay_bands` names the bands, `list_parts` the parts."""
    strange = [Evidence("strangeness", tap, band, level) for level in range(levels) for tap, band in names]
    return strange + [Evidence("mismatch", tap, part, -1) for tap, part in parts]


def measure(formula: Formula, logits: Any, latents: Any, label: Any, denoise: Denoise | None, xp: Any) -> Any:
    """Measure the evidence.

    Args:
        formula: constants.
        logits: (N, C).
        latents: (N, W).
        label: (N, C) one-hot of the predicted label.
        denoise: one guided step, or None: the sample is then the Gaussian's mean, zero.
        xp: array namespace.

    Returns:
        (N, E) log distances; those of the mismatch less what doubt excuses.
    """
    guide = guide_by(formula.guidance, logits, label, formula.probabilities, xp)
    residual = latents - (guide @ formula.guidance.slope + formula.guidance.bias)
    strange = xp.log(measure_strangeness(formula, residual, guide, denoise, xp) + TINY)
    mismatch = xp.log(measure_mismatch(formula, latents, label, xp) + TINY)
    if formula.allowance is not None:
        mismatch = allow(formula.allowance, mismatch, guide @ formula.last_entry, xp)
    return xp.concatenate([strange, mismatch], axis=1)


def measure_strangeness(formula: Formula, residual: Any, guide: Any, denoise: Denoise | None, xp: Any) -> Any:
    """Mean squared distance of the innovation to the mean of its samples, per level and band: (N, W), (N, G) -> (N, L B).

    The mean of antithetic draws is free of the noise as far as the denoiser is linear (docs/decisions/0004).
    """
    size = formula.transform.shape[1]
    innovation = residual @ formula.transform
    if denoise is None:
        return (innovation * innovation) @ formula.bands
    levels = formula.ladder.shape[1]
    samples = sample(
        denoise,
        innovation,
        guide,
        noise=formula.noise,
        ladder=formula.ladder,
        draws=formula.draws,
        width=formula.width,
        data_guidance=formula.data_guidance,
        xp=xp,
    )
    centre = xp.mean(xp.reshape(samples, (-1, levels, formula.draws, size)), axis=2)
    error = centre - xp.reshape(innovation, (-1, 1, size))
    return xp.reshape((error * error) @ formula.bands, (-1, levels * formula.bands.shape[1]))


def measure_mismatch(formula: Formula, latents: Any, label: Any, xp: Any) -> Any:
    """Squared distance to the predicted class's mean over that to the nearest other class's: (N, W) -> (N, M).

    Of each tap as a whole, of its leading directions and of the rest (docs/decisions/0015).
    """
    distance = _measure_distances(formula, latents, xp)
    hot = xp.reshape(label, (-1, 1, len(formula.guidance.means)))
    rivals = FAR * (hot + np.where(formula.guidance.seen, 0.0, 1.0))
    own, other = xp.sum(distance * hot, axis=2), xp.amin(distance + rivals, axis=2)
    ratio = xp.maximum(own, 0.0) / (xp.maximum(other, 0.0) + TINY)
    return ratio if formula.keeps_all else ratio @ formula.chosen_parts


def _measure_distances(formula: Formula, latents: Any, xp: Any) -> Any:
    """Squared distances to all class means: (N, W) -> (N, K P, C)."""
    places, classes = formula.lengths.shape
    z = xp.reshape(latents, (-1, places // len(formula.parts), formula.width))
    cross = [xp.reshape(z @ half.cut, (-1, *_list_rows(half))) @ half.means for half in formula.halves]
    joined = xp.concatenate([cross[0] + cross[1], *cross], axis=2) if len(cross) > 1 else cross[0]
    squares = xp.reshape((z * z) @ formula.spans, (-1, places, 1))
    return squares + xp.reshape(joined, (-1, places, classes)) + formula.lengths


def _list_rows(half: Half) -> tuple[int, int, int]:
    """A tap's directions as one row for one product: (K, 1, d_h)."""
    taps, directions, _ = half.means.shape
    return taps, 1, directions


def fit_allowance(log_mismatch: NDArray[np.float64], doubt: NDArray[np.float64]) -> Allowance:
    """Fit the usual log mismatch as two joined lines in the doubt, of which a share is excused: (n, M), (n, 1) of clean images.

    The slopes are held back by ten observations' weight, which only small samples feel.
    """
    terms = np.concatenate([doubt, _exceed(doubt, np)], axis=1)
    centred = terms - terms.mean(axis=0)
    slopes = np.linalg.solve(centred.T @ centred + 10.0 * np.eye(2), centred.T @ log_mismatch)
    return Allowance(np.concatenate([[log_mismatch.mean(axis=0) - terms.mean(axis=0) @ slopes], EXCUSED * slopes]))


def allow(allowance: Allowance, log_mismatch: Any, doubt: Any, xp: Any) -> Any:
    """(N, M) log mismatch and (N, 1) doubt -> (N, M) what is not excused; 0 is usual of an input that the target is sure of."""
    start, slope, bend = allowance.lines
    return log_mismatch - (doubt * slope + _exceed(doubt, xp) * bend + start)


def _exceed(doubt: Any, xp: Any) -> Any:
    """(N, 1) -> (N, 1) doubt beyond `UNSURE`, else 0."""
    return xp.maximum(doubt - UNSURE, 0.0)
