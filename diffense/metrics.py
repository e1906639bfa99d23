"""The metrics that guard, gateway and stream add to the server's own; the dashboard and the alert rules query these names."""

from dataclasses import dataclass
from typing import Final, Literal

MODEL_LABEL: Final = "model"  # the production model's name
CLASS_LABEL: Final = "label"  # the class that the production model predicted
REASON_LABEL: Final = "reason"  # why an image has no score


@dataclass(frozen=True)
class Metric:
    """One metric family. ``buckets`` are the upper bounds of a histogram, ascending, without infinity."""

    name: str
    kind: Literal["counter", "histogram"]
    description: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names under which Prometheus stores the family."""
        if self.kind == "counter":
            return (self.name,)
        return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")


SCORED: Final = Metric("diffense_scored_total", "counter", "Images that the guard scored", (MODEL_LABEL, CLASS_LABEL))
FLAGGED: Final = Metric("diffense_flagged_total", "counter", "Images that the guard flagged", (MODEL_LABEL, CLASS_LABEL))
UNSCORED: Final = Metric(
    "diffense_unscored_total", "counter", "Images that the guard could not score", (MODEL_LABEL, REASON_LABEL)
)
SCORE: Final = Metric(
    "diffense_score",
    "histogram",
    "Scores; higher is more suspicious",
    (MODEL_LABEL, CLASS_LABEL),
    (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 89.0),
)
SCORING_SECONDS: Final = Metric(
    "diffense_scoring_seconds",
    "histogram",
    "Time that scoring one batch took, in seconds",
    (MODEL_LABEL,),
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
FAMILIES: Final = (SCORED, FLAGGED, UNSCORED, SCORE, SCORING_SECONDS)
