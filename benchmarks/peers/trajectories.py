"""What TED and TED++ share: a bank of layer activations, and an outlier detector for trajectories of ranks."""

from typing import Final

import numpy as np
import torch
from torch import nn

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, split

PER_CLASS: Final = 20  # the papers' bank
ROWS: Final = 1000  # a larger bank where the defender has the images, up to this many rows
COMPONENTS: Final = 2


def choose_rows(predicted: Labels, labels: Labels, classes: int) -> Labels:
    """Indices of the bank: rightly classified rows, at most `ROWS` in all but never fewer than `PER_CLASS` a class."""
    right = predicted == labels
    right = right if right.any() else np.ones(len(right), bool)
    most = max(PER_CLASS, ROWS // classes)
    return np.concatenate([np.flatnonzero(right & (predicted == label))[:most] for label in range(classes)])


class Bank:
    """Activations of n clean images at every layer, the logits last.

    Attributes:
        layers: (n, D) float32 each, centred.
        labels: (n,) predicted.
        radii: (L, n) how far an input may be from a row of its class; infinite for TED.
    """

    def __init__(self, model: Model, clean: Inspected, rows: Labels) -> None:
        parts = [read_layers(model, clean, rows[part]) for part in split(len(rows))]
        layers = [torch.cat(arrays) for arrays in zip(*parts, strict=True)]
        self.centres = [layer.mean(dim=0) for layer in layers]  # differences of large numbers would cost digits
        self.layers = [layer - centre for layer, centre in zip(layers, self.centres, strict=True)]
        self.lengths = [torch.sum(layer**2, dim=1) for layer in self.layers]
        self.labels = clean.predicted[rows]
        self.radii = np.full((len(self.layers), len(rows)), np.inf)

    def measure(self, layer: int, features: torch.Tensor) -> Matrix:
        """Euclidean distances of centred features to the bank, (N, D) -> (N, n)."""
        squared = torch.sum(features**2, dim=1)[:, None] + self.lengths[layer] - 2.0 * (features @ self.layers[layer].T)
        return np.asarray(torch.sqrt(torch.relu(squared)).cpu().numpy(), np.float64)

    def rank(self, layer: int, distance: Matrix, labels: Labels) -> Matrix:
        """How many rows are nearer than the nearest of the label, (N, n), (N,) -> (N,); outside its radius the last rank."""
        own = np.where(labels[:, None] == self.labels, distance, np.inf)
        nearest = own.argmin(axis=1)
        away = own.min(axis=1)
        ranks = np.sum(distance < away[:, None], axis=1)
        last = len(self.labels) - 1
        outside = (away > self.radii[layer, nearest]) | np.isinf(away)
        return np.where(outside, last, np.minimum(ranks, last)).astype(np.float64)

    def follow(self, model: Model, inspected: Inspected) -> Matrix:
        """Trajectories of ranks, (N, L); one forward pass an image."""
        found = np.empty((len(inspected.images), len(self.layers)))
        for part in split(len(found)):
            rows = np.arange(len(found))[part]
            for layer, features in enumerate(read_layers(model, inspected, rows)):
                distance = self.measure(layer, features - self.centres[layer])
                found[part, layer] = self.rank(layer, distance, inspected.predicted[part])
        return found

    def follow_itself(self) -> Matrix:
        """Trajectories of the bank's own rows, each among the others, (n, L)."""
        found = np.empty((len(self.labels), len(self.layers)))
        for layer, features in enumerate(self.layers):
            distance = self.measure(layer, features)
            np.fill_diagonal(distance, np.inf)
            found[:, layer] = self.rank(layer, distance, self.labels)
        return found


def read_layers(model: Model, inspected: Inspected, rows: Labels) -> list[torch.Tensor]:
    """Flattened outputs of every layer for these rows, as they come, the logits last, on the model's device.

    A layer is what the released code of TED takes for one: a convolution that is not 1 x 1, a rectifier that is a module, a
    linear layer.
    """
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        found.append(output.float().flatten(1).clone())

    hooks = [module.register_forward_hook(keep) for module in model.network.modules() if is_layer(module)]
    try:
        model.predict(inspected.images[rows])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def is_layer(module: nn.Module) -> bool:
    """Whether TED follows what this module gives."""
    return isinstance(module, nn.Linear | nn.ReLU) or (isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))


class PcaOutliers:
    """Shyu et al., 2003, "A novel anomaly detection scheme based on principal component classifier", in pyod's form.

    Rows z-scored by clean statistics; score ``sum_j ||z - v_j|| / w_j`` over the two leading eigenvectors v of the clean
    covariance, w their share of the variance (largest entry of each v positive). That is pyod's arithmetic, used by TED.
    """

    def __init__(self, clean: Matrix) -> None:
        """Fit on (n, L) clean rows."""
        self.mean = clean.mean(axis=0)
        deviation = clean.std(axis=0)
        self.deviation = np.where(deviation > 0.0, deviation, 1.0)
        z = (clean - self.mean) / self.deviation
        values, vectors = np.linalg.eigh(z.T @ z / len(z))
        self.vectors = vectors.T[::-1][:COMPONENTS]
        largest = np.take_along_axis(self.vectors, np.abs(self.vectors).argmax(axis=1)[:, None], axis=1)
        self.vectors = self.vectors * np.where(largest < 0.0, -1.0, 1.0)
        self.shares = np.maximum(values[::-1][:COMPONENTS] / max(values.sum(), 1e-12), 1e-3)

    def score(self, rows: Matrix) -> Matrix:
        """(N, L) -> (N,)."""
        z = (rows - self.mean) / self.deviation
        away = np.linalg.norm(z[:, None, :] - self.vectors, axis=2)
        return np.asarray(np.sum(away / self.shares, axis=1))
