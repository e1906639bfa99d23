"""Where the time of guarded requests goes, by Triton's own statistics."""

from collections.abc import Sequence
from typing import Any, Final

import tritonclient.grpc as grpc

from diffense.bench.comparison import Measure
from diffense.bench.load import Load
from diffense.bench.statistics import Statistics
from diffense_client._core import Request

PARTS: Final = ("queue", "compute_input", "compute_infer", "compute_output")
Counts = dict[str, dict[str, float]]


class Breakdown:
    """Sums the statistics of every model over the measurements of one of them.

    Args:
        address: gRPC endpoint of the server.
        guarded: the model whose measurements count.
        measure: what measures.
    """

    def __init__(self, address: str, guarded: str, measure: Measure) -> None:
        self.address, self.guarded, self.inner = address, guarded, measure
        self.totals: Counts = {}

    def measure(self, load: Load, requests: Sequence[Request]) -> Statistics:
        """Measure, and note what the models did meanwhile."""
        before = read_counts(self.address)
        found = self.inner(load, requests)
        if requests[0].model == self.guarded:
            for model, counts in read_counts(self.address).items():
                own = self.totals.setdefault(model, dict.fromkeys(counts, 0.0))
                for name, value in counts.items():
                    own[name] += value - before.get(model, {}).get(name, 0.0)
        return found

    def average(self) -> Counts:
        """Model -> milliseconds a request spent in each part there, on average; models that were not asked are left out.

        The ensemble's and the gateway's own times hold those of the models behind them.
        """
        return {
            model: {part: round(counts[part] / counts["requests"] / 1e6, 4) for part in PARTS}
            for model, counts in self.totals.items()
            if counts["requests"] > 0
        }


def read_counts(address: str) -> Counts:
    """Model -> requests and nanoseconds so far."""
    with grpc.InferenceServerClient(address) as client:
        statistics: dict[str, Any] = client.get_inference_statistics(as_json=True)
    found: Counts = {}
    for entry in statistics["model_stats"]:
        told = entry.get("inference_stats", {})
        counts = {part: float(told.get(part, {}).get("ns", 0)) for part in PARTS}
        found[entry["name"]] = counts | {"requests": float(told.get("success", {}).get("count", 0))}
    return found
