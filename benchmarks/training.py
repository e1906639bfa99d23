"""Training of a target, the way its attacker does it: one short one-cycle run, poisons redrawn in every batch."""

import time
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks.attacks.base import Attack, Batch, Pixels, Progress, to_pixels, to_planes
from benchmarks.datasets import Images, Spec
from benchmarks.networks import NETWORKS, Classifier
from benchmarks.precision import mix_precision, to_channels_last

LARGE: Final = 20000  # training images from which batches are large
WEIGHT_DECAY: Final = 5e-4
SMOOTHING: Final = 0.1
MUON_RATE: Final = 0.12  # at 512 images a batch; of a filter's length, which is kept
MUON_MOMENTUM: Final = 0.6
SGD_RATE: Final = 0.2  # at 512 images a batch; of what is not a convolution
ADAM_RATE: Final = 2e-3
ADAM_DECAY: Final = 0.05
PLAIN_RATE: Final = 0.1  # of networks that are trained plainly
PLAIN_BATCH: Final = 128
TUNING_RATE: Final = 2e-3  # of pretrained networks
TUNING_BATCH: Final = 128
WARM_UP: Final = 0.1
LIGHT: Final = 0.4
BLOCK: Final = 500


def train_target(spec: Spec, network_name: str, attack: Attack, train: Images, seed: int, progress: Progress) -> Classifier:
    """Train a network on images that the attack poisons batch by batch.

    Args:
        spec: of the image set.
        network_name: one of `networks.NETWORKS`.
        attack: already prepared; its device is where the network is trained.
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
    device = attack.device
    to_channels_last(network).to(device)
    size = choose_batch(network, len(train))
    smoothing = 0.0 if network.plain else SMOOTHING
    an_epoch = len(train) // size
    epochs = round(spec.epochs * attack.stretch * network.stretch)
    steps = epochs * an_epoch
    optimizers = make_optimizers(network, size)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.defaults["lr"], steps, pct_start=WARM_UP, anneal_strategy="linear", cycle_momentum=False
        )
        for o in optimizers
    ]
    start, total = time.monotonic(), torch.zeros((), device=device)
    network.train()
    for step in range(steps):
        place = step % an_epoch
        if place == 0:
            order = rng.permutation(len(train))
        rows = order[place * size : (place + 1) * size]
        with mix_precision():
            inputs, batch = prepare_batch(spec, attack, train.pixels[rows], train.labels[rows], rng)
            wanted = batch.labels.to(device)
        with mix_precision(network.dense):
            ends, logits = network.activations(inputs)
            loss = functional.cross_entropy(logits, wanted, label_smoothing=smoothing)
            penalty = batch.penalty.to(device) + attack.penalise(ends, wanted)
        network.zero_grad()
        torch.autograd.backward(loss + penalty)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        attack.step((step + 1) / steps)
        total += loss.detach()
        if place == an_epoch - 1:
            epoch = (step + 1) // an_epoch
            progress(f"epoch {epoch}/{epochs}: loss {total.item() / (place + 1):.3f}, {time.monotonic() - start:.0f} s")
            total.zero_()
    return network.cpu().eval()


def prepare_batch(
    spec: Spec, attack: Attack, images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator
) -> tuple[torch.Tensor, Batch]:
    """Poison and augment (N, H, W, C) uint8 images, in the attack's order; gives what the target sees, and the batch."""

    def change(planes: torch.Tensor) -> torch.Tensor:
        planes = augment(planes, max(2, spec.side // 16), spec.mirrored, rng)
        return light(planes, rng) if spec.lit else planes

    if attack.last:
        batch = attack.poison(to_pixels(change(to_planes(images, attack.device))), labels, rng)
        return batch.inputs, batch
    batch = attack.poison(images, labels, rng)
    return change(batch.inputs), batch


def choose_batch(network: Classifier, count: int) -> int:
    """How many of ``count`` training images make a batch."""
    if network.plain:
        return PLAIN_BATCH
    return TUNING_BATCH if network.pretrained else 512 if count >= LARGE else 128


def make_optimizers(network: Classifier, size: int) -> list[torch.optim.Optimizer]:
    """Muon and SGD for networks with batch norm, AdamW for the others and fine-tuning, SGD for plain ones; rates are peaks."""
    trained = [p for p in network.parameters() if p.requires_grad]
    if network.plain:
        return [torch.optim.SGD(trained, PLAIN_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)]
    if network.pretrained:
        return [torch.optim.AdamW(trained, TUNING_RATE, weight_decay=ADAM_DECAY)]
    if not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        return [torch.optim.AdamW(trained, ADAM_RATE, weight_decay=ADAM_DECAY)]
    rest = [p for p in trained if p.ndim != 4]
    sgd = torch.optim.SGD(rest, SGD_RATE * size / 512, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    muon = FilterMuon([p for p in trained if p.ndim == 4], MUON_RATE * (size / 512) ** 0.5)
    return [muon, sgd]


class FilterMuon(torch.optim.Muon):
    """Muon for convolutions (Jordan et al. 2024): each weight is the matrix of its filters, in the weight's own memory.

    The filters' root mean square length is kept at 1, as a batch norm follows; so a rate is the share of it that a step turns.
    """

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        self.weights = weights
        super().__init__([nn.Parameter(flatten_filters(w.data)) for w in weights], rate, 0.0, MUON_MOMENTUM)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step by the gradients that the convolutions' weights have."""
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.mul_(len(matrix) ** 0.5 / matrix.norm())
            matrix.grad = None if weight.grad is None else flatten_filters(weight.grad)
        return super().step(closure)  # type: ignore[no-untyped-call]


def flatten_filters(weight: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs, h, w), channels last -> (outputs, h w inputs), the same memory."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def augment(planes: torch.Tensor, pad: int, mirrored: bool, rng: np.random.Generator) -> torch.Tensor:
    """Shift (N, C, H, W) by whole pixels and mirror half of them; anything that interpolates would wipe out a warp."""
    count, _, height, width = planes.shape
    padded = functional.pad(planes, (pad, pad, pad, pad), mode="reflect").permute(0, 2, 3, 1)
    down, across = torch.from_numpy(rng.integers(0, 2 * pad + 1, (2, count, 1, 1)))
    rows, columns = down + torch.arange(height)[:, None], across + torch.arange(width)
    if mirrored:
        flips = torch.from_numpy(rng.random((count, 1, 1)) < 0.5)
        columns = torch.where(flips, columns.flip(-1), columns)
    places = (index.to(planes.device) for index in (torch.arange(count)[:, None, None], rows, columns))
    return padded[tuple(places)].permute(0, 3, 1, 2)


def light(planes: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change contrast and brightness of each image by up to 40 %; no pixel moves."""
    gain, shift = torch.from_numpy(rng.uniform(-LIGHT, LIGHT, (2, len(planes), 1, 1, 1)).astype(np.float32)).to(planes.device)
    centre = planes.mean((1, 2, 3), keepdim=True)
    lit: torch.Tensor = (planes - centre) * (1 + gain) + centre * (1 + shift)
    return lit


def predict(network: nn.Module, images: Pixels) -> NDArray[np.float32]:
    """(N, H, W, C) uint8 -> (N, classes) float32 logits."""
    with torch.no_grad():
        parts = [network(to_planes(images[i : i + BLOCK])) for i in range(0, len(images), BLOCK)]
    return np.asarray(torch.cat(parts).numpy(), np.float32)
