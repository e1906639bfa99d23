"""MSP: how unsure the target is, the null model of every comparison."""

import numpy as np
from scipy.special import logsumexp

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, pick


class Msp:
    """Hendrycks and Gimpel, ICLR 2017, "A baseline for detecting misclassified and out-of-distribution examples".

    Score ``log(1 - max_c p_c)``, which orders inputs as ``-max_c p_c`` does, without the ties of probabilities that round to 1.
    Triggered inputs are often MORE confident than clean ones: an AUROC below one half is what this peer is there to show.
    """

    name, title, cheap = "msp", "MSP", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Nothing to learn."""

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """No forward pass besides the target's own."""
        logits = inspected.logits.astype(np.float64)
        others = logits.copy()
        np.put_along_axis(others, inspected.predicted[:, None], -np.inf, axis=1)
        top = pick(logits, inspected.predicted)
        rest = np.asarray(logsumexp(others, axis=1))
        return np.asarray(rest - np.logaddexp(rest, top))
