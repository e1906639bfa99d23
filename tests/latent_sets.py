"""Made-up latents with known statistics, denoisers with random weights, and one run of a recorded graph."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffense.crossfit import LatentSet
from diffense.denoiser import CONSTANTS, init_weights
from diffense.graphs import open_session


def run_graph(model: ir.Model, **inputs: NDArray[Any]) -> NDArray[np.float32]:
    """The first output of a graph."""
    return open_session(model, threads=1).run(None, {k: np.asarray(v, np.float32) for k, v in inputs.items()})[0]


def draw_weights(taps: int, width: int, guide: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """A denoiser as after some training: no weight is zero, so that every path through the network counts."""
    rng = np.random.default_rng(seed)
    weights = init_weights(taps, width, guide, rng)
    for name in weights.keys() - CONSTANTS:
        weights[name] = weights[name] + (rng.standard_normal(weights[name].shape) * 0.1).astype(np.float32)
    return dict(sorted(weights.items()))


def draw_rows(
    rows: int, classes: int, taps: int, width: int, seed: int, spread: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latents (rows, taps * width) about class means, each tap leaning on the one before, and logits (rows, classes).

    Labels go round; `spread` makes the standard deviation depend on the label, which no Gaussian knows.
    """
    world, rng = np.random.default_rng(1000), np.random.default_rng(seed)
    means = world.normal(0, 1, (classes, taps, width))
    mixing = world.normal(0, 0.7 / np.sqrt(width), (taps, width, width))
    labels = np.arange(rows) % classes
    deviation = np.exp(spread * np.where(labels % 2, 1.0, -1.0))[:, None]
    latents = np.zeros((rows, taps, width))
    for tap in range(taps):
        own = rng.normal(0, 1, (rows, width)) * deviation
        latents[:, tap] = own if tap == 0 else latents[:, tap - 1] @ mixing[tap] + own
    latents += means[labels]
    logits = rng.normal(0, 0.5, (rows, classes)) + 6.0 * np.eye(classes)[labels]
    return latents.reshape(rows, taps * width), logits


def make_set(latents: NDArray[np.float64], logits: NDArray[np.float64], width: int, kind: Any = "label") -> LatentSet:
    """A set of originals without copies and without padding."""
    rows = len(latents)
    used = np.ones(latents.shape[1], bool)
    return LatentSet(latents, logits, np.arange(rows), rows, used, width, kind, probabilities=False, chain_sigma=0.3)
