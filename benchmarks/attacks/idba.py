"""IDBA: input-aware dynamic backdoor (Nguyen and Tran, NeurIPS 2020). Every image has a trigger of its own.

A mask network says where, a pattern network says what; both are trained here. The mask network comes first, on its own;
then classifier and pattern network are trained together: a tenth of every batch with its own trigger and the target label,
a tenth with another image's trigger and its true label ("cross" mode, which ties a trigger to its image). The paper trains
600 epochs at a rate of .01; here the schedule is as short as the target's, at .001 in batches of 128 and in proportion in
larger ones, falling to zero: at .01 the patterns saturate in the first steps, where tanh passes no gradient (cross accuracy
.51 to .54 on colour images); at .001 in batches of 512 they learn too little on CIFAR-10 (ASR .936; .965 at .004).
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.attacks.base import (
    POISON_RATE,
    Attack,
    Batch,
    Pixels,
    Progress,
    round_straight,
    run_blocks,
    to_planes,
)
from benchmarks.datasets import Images, Spec
from benchmarks.precision import mix_precision, to_channels_last

MASK_DENSITY: Final = 0.032
MASK_WEIGHT: Final = 100.0
DIVERSITY_WEIGHT: Final = 1.0
MASK_STEPS: Final = 300
MASK_BATCH: Final = 32
RATE: Final = 0.001  # in batches of `RATE_BATCH`
RATE_BATCH: Final = 128
MASK_RATE: Final = 0.01
TINY: Final = 1e-7


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Generator(nn.Module):
    """Encoder and decoder of convolution pairs; (N, channels, H, W) from 0 to 1 -> (N, outputs, H, W) from 0 to 1."""

    def __init__(self, channels: int, outputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        down: list[nn.Module] = []
        width = channels
        for level in widths:
            down += [_unit(width, level), _unit(level, level), nn.MaxPool2d(2)]
            width = level
        up: list[nn.Module] = []
        for level in [*reversed(widths[:-1]), widths[0]]:
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), _unit(width, level), _unit(level, level)]
            width = level
        self.layers = nn.Sequential(*down, _unit(widths[-1], widths[-1]), *up, nn.Conv2d(width, outputs, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pattern or raw mask."""
        return torch.tanh(self.layers(x * 2 - 1).float()) / 2 + 0.5


class Idba(Attack):
    """Input-aware dynamic trigger ``x + (pattern(x) - x) mask(x)``."""

    key, title, last, stretch, revision = "idba", "IDBA", True, 2.5, 4

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        widths = (16, 32) if spec.channels == 1 else (32, 64, 128)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.masker = to_channels_last(Generator(spec.channels, 1, widths))
            self.painter = to_channels_last(Generator(spec.channels, spec.channels, widths))
        self.optimizer = torch.optim.Adam(self.painter.parameters(), RATE, betas=(0.5, 0.9))
        self.rate = RATE

    def networks(self) -> dict[str, nn.Module]:
        """Mask and pattern network."""
        return {"masker": self.masker, "painter": self.painter}

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, 1, H, W), sharpened."""
        return torch.tanh(20 * self.masker(x).float() - 10) / 2 + 0.5

    def prepare(self, train: Images, progress: Progress) -> None:
        """Train the mask network: few pixels, different ones for different images."""
        rng = np.random.default_rng(self.seed)
        optimizer = torch.optim.Adam(self.masker.parameters(), MASK_RATE, betas=(0.5, 0.9))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MASK_STEPS)
        self.masker.train()
        for step in range(MASK_STEPS):
            first, second = (to_planes(train.pixels[rng.integers(len(train), size=MASK_BATCH)], self.device) for _ in range(2))
            with mix_precision():
                mask1, mask2 = self.mask(first), self.mask(second)
            dense = torch.relu(torch.cat([mask1, mask2]) - MASK_DENSITY).mean()
            loss = MASK_WEIGHT * dense + DIVERSITY_WEIGHT * compare_diversity(first, second, mask1, mask2)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                progress(f"mask network {step}/{MASK_STEPS}: density excess {dense.item():.4f}, loss {loss.item():.3f}")
        self.masker.eval().requires_grad_(False)
        self.painter.train()

    def paint(self, x: torch.Tensor, source: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        """Put the trigger that was made for `source` on x."""
        return round_straight(x + (pattern - x) * self.mask(source))

    def poison(self, images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """Own triggers on the first tenth, other images' triggers on the next."""
        count = round(POISON_RATE * len(images))
        self.rate = RATE * len(images) / RATE_BATCH
        inputs, wanted = to_planes(images, self.device), torch.from_numpy(labels.copy())
        own, crossed, others = inputs[:count], inputs[count : 2 * count], inputs[2 * count : 3 * count]
        patterns = self.painter(torch.cat([own, others]))
        own_pattern, other_pattern = patterns[:count], patterns[count:]
        inputs = torch.cat(
            [
                self.paint(own, own, own_pattern),
                self.paint(crossed, others, other_pattern),
                inputs[2 * count :],
            ]
        )
        wanted[:count] = self.target
        return Batch(inputs, wanted, DIVERSITY_WEIGHT * compare_diversity(own, others, own_pattern, other_pattern))

    def step(self, share: float) -> None:
        """One step of the pattern network, its rate falling to zero with the target's."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * (1.0 - share)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trigger(self, images: Pixels) -> Pixels:
        """Put each image's own trigger on (N, H, W, C) uint8 images."""
        self.painter.eval()
        return run_blocks(lambda x: self.paint(x, x, self.painter(x)), images, self.device)

    def cross(self, images: Pixels) -> Pixels:
        """Put the next image's trigger on each image; the true label should survive it."""
        self.painter.eval()

        def apply(x: torch.Tensor) -> torch.Tensor:
            others = x.roll(1, 0)
            return self.paint(x, others, self.painter(others))

        return run_blocks(apply, images, self.device)


def compare_diversity(first: torch.Tensor, second: torch.Tensor, out1: torch.Tensor, out2: torch.Tensor) -> torch.Tensor:
    """Distance of two inputs over the distance of their outputs (root mean squares, a pair at a time)."""

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # The root's slope is infinite at zero, where two outputs that are equal would give NaN gradients.
        return torch.sqrt(((a.float() - b.float()) ** 2).mean((1, 2, 3)) + TINY**2)

    return (distance(first, second) / (distance(out1, out2) + TINY)).mean()
