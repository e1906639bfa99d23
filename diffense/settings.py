"""How a guard is fitted: the settings and their defaults."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffense.calibration import check_rate
from diffense.errors import OptionError


@dataclass(frozen=True)
class FitSettings:
    """How a guard is fitted.

    Attributes:
        alpha: false-alarm rate that is asked for.
        network: whether the learned part is used; ``auto`` asks held-out clean latents.
        guide: by predicted label, or by logits where clean images per class are few.
        seed: of the split, the copies, the noise bank and the training.
        chain_sigma: noise at which the shallower taps are seen.
        sigmas: noise levels of the inspected tap; one number a level, or a row of one number a tap.
        steps: denoiser calls in sequence.
        draws: noises a level, even.
        label_guidance: w; 1 is the conditional denoiser.
        data_guidance: pull towards the inspected innovation at each step; 0 is none.
        training_steps: most steps of the denoiser's training; it stops early on held-out clean latents.

    Raises:
        OptionError: a setting that makes no sense; sigmas wait for the taps (`spread_sigmas`).
    """

    alpha: float = 0.01
    network: Literal["auto", "on", "off"] = "auto"
    guide: Literal["auto", "label", "logits"] = "auto"
    seed: int = 0
    chain_sigma: float = 1.0
    sigmas: tuple[float | tuple[float, ...], ...] = (0.7,)
    steps: int = 1
    draws: int = 2
    label_guidance: float = 1.0
    data_guidance: float = 0.0
    training_steps: int = 1000

    def __post_init__(self) -> None:
        check_rate(self.alpha)
        rules = (
            ("network", self.network in ("auto", "on", "off"), "auto, on or off"),
            ("guide", self.guide in ("auto", "label", "logits"), "auto, label or logits"),
            ("seed", 0 <= self.seed < 2**63, "0 or more and below 2**63"),
            ("chain_sigma", 0 < self.chain_sigma < math.inf, "a number above 0"),
            ("steps", self.steps >= 1, "1 or more"),
            ("draws", self.draws >= 2 and self.draws % 2 == 0, "2 or more and even"),
            ("label_guidance", math.isfinite(self.label_guidance), "a finite number"),
            ("data_guidance", 0 <= self.data_guidance < math.inf, "a finite number, 0 or more"),
        )
        for name, fits, wanted in rules:
            if not fits:
                raise OptionError(f"{name} is {getattr(self, name)}, it must be {wanted}")


def ignore_progress(step: int, steps: int) -> None:
    """Show nothing."""


def spread_sigmas(sigmas: tuple[float | tuple[float, ...], ...], taps: int) -> NDArray[np.float64]:
    """Levels as given -> (L, K).

    Raises:
        OptionError: no level, a level that is not positive, or a row whose length is not the number of taps.
    """
    rows = [(level,) * taps if isinstance(level, int | float) else tuple(level) for level in sigmas]
    if not rows or any(len(row) != taps or not all(0 < level < math.inf for level in row) for row in rows):
        raise OptionError(f"sigmas {sigmas} must be positive, one a level, or {taps} (one a tap) a level")
    return np.array(rows, np.float64)
