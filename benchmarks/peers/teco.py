"""TeCo: corruptions of different kinds break a triggered prediction at very different strengths."""

from typing import Final

import numpy as np

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, split
from benchmarks.peers.corruptions import CORRUPTIONS, SEVERITIES

CHUNK: Final = 256


class TeCo:
    """Liu et al., CVPR 2023, "Detecting backdoors during the inference stage based on corruption robustness consistency".

    For each of 15 corruptions, ``l_k`` = the first of five severities at which the label changes, 6 if none; the score is the
    population standard deviation of l over the corruptions. Each severity is applied to the input itself, as in the paper
    (BackdoorBench's copy applies them on top of each other). Once the label has changed, higher severities need no pass.
    """

    name, title, cheap = "teco", "TeCo", False

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Nothing to learn; the threshold is set by whoever uses the score."""

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """At most 75 forward passes an image, besides the target's own."""
        first = np.full((len(inspected.images), len(CORRUPTIONS)), SEVERITIES + 1.0)
        for part in split(len(first), CHUNK):
            for column, corrupt in enumerate(CORRUPTIONS.values()):
                rows = np.arange(len(first))[part]
                for severity in range(1, SEVERITIES + 1):
                    labels = model.predict(corrupt(inspected.images[rows], severity)).argmax(axis=1)
                    changed = labels != inspected.predicted[rows]
                    first[rows[changed], column] = severity
                    rows = rows[~changed]
                    if not rows.size:
                        break
        return np.asarray(first.std(axis=1))
