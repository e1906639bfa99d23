"""The verdict of every image of a stacked batch, scored or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from diffense import names


@dataclass
class VerdictRows:
    """One row an image; ``reasons`` is empty where the image was scored.

    Attributes:
        scores: (N,) float32.
        p_values: (N,) float32.
        flagged: (N,) uint8.
        reasons: (N,) why an image has no verdict.
    """

    scores: NDArray[np.float32]
    p_values: NDArray[np.float32]
    flagged: NDArray[np.uint8]
    reasons: list[str]

    @classmethod
    def make_unscored(cls, count: int, reason: str) -> Self:
        """Rows that all lack a verdict for one reason."""
        nothing = np.full(count, names.NOT_SCORED_VALUE, np.float32)
        return cls(nothing, nothing.copy(), np.full(count, names.UNSCORED, np.uint8), [reason] * count)

    def fill(self, rows: NDArray[np.intp], scores: NDArray[Any], p_values: NDArray[Any], flagged: NDArray[Any]) -> None:
        """Give some rows their verdict; a score that is no number leaves its row without one."""
        good = np.isfinite(scores) & np.isfinite(p_values)
        kept = rows[good]
        self.scores[kept], self.p_values[kept], self.flagged[kept] = scores[good], p_values[good], flagged[good]
        for row, usable in zip(rows, good, strict=True):
            self.reasons[row] = "" if usable else "score"

    def split(self, sizes: Sequence[int]) -> list["VerdictRows"]:
        """Cut into one piece a request."""
        ends = np.cumsum(sizes).tolist()
        return [self[slice(end - size, end)] for end, size in zip(ends, sizes, strict=True)]

    def __getitem__(self, rows: slice) -> "VerdictRows":
        return VerdictRows(self.scores[rows], self.p_values[rows], self.flagged[rows], self.reasons[rows])

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """The three verdict tensors, each (N, 1)."""
        columns: tuple[NDArray[Any], ...] = (self.scores, self.p_values, self.flagged)
        return {name: column[:, None] for name, column in zip(names.VERDICT_TENSORS, columns, strict=True)}
