"""Beatrix: Gram matrices of a middle feature map outside the bands of their class."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.base import FEWEST, Inspected, Labels, Matrix, Model, split

POWERS: Final = range(1, 9)  # the released code's; the paper's text says 1 to 4
WIDTH: Final = 10.0  # of a band, in median absolute deviations
SMALL: Final = 1e-6  # the released code's, in the denominator of the excess


class Beatrix:
    """Ma et al., NDSS 2023, "The 'Beatrix' resurrections: robust backdoor detection via Gram matrices".

    ``G_p = sign (F^p F^p')^(1/p)`` of the input F of the last stage (channels x positions, powers by element), upper triangle,
    p = 1..8. Bands median +- 10 MAD of each entry by predicted class; score: mean over entries and powers of
    ``(low - g) / |low|`` below and ``(g - high) / |high|`` above the band. A class of fewer than five images borrows the MAD of
    all rows, an unseen one their median too. Medians need no cross-fit here: no fitted row is scored.
    """

    name, title, cheap = "beatrix", "Beatrix", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Bands of each power, class and entry: two float32 tensors (8, C, entries)."""
        features, self.layer = read_stage_input(model, clean)
        self.scale = float(np.sqrt(np.mean(features**2))) or 1.0  # keeps eighth powers within float32
        bands = []
        for power in POWERS:
            parts = [
                next(compute_grams(model, features[part] / self.scale, range(power, power + 1)))
                for part in split(len(features))
            ]
            grams = torch.cat(parts).cpu().numpy()
            bands.append(find_bands(grams, clean.predicted, model.classes))
        self.low, self.high = (torch.from_numpy(np.stack(ends)).to(model.device) for ends in zip(*bands, strict=True))

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """One forward pass an image, for the feature map."""
        scores = np.empty(len(inspected.images))
        for part in split(len(scores)):
            features = model.activations(inspected.images[part])[0][self.layer]
            flat = features.reshape(*features.shape[:2], -1) / self.scale
            label = torch.from_numpy(inspected.predicted[part]).to(model.device)
            total = torch.zeros(len(flat), dtype=torch.float64, device=model.device)
            for grams, lows, highs in zip(compute_grams(model, flat, POWERS), self.low, self.high, strict=True):
                low, high = lows[label], highs[label]
                excess = torch.relu(low - grams) / (low.abs() + SMALL) + torch.relu(grams - high) / (high.abs() + SMALL)
                total += excess.mean(dim=1, dtype=torch.float64)
            scores[part] = total.cpu().numpy() / len(POWERS)
        return scores


def find_stage_input(maps: list[NDArray[np.float32]]) -> int:
    """Index of the activation that enters the last stage: the last map whose shape is not the deepest map's."""
    shapes = [a.shape[1:] for a in maps if a.ndim == 4]
    return max((i for i, shape in enumerate(shapes) if shape != shapes[-1]), default=0)


def read_stage_input(model: Model, clean: Inspected) -> tuple[NDArray[np.float32], int]:
    """Input of the last stage as (n, channels, positions), and which activation it is."""
    parts, layer = [], 0
    for part in split(len(clean.images)):
        maps, _ = model.activations(clean.images[part])
        layer = find_stage_input(maps)
        parts.append(maps[layer].reshape(*maps[layer].shape[:2], -1))
    return np.concatenate(parts), layer


def compute_grams(model: Model, features: NDArray[np.float32], powers: range) -> Iterator[torch.Tensor]:
    """Signed roots of the Gram matrices' upper triangles, (n, c, m) -> for each power (n, c (c + 1) / 2)."""
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(model.device)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    for power in powers:
        raised = x**power
        gram = (raised @ raised.transpose(1, 2))[:, rows, columns]
        yield gram.sign() * gram.abs() ** (1.0 / power)


def find_bands(grams: NDArray[np.float32], labels: Labels, classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lower and upper end of the bands of each class, (n, entries) -> two (C, entries)."""
    middle = np.median(grams, axis=0)
    spread = np.median(np.abs(grams - middle), axis=0)
    medians, spreads = np.tile(middle, (classes, 1)), np.tile(spread, (classes, 1))
    for label in np.unique(labels):
        rows = grams[labels == label]
        medians[label] = np.median(rows, axis=0)
        if len(rows) >= FEWEST:
            spreads[label] = np.median(np.abs(rows - medians[label]), axis=0)
    low, high = medians - WIDTH * spreads, medians + WIDTH * spreads
    return low.astype(np.float32), high.astype(np.float32)
