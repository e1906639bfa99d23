"""Training of a target, the way its attacker does it: one short one-cycle run, poisons redrawn in every batch."""

import time
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks.attacks.base import Attack, Pixels, Progress, to_planes
from benchmarks.datasets import Images, Spec
from benchmarks.networks import NETWORKS, Classifier
from benchmarks.precision import mix_precision, to_channels_last

LARGE: Final = 20000  # training images from which batches are large
WEIGHT_DECAY: Final = 5e-4
SMOOTHING: Final = 0.1
SGD_RATE: Final = 0.4  # at 512 images a batch
ADAM_RATE: Final = 2e-3
ADAM_DECAY: Final = 0.05
WARM_UP: Final = 0.2
LIGHT: Final = 0.4
BLOCK: Final = 500


def train_target(spec: Spec, network_name: str, attack: Attack, train: Images, seed: int, progress: Progress) -> Classifier:
    """Train a network on images that the attack poisons batch by batch.

    Args:
        spec: of the image set.
        network_name: one of `networks.NETWORKS`.
        attack: already prepared.
        train: the attacker's images.
        seed: of the weights, the batches and the augmentation.
        progress: told a line an epoch.

    Returns:
        The network in float32, evaluation mode, on the CPU.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[network_name](spec.channels, spec.classes, spec.side)
    with torch.no_grad():
        network.prepare(to_planes(train.pixels[rng.permutation(len(train))[:4000]]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    to_channels_last(network).to(device)
    size = 512 if len(train) >= LARGE else 128
    steps = spec.epochs * (len(train) // size)
    optimizer, peak = make_optimizer(network, size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False)
    pad = max(2, spec.side // 8)
    start, total = time.monotonic(), 0.0
    network.train()
    for step in range(steps):
        place = step % (steps // spec.epochs)
        if place == 0:
            order = rng.permutation(len(train))
        rows = order[place * size : (place + 1) * size]
        with mix_precision():
            batch = attack.poison(train.pixels[rows], train.labels[rows], rng)
            inputs = augment(batch.inputs, pad, spec.mirrored, rng)
            inputs = (light(inputs, rng) if spec.lit else inputs).to(device)
            logits = network(inputs)
            loss = functional.cross_entropy(logits, batch.labels.to(device), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss + batch.penalty.to(device))
        optimizer.step()
        attack.step((step + 1) / steps)
        schedule.step()
        total += loss.item()
        if place == steps // spec.epochs - 1:
            epoch = (step + 1) // (steps // spec.epochs)
            progress(f"epoch {epoch}/{spec.epochs}: loss {total / (place + 1):.3f}, {time.monotonic() - start:.0f} s")
            total = 0.0
    return network.cpu().eval()


def make_optimizer(network: nn.Module, size: int) -> tuple[torch.optim.Optimizer, float]:
    """SGD for networks with batch norm, AdamW for the others; and the peak rate."""
    trained = [p for p in network.parameters() if p.requires_grad]
    if any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        peak = SGD_RATE * size / 512
        return torch.optim.SGD(trained, peak, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True), peak
    return torch.optim.AdamW(trained, ADAM_RATE, weight_decay=ADAM_DECAY), ADAM_RATE


def augment(planes: torch.Tensor, pad: int, mirrored: bool, rng: np.random.Generator) -> torch.Tensor:
    """Shift (N, C, H, W) by whole pixels and mirror half of them; anything that interpolates would wipe out a warp."""
    count, _, height, width = planes.shape
    padded = functional.pad(planes, (pad, pad, pad, pad), mode="reflect").permute(0, 2, 3, 1)
    down, across = torch.from_numpy(rng.integers(0, 2 * pad + 1, (2, count, 1, 1)))
    rows, columns = down + torch.arange(height)[:, None], across + torch.arange(width)
    if mirrored:
        flips = torch.from_numpy(rng.random((count, 1, 1)) < 0.5)
        columns = torch.where(flips, columns.flip(-1), columns)
    return padded[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)


def light(planes: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change contrast and brightness of each image by up to 40 %; no pixel moves."""
    gain, shift = torch.from_numpy(rng.uniform(-LIGHT, LIGHT, (2, len(planes), 1, 1, 1)).astype(np.float32))
    centre = planes.mean((1, 2, 3), keepdim=True)
    lit: torch.Tensor = (planes - centre) * (1 + gain) + centre * (1 + shift)
    return lit


def predict(network: nn.Module, images: Pixels) -> NDArray[np.float32]:
    """(N, H, W, C) uint8 -> (N, classes) float32 logits."""
    with torch.no_grad():
        parts = [network(to_planes(images[i : i + BLOCK])) for i in range(0, len(images), BLOCK)]
    return np.asarray(torch.cat(parts).numpy(), np.float32)
