"""The figures of a detector: AUROC, true-positive rates at a realised threshold, attack success behind the guard."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diffense.calibration import flag, rank_p_values
from diffense.charts import measure_auroc

Scores = NDArray[np.float32] | NDArray[np.float64]

FALSE_ALARMS: Final = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # where a curve is kept
BINS: Final = 32  # of the histograms that are kept


@dataclass(frozen=True)
class Detection:
    """How well scores tell triggered inputs that reach the attacker's label from clean ones.

    None where no triggered input reaches the label, or none was tried.

    Attributes:
        auroc: over all clean evaluation images and the triggered inputs that reach the attacker's label.
        auroc_right: the same without the clean images that the target misclassifies.
        tpr_at_fpr1, tpr_at_fpr5: share of those triggered inputs flagged, thresholds from calibration images.
        asr_after_fpr1, asr_after_fpr5: share of *all* triggered inputs that reach the attacker's label and are not flagged.
        fpr_at_1, fpr_at_5: share of the clean evaluation images flagged by the same thresholds.
    """

    auroc: float | None
    auroc_right: float | None
    tpr_at_fpr1: float | None
    tpr_at_fpr5: float | None
    asr_after_fpr1: float | None
    asr_after_fpr5: float | None
    fpr_at_1: float
    fpr_at_5: float


def measure_detection(
    calibration: Scores, clean: Scores, right: NDArray[np.bool_], triggered: Scores, reached: NDArray[np.bool_]
) -> Detection:
    """Work out the figures.

    Args:
        calibration: (n,) scores of the defender's calibration images.
        clean: (N,) scores of the clean evaluation images.
        right: (N,) whether the target classifies them as their true label.
        triggered: (T,) scores of the triggered evaluation images.
        reached: (T,) whether the target gives them the attacker's label.
    """
    ordered = np.sort(np.asarray(calibration, np.float32))
    size = len(ordered)
    caught, alarms = {}, {}
    for percent in (1, 5):
        caught[percent] = flag(rank_p_values(ordered, np.asarray(triggered, np.float32)), percent / 100, size)
        alarms[percent] = flag(rank_p_values(ordered, np.asarray(clean, np.float32)), percent / 100, size)

    def tpr(percent: int) -> float | None:
        return float(caught[percent][reached].mean()) if reached.any() else None

    def asr(percent: int) -> float | None:
        return float((reached & ~caught[percent]).mean()) if len(reached) else None

    return Detection(
        auroc=measure_auroc(clean, triggered[reached]) if reached.any() else None,
        auroc_right=measure_auroc(clean[right], triggered[reached]) if reached.any() else None,
        tpr_at_fpr1=tpr(1),
        tpr_at_fpr5=tpr(5),
        asr_after_fpr1=asr(1),
        asr_after_fpr5=asr(5),
        fpr_at_1=float(alarms[1].mean()),
        fpr_at_5=float(alarms[5].mean()),
    )


def trace_curve(clean: Scores, triggered: Scores) -> list[float] | None:
    """True-positive rates at the false-alarm rates of `FALSE_ALARMS`; None without triggered scores."""
    if not len(triggered):
        return None
    ordered = np.sort(np.asarray(clean, np.float64))
    allowed = [int(rate * len(ordered)) for rate in FALSE_ALARMS]
    return [round(float((triggered > ordered[len(ordered) - 1 - count]).mean()), 4) for count in allowed]


def count_scores(clean: Scores, triggered: Scores) -> dict[str, list[float] | list[int]]:
    """Histograms of both on equal bins; what lies beyond the last edge counts in the last bin."""
    low = float(clean.min())
    high = max(float(clean.max()), low + 1e-6)
    if len(triggered):
        high = max(high, float(np.quantile(triggered, 0.99)))
    edges = np.linspace(low, high, BINS + 1)

    def count(scores: Scores) -> list[int]:
        return [int(c) for c in np.histogram(np.clip(scores, low, high), edges)[0]]

    return {"edges": [round(low, 4), round(high, 4)], "clean": count(clean), "triggered": count(triggered)}
