"""The figures of a measurement, whoever took it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from diffense.errors import BenchError


@dataclass(frozen=True)
class Statistics:
    """Latency and throughput of one model under one load.

    Attributes:
        p50_ms, p95_ms, p99_ms: quantiles of a request's latency, from sending to the whole answer.
        throughput: images a second.
        requests: answered requests that were counted.
        rejected: requests that the server refused as too many (UNAVAILABLE, 503); not part of the latencies.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float
    requests: int
    rejected: int = 0


def summarise(latencies_s: Sequence[float], span_s: float, batch: int, rejected: int = 0) -> Statistics:
    """Make the figures of requests of `batch` images each that were answered within `span_s` seconds.

    Raises:
        BenchError: none was.
    """
    if not latencies_s:
        raise BenchError(f"no request was answered within {span_s:.1f} s; measure longer, or with fewer images a request")
    p50, p95, p99 = np.quantile(np.asarray(latencies_s, np.float64) * 1e3, (0.5, 0.95, 0.99))
    throughput = len(latencies_s) * batch / span_s
    return Statistics(float(p50), float(p95), float(p99), throughput, len(latencies_s), rejected)


def combine(parts: Sequence[Statistics]) -> Statistics:
    """Several rounds as one: the median of each figure, the sum of the counts."""
    rows = [asdict(part) for part in parts]
    figures = {name: float(np.median([row[name] for row in rows])) for name in ("p50_ms", "p95_ms", "p99_ms", "throughput")}
    return Statistics(**figures, requests=sum(p.requests for p in parts), rejected=sum(p.rejected for p in parts))
