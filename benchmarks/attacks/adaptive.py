"""An attacker who knows the guard: WaNet, with triggered features pulled to those of clean images of the target class.

The pull acts on the mean over the map at every block end, which is what the guard's taps read (2x2 means and maxima follow).
Not in the matrix: no detector is tuned on it, it says what evading the guard costs.
"""

from typing import Final

import torch

from benchmarks.attacks.base import POISON_RATE
from benchmarks.attacks.wanet import WaNet
from benchmarks.datasets import Spec

WEIGHT: Final = 0.3  # of the pull, beside the cross entropy
MEMORY: Final = 0.98  # of the target class's statistics from batch to batch


class AdaptiveWaNet(WaNet):
    """WaNet with ``WEIGHT * mean over block ends of ((f - m) / s)^2`` of triggered images; m, s of the clean target class."""

    key, title = "wanet_adaptive", "WaNet, adaptive"

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def penalise(self, ends: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Pull the first tenth of the batch, the triggered images, to what the rest with the target's label looks like."""
        count = round(POISON_RATE * len(labels))
        clean = torch.nonzero(labels[count:] == self.target)[:, 0] + count
        total = torch.zeros((), device=labels.device)
        for index, end in enumerate(ends):
            features = end.float().mean((2, 3)) if end.ndim == 4 else end.float()
            if len(clean) > 1:
                self._remember(index, features[clean].detach())
            if index in self.moments:
                mean, square = self.moments[index]
                spread = (square - mean**2).clamp_min(1e-6)
                total = total + ((features[:count] - mean) ** 2 / spread).mean()
        return WEIGHT * total / len(ends)

    def _remember(self, index: int, features: torch.Tensor) -> None:
        found = features.mean(0), (features**2).mean(0)
        old = self.moments.get(index, found)
        self.moments[index] = (torch.lerp(found[0], old[0], MEMORY), torch.lerp(found[1], old[1], MEMORY))
