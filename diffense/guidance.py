"""What a latent is guided by: the predicted label, or, where clean images per class are few, the logits in few dimensions.

The guided mean is linear in the guide, ``guide @ slope + bias``, in both cases; so one formula serves both.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Kind = Literal["label", "logits"]

LOGIT_DIRECTIONS: Final = 32  # enough for what logits say about a latent, few enough for a thousand images
FEWEST_PER_CLASS: Final = 5
LEAST_LOG: Final = -20.0
LEAST_PROBABILITY: Final = 1e-9  # float32 softmax outputs underflow to 0


@dataclass(frozen=True)
class Guidance:
    """How labels and logits become a guided mean.

    Attributes:
        kind: ``label``: the guide is the one-hot label (G = classes); ``logits``: G projected log-probabilities.
        projection: (C, G) from centred log-probabilities to the guide; only for ``logits``.
        centre: (C,) mean log-probabilities; only for ``logits``.
        slope: (G, W) of the guided mean.
        bias: (W,) of the guided mean.
        means: (C, W) guided mean of each class.
        seen: (C,) whether the class occurs among the clean images, so that its mean means something.
    """

    kind: Kind
    projection: Matrix
    centre: Matrix
    slope: Matrix
    bias: Matrix
    means: Matrix
    seen: NDArray[np.bool_]


def normalise_logits(logits: Any, probabilities: bool, xp: Any) -> Any:
    """(N, C) logits or probabilities -> log-probabilities, floored at -20 so that one sure class does not drown the rest."""
    if probabilities:
        return xp.maximum(xp.log(xp.maximum(logits, LEAST_PROBABILITY)), LEAST_LOG)
    shifted = logits - xp.reshape(xp.amax(logits, axis=1), (-1, 1))
    total = xp.reshape(xp.log(xp.sum(xp.exp(shifted), axis=1)), (-1, 1))
    return xp.maximum(shifted - total, LEAST_LOG)


def choose_kind(labels: NDArray[np.int64], classes: int) -> Kind:
    """Guide by label where every class has at least `FEWEST_PER_CLASS` clean images, else by logits."""
    return "label" if np.bincount(labels, minlength=classes).min() >= FEWEST_PER_CLASS else "logits"


def fit_projection(logs: Matrix) -> tuple[Matrix, Matrix]:
    """Principal directions of clean log-probabilities: (n, C) -> (C, G), for a guide of unit variance, and the centre (C,)."""
    centre = logs.mean(axis=0)
    _, values, directions = np.linalg.svd(logs - centre, full_matrices=False)
    kept = min(LOGIT_DIRECTIONS, int(np.sum(values > 1e-6 * values[0])), max(1, len(logs) // 4))
    return directions[:kept].T / (values[:kept] / np.sqrt(len(logs))), centre


def fit_guidance(latents: Matrix, logits: Matrix, kind: Kind, probabilities: bool, like: Guidance | None = None) -> Guidance:
    """Fit the guided mean on clean latents.

    Args:
        latents: (n, W).
        logits: (n, C) the target's logits output.
        kind: which guide.
        probabilities: whether that output is already a softmax.
        like: take the projection of this one, so that folds of one data set share their guide.
    """
    classes = logits.shape[1]
    labels = logits.argmax(axis=1)
    counts = np.bincount(labels, minlength=classes)
    overall = latents.mean(axis=0)
    if kind == "label":
        sums = np.zeros((classes, latents.shape[1]))
        np.add.at(sums, labels, latents)
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], overall)
        none = np.zeros((classes, 0))
        return Guidance(kind, none, np.zeros(classes), means, np.zeros(latents.shape[1]), means, counts > 0)
    logs = normalise_logits(logits, probabilities, np)
    projection, centre = (like.projection, like.centre) if like else fit_projection(logs)
    guide = (logs - centre) @ projection
    # Ridge with one observation's weight per direction: the guide has unit variance, so this only steadies small samples.
    slope = np.linalg.solve(guide.T @ guide + np.eye(guide.shape[1]), guide.T @ (latents - overall))
    typical = np.zeros((classes, guide.shape[1]))
    np.add.at(typical, labels, guide)
    typical /= np.maximum(counts, 1)[:, None]
    return Guidance(kind, projection, centre, slope, overall, typical @ slope + overall, counts > 0)


def one_hot(logits: Matrix) -> Matrix:
    """(N, C) -> (N, C), one at the predicted label (the first of equal ones)."""
    hot = np.zeros_like(logits, dtype=np.float64)
    hot[np.arange(len(logits)), logits.argmax(axis=1)] = 1.0
    return hot


def guide_by(guidance: Guidance, logits: Any, label: Any, probabilities: bool, xp: Any) -> Any:
    """(N, C) logits and (N, C) one-hot label -> (N, G) guide."""
    if guidance.kind == "label":
        return label
    return (normalise_logits(logits, probabilities, xp) - guidance.centre) @ guidance.projection


def split_mean(guidance: Guidance, latents: Matrix, logits: Matrix, probabilities: bool) -> tuple[Matrix, Matrix]:
    """(n, W) latents and (n, C) logits -> (n, G) guide and (n, W) residual, the latents minus their guided mean."""
    guide = guide_by(guidance, logits, one_hot(logits), probabilities, np)
    return guide, latents - (guide @ guidance.slope + guidance.bias)
