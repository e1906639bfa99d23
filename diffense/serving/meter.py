"""Counts verdicts in the server's own metrics page."""

import threading
from collections import Counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense import metrics, names
from diffense.health import REQUEST_ID
from diffense.serving.verdicts import VerdictRows

LABEL_SERIES: Final = 100  # classes with series of their own, per process; a thousand classes would swamp Prometheus
OTHER_LABEL: Final = "other"
HEALTH_LABEL: Final = "health"  # in the place of a class, and of a reason
EVERY_S: Final = 0.25  # of served models; Prometheus asks every few seconds

Series = tuple[metrics.Metric, str]
"""A family and the value of its second label."""


class Meter:
    """The metric families of one served model.

    The first `LABEL_SERIES` predicted classes that come along are counted apart, all later ones as ``other``.

    Every figure is a message to the server, some two an image, which would stand between an answer and its client: with
    ``every_s`` they are sent from a thread of their own, and sums take the place of single ones.

    Args:
        backend: the server's module.
        model: name of the production model, a label of every series.
        every_s: seconds between the messages; 0 sends them at once.
    """

    def __init__(self, backend: Any, model: str, every_s: float = 0.0) -> None:
        self._backend, self._model = backend, model
        kinds = {"counter": backend.MetricFamily.COUNTER, "histogram": backend.MetricFamily.HISTOGRAM}
        # Kept for as long as the model lives: the series vanish with their family object.
        self._families = {
            metric: backend.MetricFamily(metric.name, metric.description, kinds[metric.kind]) for metric in metrics.FAMILIES
        }
        self._series: dict[Series, Any] = {}
        self._classes: set[int] = set()
        self._totals: Counter[Series] = Counter()
        self._observed: list[tuple[Series, float]] = []
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if every_s:
            self._thread = threading.Thread(target=self._send_often, args=(every_s,), daemon=True)
            self._thread.start()

    def count(self, verdicts: VerdictRows, labels: NDArray[np.int64], request_id: str = "") -> None:
        """Count the verdicts of one request; ``labels`` (N,) are the predicted classes.

        What bears the health check's id is counted under a label of its own, and not left out: anybody can send it.
        """
        health = request_id == REQUEST_ID
        with self._lock:
            for label, score, flagged in zip(labels.tolist(), verdicts.scores, verdicts.flagged, strict=True):
                if flagged == names.UNSCORED:
                    continue
                name = HEALTH_LABEL if health else self._name_class(label)
                self._totals[metrics.SCORED, name] += 1
                self._observed.append(((metrics.SCORE, name), float(score)))
                if flagged == names.FLAGGED_YES:
                    self._totals[metrics.FLAGGED, name] += 1
            for reason in filter(None, verdicts.reasons):
                self._totals[metrics.UNSCORED, HEALTH_LABEL if health else reason] += 1
        self._note()

    def count_unscored(self, reason: str, images: int, request_id: str = "") -> None:
        """Count images without a verdict."""
        with self._lock:
            self._totals[metrics.UNSCORED, HEALTH_LABEL if request_id == REQUEST_ID else reason] += images
        self._note()

    def observe_time(self, seconds: float) -> None:
        """Note how long one batch took."""
        with self._lock:
            self._observed.append(((metrics.SCORING_SECONDS, ""), seconds))
        self._note()

    def send(self) -> None:
        """Tell the server what has come together, from any thread; what it does not take is lost, and the answer is not."""
        with self._lock:
            totals, self._totals = self._totals, Counter()
            observed, self._observed = self._observed, []
        with self._sending:
            for series, total in totals.items():
                self._tell(series, "increment", total)
            for series, value in observed:
                self._tell(series, "observe", value)

    def close(self) -> None:
        """Stop the thread; the server has no use for what is left, since the series end with the model."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _note(self) -> None:
        if self._thread is None:
            self.send()

    def _send_often(self, every_s: float) -> None:
        while not self._stopped.wait(every_s):
            self.send()

    def _tell(self, series: Series, verb: str, value: float) -> None:
        try:
            getattr(self._find(series), verb)(value)
        except Exception as error:
            self._backend.Logger.log_error(f"{series[0].name} of {self._model} was not counted: {error!r}")

    def _name_class(self, label: int) -> str:
        if len(self._classes) < LABEL_SERIES:
            self._classes.add(label)
        return str(label) if label in self._classes else OTHER_LABEL

    def _find(self, series: Series) -> Any:
        if series not in self._series:
            metric, second = series
            labels = dict(zip(metric.labels, (self._model, second), strict=False))
            buckets = {"buckets": list(metric.buckets)} if metric.kind == "histogram" else {}
            self._series[series] = self._families[metric].Metric(labels=labels, **buckets)
        return self._series[series]
