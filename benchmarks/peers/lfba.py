"""LFBA: cosine to the class centroid where the layers turn from input to label."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, split, standardise_by_class
from diffense.chain import assign_folds
from diffense.crossfit import FOLDS

LAYERS: Final = 3  # the critical one and the two before
SEED: Final = 0


class Lfba:
    """Jebreel et al., PAKDD 2023, "Defending against backdoor attacks by layer-wise feature analysis".

    Per layer the cosine of the flattened features to the centroid of the predicted class; the class's critical layer is the one
    after the largest rise of the clean mean cosine in the second half of the network. Sum over it and the two before, each
    times the rise behind it (the last layer, which has none: the rise into it; falls count nothing). The paper flags below
    ``mean - 2.5 std`` of its class, so the score is ``(mean - sum) / std``. Clean cosines are measured against
    centroids of the other four fifths of the rows; centroids come from rows that the target classifies right.
    """

    name, title, cheap = "lfba", "LFBA", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Centroids (C, D) of each layer, weights (C, L), mean and deviation (C,)."""
        label = clean.predicted
        right = label == labels
        right = right if right.any() else np.ones(len(right), bool)
        folds = assign_folds(label, FOLDS, np.random.default_rng(SEED))
        sums, counts = sum_features(model, clean, np.where(right, label, -1), folds)
        whole = counts.sum(axis=0)
        cosines = np.empty((len(label), len(sums)))
        alone = whole[label] == counts[folds, label]  # all that its class has is in its own fold
        for part in split(len(label)):
            layers, _ = model.activations(clean.images[part])
            own, other = label[part], folds[part]
            for column, (features, total) in enumerate(zip(layers, sums, strict=True)):
                cosines[part, column] = cosine(flatten(features), total.sum(axis=0)[own] - total[other, own])
        if not alone.all():
            cosines[alone] = cosines[~alone].mean(axis=0)  # a class with one image says nothing about its own spread
        self.centroids = [total.sum(axis=0) for total in sums]  # a sum has a mean's direction
        self.weights = weigh_layers(cosines, label, model.classes)
        self.mean, self.deviation = standardise_by_class(np.sum(cosines * self.weights[label], axis=1), label, model.classes)

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """One forward pass an image."""
        sums = np.zeros(len(inspected.images))
        for part in split(len(sums)):
            own = inspected.predicted[part]
            layers, _ = model.activations(inspected.images[part])
            for column, (features, centroid) in enumerate(zip(layers, self.centroids, strict=True)):
                if self.weights[:, column].any():
                    sums[part] += cosine(flatten(features), centroid[own]) * self.weights[own, column]
        label = inspected.predicted
        return np.asarray((self.mean[label] - sums) / self.deviation[label])


def flatten(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, ...) -> (N, D)."""
    return features.reshape(len(features), -1)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> Matrix:
    """Cosine of each row of a with the same row of b, (N, D) twice -> (N,); zero where a row is."""
    product = np.einsum("nd,nd->n", a, b, dtype=np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", a, a, dtype=np.float64) * np.einsum("nd,nd->n", b, b, dtype=np.float64))
    return np.asarray(product / np.maximum(lengths, 1e-30))


def sum_features(
    model: Model, clean: Inspected, labels: Labels, folds: NDArray[np.int64]
) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
    """Sums of each layer's features by fold and class, (folds, C, D) each, and counts (folds, C); label -1 counts nowhere."""
    sums: list[NDArray[np.float32]] = []
    counts = np.zeros((FOLDS, model.classes), np.int64)
    kept = labels >= 0
    np.add.at(counts, (folds[kept], labels[kept]), 1)
    for part in split(len(labels)):
        layers, _ = model.activations(clean.images[part])
        sums = sums or [np.zeros((FOLDS, model.classes, a[0].size), np.float32) for a in layers]
        cells = folds[part] * model.classes + labels[part]
        hot = np.zeros((FOLDS * model.classes, len(cells)), np.float32)
        hot[cells[kept[part]], np.flatnonzero(kept[part])] = 1.0
        for total, features in zip(sums, layers, strict=True):
            total += (hot @ flatten(features)).reshape(total.shape)
    return sums, counts


def weigh_layers(cosines: Matrix, labels: Labels, classes: int) -> Matrix:
    """Weight of each layer for each class, (n, L), (n,) -> (C, L); a class without clean images takes the means of all."""
    layers = cosines.shape[1]
    weights = np.zeros((classes, layers))
    for label in range(classes):
        rows = labels == label
        rise = np.diff(cosines[rows if rows.any() else slice(None)].mean(axis=0))
        if not rise.size:
            weights[label] = 1.0
            continue
        half = min(layers // 2, layers - 2)
        critical = half + int(rise[half:].argmax()) + 1
        behind = np.append(rise, rise[-1])
        low = max(0, critical - LAYERS + 1)
        weights[label, low : critical + 1] = np.maximum(behind[low : critical + 1], 0.0)
        if not weights[label].any():  # no layer is nearer to its centroid than the one before: count them alike
            weights[label, low : critical + 1] = 1.0
    return weights
