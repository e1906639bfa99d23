"""BaDExpert: a copy that forgot the task but not the backdoor, against a copy that forgot the backdoor."""

import copy
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn
from torch.nn import functional

from benchmarks.peers.base import WITH_BACKWARD, Inspected, Labels, Matrix, Model, pick

SEED: Final = 0
EXPERT_BATCH, EXPERT_RATE, EXPERT_ACCURACY = 128, 1e-4, 0.2
EXPERT_EPOCHS: Final = 20  # at most; the paper's single epoch is of 2,000 images, smaller sets need more
REPAIR_BATCH, REPAIR_RATE, REPAIR_EPOCHS = 64, 0.1, 10
REPAIR_MILESTONES: Final = (2, 4, 6, 8)
SHIFT: Final = 8  # the repaired copy sees crops moved by up to an eighth of the side
SMALL: Final = 1e-8


class BadExpert:
    """Xie et al., ICLR 2024, "BaDExpert: extracting backdoor functionality for accurate backdoor input detection".

    Expert: fine-tuned on clean images with wrong labels (the next one), Adam 1e-4, batches of 128, until at most 20 % of
    them are classified right. Repaired: fine-tuned on true labels, SGD 0.1 with Nesterov momentum 0.9 and weight decay 1e-4,
    ten epochs, a tenth after 2, 4, 6, 8. With x and y the probabilities that expert and repaired copy give to the label of
    the deployed target, LOW ``min(2y/x, (1-x)/(0.5-y))`` is suspicious (denominators at least 1e-8); the score is minus its
    logarithm. Needs true labels. No flips in the crops: digits and signs are not mirror symmetric.
    """

    name, title, cheap = "badexpert", "BaDExpert", False

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Fine-tune the two copies; the target is left as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.expert = extract_expert(model, clean.images, labels)
            self.repaired = repair(model, clean.images, labels)

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """Two forward passes an image, besides the target's own."""
        x, y = (
            pick(softmax(copied.predict(inspected.images).astype(np.float64), axis=1), inspected.predicted)
            for copied in (self.expert, self.repaired)
        )
        model.forwards += 2 * len(inspected.images)
        return judge(x, y)


def judge(x: Matrix, y: Matrix) -> Matrix:
    """Probabilities of expert and repaired copy -> score, (N,), (N,) -> (N,)."""
    low = np.minimum(2.0 * y / np.maximum(x, SMALL), (1.0 - x) / np.maximum(0.5 - y, SMALL))
    return np.asarray(-np.log(np.maximum(low, 1e-30)))


def extract_expert(model: Model, images: NDArray[np.uint8], labels: Labels) -> Model:
    """A copy trained on wrong labels until it has forgotten the right ones."""
    network = copy.deepcopy(model.network)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], EXPERT_RATE)
    expert = Model(network, model.classes)
    wrong = (labels + 1) % model.classes
    for _ in range(EXPERT_EPOCHS):
        train_epoch(model, network, optimizer, images, wrong, EXPERT_BATCH, moved=False)
        network.eval()
        if np.mean(expert.predict(images).argmax(axis=1) == labels) <= EXPERT_ACCURACY:
            break
    model.forwards += expert.forwards
    return expert


def repair(model: Model, images: NDArray[np.uint8], labels: Labels) -> Model:
    """A copy fine-tuned on clean images at a rate that shakes the backdoor off."""
    network = copy.deepcopy(model.network)
    optimizer = torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad], REPAIR_RATE, 0.9, weight_decay=1e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(REPAIR_MILESTONES), 0.1)
    for _ in range(REPAIR_EPOCHS):
        train_epoch(model, network, optimizer, images, labels, REPAIR_BATCH, moved=True)
        schedule.step()
    return Model(network, model.classes)


def train_epoch(
    model: Model,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: NDArray[np.uint8],
    labels: Labels,
    size: int,
    moved: bool,
) -> None:
    """One pass over the images in random order; its cost is counted on `model`."""
    network.train()
    for rows in shuffle(len(images), size):
        pixels = model.load(images[rows])
        truth = torch.from_numpy(labels[rows]).to(pixels.device)
        loss = functional.cross_entropy(network(move(pixels) if moved else pixels), truth)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        model.forwards += WITH_BACKWARD * len(rows)


def shuffle(count: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Batches of rows in random order; a last batch of one joins the one before, as batch norm needs two."""
    order = torch.randperm(count).numpy()
    batches = np.array_split(order, max(1, min(-(-count // size), count // 2)))
    return iter(batches)


def move(pixels: torch.Tensor) -> torch.Tensor:
    """A random crop of the reflected batch, (N, channels, H, W) -> the same."""
    height, width = pixels.shape[2:]
    pad = max(1, height // SHIFT)
    top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
    return functional.pad(pixels, (pad,) * 4, mode="reflect")[:, :, top : top + height, left : left + width]
