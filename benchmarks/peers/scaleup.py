"""SCALE-UP: triggered predictions stay the same when all pixels are multiplied."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, standardise_by_class

FACTORS: Final = (3, 5, 7, 9, 11)


class ScaleUp:
    """Guo et al., ICLR 2023, "SCALE-UP: an efficient black-box input-level backdoor detection via analyzing scaled prediction
    consistency", data-limited form.

    ``SPC(x) = 1/5 sum_n [f(clip(n x, 0, 255)) = f(x)]``, n in 3, 5, 7, 9, 11, in pixel space; score ``(SPC - mu_c) / s_c`` with
    mean and deviation of clean images that the target puts in the predicted class c. Ties are left as they are.
    """

    name, title, cheap = "scaleup", "SCALE-UP", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Mean and deviation of clean consistency for each predicted class."""
        consistency = measure_consistency(model, clean)
        self.mean, self.deviation = standardise_by_class(consistency, clean.predicted, model.classes)

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """Five forward passes an image, besides the target's own."""
        label = inspected.predicted
        return np.asarray((measure_consistency(model, inspected) - self.mean[label]) / self.deviation[label])


class FreeScaleUp:
    """The data-free form of `ScaleUp`: the score is the consistency itself."""

    name, title, cheap = "scaleup_free", "SCALE-UP, data-free", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Nothing: it takes no clean images."""
        del model, clean, labels

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """Five forward passes an image, besides the target's own."""
        return measure_consistency(model, inspected)


def multiply(images: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Saturating product."""
    return np.minimum(images.astype(np.uint16) * factor, 255).astype(np.uint8)


def measure_consistency(model: Model, inspected: Inspected) -> Matrix:
    """(N,) share of factors that leave the label as it is, on a grid of six values."""
    same = np.zeros(len(inspected.images))
    for factor in FACTORS:
        same += model.predict(multiply(inspected.images, factor)).argmax(axis=1) == inspected.predicted
    return same / len(FACTORS)
