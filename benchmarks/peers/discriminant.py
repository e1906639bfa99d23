"""Linear discriminants of the guard's latents, one a tap: what each depth says about the predicted label."""

import numpy as np
from scipy.special import logsumexp

from benchmarks.peers.base import Labels, Matrix
from diffense.chain import shrink_covariance
from diffense.guidance import average_by_label, one_hot


class Discriminants:
    """``g_c(z) = m_c' S^-1 z - m_c' S^-1 m_c / 2 + log prior_c`` for each tap; posteriors are their softmax.

    Means and priors by predicted label, S the Ledoit-Wolf shrunk covariance within classes. A class without clean images is no
    rival to others; where it is the predicted one it has the mean of all and half an image's prior.
    """

    def __init__(self, latents: Matrix, logits: Matrix, width: int) -> None:
        """Fit on (n, K d) clean latents and (n, C) logits."""
        class_means = average_by_label(latents, one_hot(logits), latents.mean(axis=0))
        labels = logits.argmax(axis=1)
        counts = np.bincount(labels, minlength=logits.shape[1])
        residual = latents - class_means[labels]
        self.width, self.seen = width, counts > 0
        self.slopes = np.zeros((latents.shape[1], logits.shape[1]))  # (K d, C), tap by tap
        self.offsets = np.tile(np.log(np.maximum(counts, 0.5) / len(latents)), (latents.shape[1] // width, 1))  # (K, C)
        for tap in range(latents.shape[1] // width):
            used = np.flatnonzero(latents[:, tap * width : (tap + 1) * width].any(axis=0)) + tap * width
            if used.size:
                means = class_means[:, used]
                self.slopes[used] = np.linalg.solve(regularise(shrink_covariance(residual[:, used])), means.T)
                self.offsets[tap] -= np.sum(means.T * self.slopes[used], axis=0) / 2.0

    def surprise(self, latents: Matrix, labels: Labels) -> Matrix:
        """``-log p(label | tap)``, (N, K d), (N,) -> (N, K)."""
        z = latents.reshape(len(latents), -1, self.width)
        slopes = self.slopes.reshape(-1, self.width, self.slopes.shape[1])
        found = np.einsum("nkd,kdc->nkc", z, slopes, optimize=True) + self.offsets
        own = np.take_along_axis(found, labels[:, None, None], axis=2)[:, :, 0]
        found[:, :, ~self.seen] = -np.inf
        total = np.asarray(logsumexp(found, axis=2))
        total = np.where(self.seen[labels][:, None], total, np.logaddexp(total, own))
        return np.asarray(np.maximum(total - own, 0.0))


def regularise(covariance: Matrix) -> Matrix:
    """Add a trace's millionth, for classes with one image each, whose spread is zero."""
    ridge = 1e-6 * np.trace(covariance) / len(covariance) + 1e-12
    return np.asarray(covariance + ridge * np.eye(len(covariance)))
