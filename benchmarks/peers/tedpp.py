"""TED++: TED that also asks whether the nearest clean image of the predicted class is near enough."""

import math
from typing import Final

import numpy as np

from benchmarks.peers.ted import Ted
from benchmarks.peers.trajectories import Bank

SHARE: Final = 0.5  # alpha of the released code


class TedPlusPlus(Ted):
    """Le et al., ICDM 2025, "TED++: submanifold-aware backdoor detection via layerwise tubular-neighbourhood screening".

    As TED, but where the input is further from the nearest row of its predicted class than that row's tube radius, ``K_l`` is
    the last rank. Radius of a row at a layer: its distance to the m-th nearest other row of its class, m half of the class
    (rounded up). A row alone in its class has the median radius of the layer.
    """

    name, title, cheap = "tedpp", "TED++", True

    def restrict(self, bank: Bank) -> None:
        """Measure the radii, (L, n)."""
        for layer, features in enumerate(bank.layers):
            distance = bank.measure(layer, features)
            np.fill_diagonal(distance, np.inf)
            radii = np.full(len(distance), np.nan)
            for label in np.unique(bank.labels):
                rows = np.flatnonzero(bank.labels == label)
                if len(rows) > 1:
                    nth = min(math.ceil(SHARE * len(rows)), len(rows) - 1) - 1
                    radii[rows] = np.partition(distance[np.ix_(rows, rows)], nth, axis=1)[:, nth]
            known = radii[~np.isnan(radii)]
            bank.radii[layer] = np.where(np.isnan(radii), np.median(known) if known.size else np.inf, radii)
