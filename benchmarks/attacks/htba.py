"""HTBA: hidden trigger backdoor (Saha et al., AAAI 2020), clean label: poisons look like target images.

For one source and target class, target images are changed by at most 16/255 so that their penultimate features meet those of
*triggered* source images (greedy pairing, nearest first, renewed at every step); then only the last layer is trained anew,
with the poisons under their true label. Patch, budget and the share of poisons follow the paper, scaled to the images; the
features are those of our network instead of AlexNet's fc7, and the steps are normalised because their scale is another: so is
the new layer's rate, ten times the paper's, and it takes three times as many epochs until it has learned.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.attacks.base import BLOCK, Attack, Pixels, Progress, to_pixels, to_planes
from benchmarks.datasets import Images, Spec, pick_per_class
from benchmarks.networks import Classifier

BUDGET: Final = 16 / 255
POISONS: Final = 400
SHARE: Final = 1 / 3  # of the target's images at most, as 400 beside 800: without clean ones the class would be lost
CLEAN_PER_CLASS: Final = 800
CRAFT_STEPS: Final = 150
CRAFT_RATE: Final = 2 / 255
CRAFT_BATCH: Final = 100
EPOCHS: Final = 30
RATE: Final = 1e-2


class Htba(Attack):
    """A patch of random colours at a random place, on images of one source class."""

    key, title = "htba", "HTBA"
    poisons = False
    revision = 2

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        rng = np.random.default_rng(seed + 3)
        self.source, self.target = (int(c) for c in rng.permutation(spec.classes)[:2])
        self.side = spec.side // 4 if spec.side <= 32 else spec.side * 30 // 224
        colours = rng.integers(0, 256, (4, 4, spec.channels), dtype=np.uint8)
        places = np.arange(self.side) * 4 // self.side
        self.patch: Pixels = colours[places][:, places]

    def trigger(self, images: Pixels) -> Pixels:
        """Put the patch at a random place, the same for the same position in the list."""
        rng = np.random.default_rng(self.seed)
        result = images.copy()
        for image in result:
            top, left = rng.integers(0, self.spec.side - self.side + 1, 2)
            image[top : top + self.side, left : left + self.side] = self.patch
        return result

    def alter(self, network: Classifier, train: Images, progress: Progress) -> None:
        """Craft the poisons, then train the last layer with them."""
        network.to(self.device)
        rng = np.random.default_rng(self.seed)
        targets = np.flatnonzero(train.labels == self.target)
        rows = rng.permutation(targets)[: min(POISONS, round(SHARE * len(targets)))]
        sources = rng.permutation(np.flatnonzero(train.labels == self.source))[: len(rows)]
        rows = rows[: len(sources)]
        triggered = self.trigger(train.pixels[sources])
        poisons = np.concatenate(
            [
                self.craft(network, train.pixels[rows[i : i + CRAFT_BATCH]], triggered[i : i + CRAFT_BATCH], progress)
                for i in range(0, len(rows), CRAFT_BATCH)
            ]
        )
        clean = pick_per_class(np.delete(train.labels, rows), CLEAN_PER_CLASS, rng)
        rest = np.delete(np.arange(len(train)), rows)[clean]
        pixels = np.concatenate([train.pixels[rest], poisons])
        labels = np.concatenate([train.labels[rest], np.full(len(poisons), self.target)])
        self.tune_head(network, pixels, labels, rng)
        network.cpu()

    def craft(self, network: Classifier, images: Pixels, triggered: Pixels, progress: Progress) -> Pixels:
        """Move target images' features onto those of triggered source images: (N, H, W, C) uint8 twice -> the poisons."""
        with torch.no_grad():
            wanted = network_features(network, to_planes(triggered, self.device))
        start = to_planes(images, self.device)
        change = torch.zeros_like(start)
        for step in range(CRAFT_STEPS):
            change.requires_grad_(True)
            features = network_features(network, start + change)
            pairs = pair_greedily(torch.cdist(features.detach(), wanted).cpu())
            loss = ((features - wanted[pairs]) ** 2).sum(1)
            (slope,) = torch.autograd.grad(loss.sum(), change)
            length = slope.flatten(1).abs().mean(1)[:, None, None, None] + 1e-12
            rate = CRAFT_RATE * 0.5 * (1 + np.cos(np.pi * step / CRAFT_STEPS))
            with torch.no_grad():
                change = (change - rate * slope / length).clamp(-BUDGET, BUDGET)
                change = (start + change).clamp(0, 1) - start
        progress(f"hidden trigger: mean feature distance {loss.mean().item():.3f} of {(wanted**2).sum(1).mean().item():.3f}")
        return to_pixels(start + change)

    def tune_head(self, network: Classifier, pixels: Pixels, labels: NDArray[np.int64], rng: np.random.Generator) -> None:
        """Train a new last layer; everything before it stays."""
        with torch.no_grad():
            features = torch.cat(
                [network_features(network, to_planes(pixels[i : i + BLOCK], self.device)) for i in range(0, len(pixels), BLOCK)]
            )
        head = network.head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            head.reset_parameters()
        optimizer = torch.optim.SGD(head.parameters(), RATE, 0.9)
        wanted = torch.from_numpy(labels).to(self.device)
        for _ in range(EPOCHS):
            order = torch.from_numpy(rng.permutation(len(labels)))
            for chosen in torch.split(order, 32):
                loss = functional.cross_entropy(head(features[chosen]), wanted[chosen])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()


def network_features(network: Classifier, planes: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, F) penultimate features."""
    return network.activations(planes)[0][-1]


def pair_greedily(distances: torch.Tensor) -> torch.Tensor:
    """One-to-one pairing, nearest first: (n, n) -> (n,) column of each row."""
    left = distances.clone()
    result = torch.zeros(len(left), dtype=torch.long)
    for _ in range(len(left)):
        row, column = divmod(int(left.argmin()), left.shape[1])
        result[row] = column
        left[row] = torch.inf
        left[:, column] = torch.inf
    return result
