"""Counts verdicts in the server's own metrics page."""

from collections import Counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense import metrics, names
from diffense.serving.verdicts import VerdictRows

LABEL_SERIES: Final = 100  # classes with series of their own, per process; a thousand classes would swamp Prometheus
OTHER_LABEL: Final = "other"


class Meter:
    """The metric families of one served model.

    The first `LABEL_SERIES` predicted classes that come along are counted apart, all later ones as ``other``.

    Args:
        backend: the server's module.
        model: name of the production model, a label of every series.
    """

    def __init__(self, backend: Any, model: str) -> None:
        self._model = model
        kinds = {"counter": backend.MetricFamily.COUNTER, "histogram": backend.MetricFamily.HISTOGRAM}
        # Kept for as long as the model lives: the series vanish with their family object.
        self._families = {
            metric: backend.MetricFamily(metric.name, metric.description, kinds[metric.kind]) for metric in metrics.FAMILIES
        }
        self._series: dict[tuple[metrics.Metric, str], Any] = {}
        self._classes: set[int] = set()

    def count(self, verdicts: VerdictRows, labels: NDArray[np.int64]) -> None:
        """Count the verdicts of one request; ``labels`` (N,) are the predicted classes."""
        for label, score, flagged in zip(labels.tolist(), verdicts.scores, verdicts.flagged, strict=True):
            if flagged == names.UNSCORED:
                continue
            name = self._name_class(label)
            self._find(metrics.SCORED, name).increment(1)
            self._find(metrics.SCORE, name).observe(float(score))
            if flagged == names.FLAGGED_YES:
                self._find(metrics.FLAGGED, name).increment(1)
        for reason, images in Counter(verdicts.reasons).items():
            if reason:
                self.count_unscored(reason, images)

    def count_unscored(self, reason: str, images: int) -> None:
        """Count images without a verdict."""
        self._find(metrics.UNSCORED, reason).increment(images)

    def observe_time(self, seconds: float) -> None:
        """Note how long one batch took."""
        self._find(metrics.SCORING_SECONDS, "").observe(seconds)

    def _name_class(self, label: int) -> str:
        if len(self._classes) < LABEL_SERIES:
            self._classes.add(label)
        return str(label) if label in self._classes else OTHER_LABEL

    def _find(self, metric: metrics.Metric, second: str) -> Any:
        key = (metric, second)
        if key not in self._series:
            labels = dict(zip(metric.labels, (self._model, second), strict=False))
            buckets = {"buckets": list(metric.buckets)} if metric.kind == "histogram" else {}
            self._series[key] = self._families[metric].Metric(labels=labels, **buckets)
        return self._series[key]
