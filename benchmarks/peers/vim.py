"""ViM: what lies outside the principal space of the penultimate features, against the logits."""

import numpy as np
from scipy.special import logsumexp

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, split


class Vim:
    """Wang et al., CVPR 2022, "ViM: out-of-distribution with virtual-logit matching".

    ``alpha ||R'(f - o)|| - logsumexp(logits)`` with ``o = -pinv(W) b`` of the head, R the directions outside the D principal
    ones of ``f - o`` on clean images, and alpha the mean largest logit over the mean residual. D is 1000 of 2048 features and
    more, 512 of 768 and more, else half. Penultimate features of the target itself: ViM needs the head's W and b, and the
    guard's latents keep only directions with usable variance, the null space that ViM lives on is gone from them.
    """

    name, title, cheap = "vim", "ViM", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Origin (F,), residual space (F, F - D) and alpha."""
        weight, bias = (p.detach().double().cpu().numpy() for p in (model.tapped.head.weight, model.tapped.head.bias))
        self.origin = -np.linalg.pinv(weight) @ bias
        centred = read_features(model, clean) - self.origin
        width = centred.shape[1]
        kept = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
        _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))  # rising
        self.outside = vectors[:, : width - kept]
        residual = np.linalg.norm(centred @ self.outside, axis=1).mean()
        self.alpha = float(clean.logits.max(axis=1).mean() / max(residual, 1e-12))

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """One forward pass an image, for the features."""
        centred = read_features(model, inspected) - self.origin
        residual = np.linalg.norm(centred @ self.outside, axis=1)
        return np.asarray(self.alpha * residual - logsumexp(inspected.logits.astype(np.float64), axis=1))


def read_features(model: Model, inspected: Inspected) -> Matrix:
    """Penultimate features, (N, F)."""
    parts = [model.activations(inspected.images[part])[0][-1] for part in split(len(inspected.images))]
    return np.concatenate(parts).astype(np.float64)
