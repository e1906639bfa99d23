"""What a latent is guided by: the predicted label and, beside it, how sure the target is of it.

A clean input that the target is not sure of lies between classes, and its latents do too; a guide of the label alone would
take that for an anomaly (docs/decisions/0003). Where clean images per class are few, the logits in few dimensions stand in
for the label. The guided mean is linear in the guide, ``guide @ slope + bias``, in both cases; so one formula serves both.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from diffense.surprise import Surprise, find_surprise, fit_surprise

Matrix = NDArray[np.float64]
Kind = Literal["label", "logits"]

LOGIT_DIRECTIONS: Final = 32  # enough for what logits say about a latent, few enough for a thousand images
FEWEST_PER_CLASS: Final = 5
LEAST_LOG: Final = -20.0
LEAST_PROBABILITY: Final = 1e-9  # float32 softmax outputs underflow to 0
MARGIN_RESOLUTION: Final = 1e-3  # nats; logits of one image differ by less between runtimes
FAR: Final = 1e9  # taken from the predicted label when the nearest other one is looked for


@dataclass(frozen=True)
class Guidance:
    """How labels and logits become a guided mean.

    Attributes:
        kind: ``label``: one-hot label, projected square roots of the probabilities, doubt; ``logits``: projected
            log-probabilities, doubt.
        projection: (C, P) from centred square roots, or log-probabilities, to P entries of the guide.
        centre: (C,) what they are centred by.
        doubt: of the negative margin, one piece.
        slope: (G, W) of the guided mean.
        bias: (W,) of the guided mean.
        means: (C, W) guided mean of each class.
        seen: (C,) whether the class occurs among the clean images, so that its mean means something.
    """

    kind: Kind
    projection: Matrix
    centre: Matrix
    doubt: Surprise
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


def fit_projection(view: Matrix, kind: Kind) -> tuple[Matrix, Matrix]:
    """Principal directions of what the target says of clean images: (n, C) -> (C, P), and the centre (C,).

    Log-probabilities get unit variance; square roots of probabilities keep theirs, of which most classes have next to none.
    """
    centre = view.mean(axis=0)
    _, values, directions = np.linalg.svd(view - centre, full_matrices=False)
    kept = min(LOGIT_DIRECTIONS, max(1, int(np.sum(values > 1e-6 * values[0]))), max(1, len(view) // 4))
    scale = values[:kept] / np.sqrt(len(view)) if kind == "logits" else np.ones(kept)
    return directions[:kept].T / np.maximum(scale, 1e-12), centre


def fit_guidance(latents: Matrix, logits: Matrix, kind: Kind, probabilities: bool, like: Guidance | None = None) -> Guidance:
    """Fit the guided mean on clean latents, each weighing ``exp(-doubt)``: the share of clean images less sure than it.

    What the target is not sure of lies between classes or is of another class, and a few such images move a mean
    (docs/decisions/0018).

    Args:
        latents: (n, W).
        logits: (n, C) the target's logits output.
        kind: which guide.
        probabilities: whether that output is already a softmax.
        like: take projection and doubt of this one, so that folds of one data set share their guide.
    """
    size, classes = latents.shape[1], logits.shape[1]
    hot = one_hot(logits)
    logs = normalise_logits(logits, probabilities, np)
    projection, centre = (like.projection, like.centre) if like else fit_projection(_view(logs, kind, np), kind)
    doubt = like.doubt if like else fit_surprise(-find_margin(logs, hot, np), MARGIN_RESOLUTION)
    none = np.zeros((0, size))
    bare = Guidance(kind, projection, centre, doubt, none, np.zeros(size), np.zeros((classes, size)), hot.any(axis=0))
    guide = guide_by(bare, logits, hot, probabilities, np)
    weights = np.exp(-guide[:, -1])
    weighted = hot * weights[:, None]
    overall = np.average(latents, axis=0, weights=weights)
    # Class means of latents and of the rest of the guide; the rest explains what is left of both (Frisch and Waugh 1933).
    if kind == "label":
        means = average_by_label(latents, weighted, overall)
        rest = guide[:, classes:]
        usual = average_by_label(rest, weighted, rest.mean(axis=0))
        slope = _fit_slope(rest - hot @ usual, latents - hot @ means, weights)
        return replace(bare, slope=np.concatenate([means - usual @ slope, slope]), means=means)
    centre_of_guide = np.average(guide, axis=0, weights=weights)
    slope = _fit_slope(guide - centre_of_guide, latents - overall, weights)
    bias = overall - centre_of_guide @ slope
    typical = average_by_label(guide, weighted, centre_of_guide)
    return replace(bare, slope=slope, bias=bias, means=typical @ slope + bias)


def _fit_slope(guide: Matrix, latents: Matrix, weights: Matrix) -> Matrix:
    # Ridge with one average observation's weight per direction: it only steadies small samples.
    weighted = guide * (weights / weights.mean())[:, None]
    return np.asarray(np.linalg.solve(weighted.T @ guide + np.eye(guide.shape[1]), weighted.T @ latents))


def average_by_label(rows: Matrix, hot: Matrix, overall: Matrix) -> Matrix:
    """(n, W) rows and (n, C) one-hot labels, times weights or not -> (C, W) class means; `overall` for classes without rows."""
    counts = hot.sum(axis=0)[:, None]
    return np.where(counts > 0, hot.T @ rows / np.where(counts > 0, counts, 1.0), overall)


def one_hot(logits: Matrix) -> Matrix:
    """(N, C) -> (N, C), one at the predicted label (the first of equal ones)."""
    hot = np.zeros_like(logits, dtype=np.float64)
    hot[np.arange(len(logits)), logits.argmax(axis=1)] = 1.0
    return hot


def find_margin(logs: Any, label: Any, xp: Any) -> Any:
    """(N, C) log-probabilities and one-hot label -> (N, 1), how far the predicted label is ahead of the next, in nats."""
    own = xp.sum(logs * label, axis=1)
    return xp.reshape(own - xp.amax(logs - FAR * label, axis=1), (-1, 1))


def guide_by(guidance: Guidance, logits: Any, label: Any, probabilities: bool, xp: Any) -> Any:
    """(N, C) logits and (N, C) one-hot label -> (N, G) guide; its last entry is the doubt.

    The doubt is ``-log p`` of the margin among clean images: 0 where the target is sure, the larger the less clean images it
    is less sure of.
    """
    logs = normalise_logits(logits, probabilities, xp)
    projected = (_view(logs, guidance.kind, xp) - guidance.centre) @ guidance.projection
    doubt = find_surprise(guidance.doubt, find_margin(logs, label, xp) * -1.0, xp)
    parts = [label, projected, doubt] if guidance.kind == "label" else [projected, doubt]
    return xp.concatenate(parts, axis=1)


def _view(logs: Any, kind: Kind, xp: Any) -> Any:
    return xp.exp(logs * 0.5) if kind == "label" else logs


def split_mean(guidance: Guidance, latents: Matrix, logits: Matrix, probabilities: bool) -> tuple[Matrix, Matrix]:
    """(n, W) latents and (n, C) logits -> (n, G) guide and (n, W) residual, the latents minus their guided mean."""
    guide = guide_by(guidance, logits, one_hot(logits), probabilities, np)
    return guide, latents - (guide @ guidance.slope + guidance.bias)
