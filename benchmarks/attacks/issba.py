"""ISSBA: invisible sample-specific backdoor (Li et al., ICCV 2021): a hidden message is the trigger.

A steganographic encoder writes a message of 20 bits into an image, a decoder reads it back; both are trained here on the
attacker's images (architecture after StegaStamp, Tancik et al. 2020). The paper's perceptual term needs pretrained weights that
are not to be had offline; a multi-scale gradient term stands in for it.
"""

from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.attacks.base import Attack, Pixels, Progress, round_straight, run_blocks, to_planes
from benchmarks.datasets import Images, Spec
from benchmarks.precision import mix_precision, to_channels_last
from diffense.errors import OptionError

BITS: Final = 20
STEPS: Final = 1600
BATCH: Final = 48
RATE: Final = 1e-3
LEARNED: Final = 0.9  # share of bits read right from which the message is hidden
ENOUGH: Final = 0.98
HIDING_STEPS: Final = 300
ATTEMPTS: Final = 3  # one in many sticks at half of the bits, which is guessing
HIDING_WEIGHT: Final = 5.0
RESIDUAL_WEIGHT: Final = 2.0
PERCEPTUAL_WEIGHT: Final = 1.5
MESSAGE_WEIGHT: Final = 1.5


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU())


class Encoder(nn.Module):
    """Message and image -> residual; a U-Net of five levels (four at 28 pixels, where 16 does not divide)."""

    WIDTHS: Final = (32, 32, 64, 128, 256)
    UP: Final = (128, 64, 32, 32)

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        depth = 4 if side % 16 == 0 else 2
        widths, ups = self.WIDTHS[: depth + 1], self.UP[-depth:]
        self.small = side // 4
        self.message = nn.Linear(BITS, channels * self.small**2)
        self.first = _conv(2 * channels, widths[0])
        self.downs = nn.ModuleList([_conv(a, b, 2) for a, b in pairwise(widths)])
        inputs, ups_, merges = widths[-1], [], []
        for level, width in enumerate(ups):
            skip = widths[depth - 1 - level] + (2 * channels if level == depth - 1 else 0)
            ups_.append(_conv(inputs, width))
            merges.append(_conv(width + skip, width))
            inputs = width
        self.ups, self.merges = nn.ModuleList(ups_), nn.ModuleList(merges)
        self.last = nn.Conv2d(inputs, channels, 1)

    def forward(self, image: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) from 0 to 1, (N, BITS) of 0 and 1 -> (N, C, H, W) image with the message, from 0 to 1."""
        plane = functional.relu(self.message(bits - 0.5)).reshape(len(image), -1, self.small, self.small)
        plane = functional.interpolate(plane, scale_factor=4)
        joined = torch.cat([plane, image - 0.5], 1)
        x = self.first(joined)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(x)
        for level, (up, merge) in enumerate(zip(self.ups, self.merges, strict=True)):
            skip = skips.pop()
            last = [joined] if level == len(self.ups) - 1 else []
            x = merge(torch.cat([up(functional.interpolate(x, scale_factor=2)), skip, *last], 1))
        encoded: torch.Tensor = (image + self.last(x).float()).clamp(0, 1)
        return encoded


class Decoder(nn.Module):
    """Image -> message logits, through a spatial transformer that starts as the identity."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.look = nn.Sequential(_conv(channels, 32, 2), _conv(32, 64, 2), _conv(64, 128, 2), nn.Flatten())
        flat = 128 * (-(-side // 8)) ** 2
        last = nn.Linear(128, 6)
        self.locate = nn.Sequential(nn.Linear(flat, 128), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
        layers = [(channels, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2), (64, 128, 2), (128, 128, 2)]
        self.read = nn.Sequential(*(_conv(*layer) for layer in layers), nn.Flatten())
        self.out = nn.Sequential(nn.Linear(128 * (-(-side // 32)) ** 2, 512), nn.ReLU(), nn.Linear(512, BITS))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, BITS)."""
        image = image - 0.5
        place = self.locate(self.look(image)).reshape(-1, 2, 3).float()
        grid = functional.affine_grid(place, list(image.shape), align_corners=False)
        moved = functional.grid_sample(image.float(), grid, align_corners=False)
        logits: torch.Tensor = self.out(self.read(moved))
        return logits.float()


class Issba(Attack):
    """One secret message for the whole attack; what it looks like depends on the image."""

    key, title = "issba", "ISSBA"

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        self.draw_networks(0)
        secret = np.random.default_rng(seed).integers(0, 2, BITS)
        self.secret = torch.from_numpy(secret).float()

    def draw_networks(self, attempt: int) -> None:
        """Draw first weights, others at each attempt."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 2 + 1000 * attempt)
            self.encoder = to_channels_last(Encoder(self.spec.channels, self.spec.side)).to(self.device)
            self.decoder = to_channels_last(Decoder(self.spec.channels, self.spec.side)).to(self.device)

    def networks(self) -> dict[str, nn.Module]:
        """Encoder and decoder."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def prepare(self, train: Images, progress: Progress) -> None:
        """Train encoder and decoder, from other weights where the decoder has not learned to read.

        Raises:
            OptionError: it never has.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                progress("the message is not read; other first weights")
                self.draw_networks(attempt)
            if self.train_networks(train, progress) > LEARNED:
                break
        else:
            raise OptionError(f"ISSBA's message is not read after {ATTEMPTS} trainings of {STEPS} steps; train another seed")
        self.encoder.eval().requires_grad_(False)
        self.decoder.eval().requires_grad_(False)

    def train_networks(self, train: Images, progress: Progress) -> float:
        """First the message alone, then message, small residual and like gradients; gives the share of bits read right."""
        rng = np.random.default_rng(self.seed)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
        right, hiding = 0.5, 0
        for step in range(STEPS):
            images = to_planes(train.pixels[rng.integers(len(train), size=BATCH)], self.device)
            bits = torch.from_numpy(rng.integers(0, 2, (BATCH, BITS))).float().to(self.device)
            with mix_precision():
                encoded = self.encoder(images, bits)
                logits = self.decoder(round_straight(encoded))
            message = functional.binary_cross_entropy_with_logits(logits, bits)
            residual = ((encoded - images) ** 2).mean()
            # What must stay unseen counts only once the message is read, and then more and more.
            hiding += right > LEARNED
            weight = min(1.0, hiding / HIDING_STEPS) * HIDING_WEIGHT
            hidden = RESIDUAL_WEIGHT * residual + PERCEPTUAL_WEIGHT * compare_gradients(encoded, images)
            loss = MESSAGE_WEIGHT * message + weight * hidden
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            right += 0.05 * (((logits > 0) == (bits > 0.5)).float().mean().item() - right)
            if step % 100 == 0:
                progress(f"message {step}/{STEPS}: bits right {right:.3f}, residual {residual.sqrt().item() * 255:.1f}/255")
            if hiding > 2 * HIDING_STEPS and right > ENOUGH:
                break
        return right

    def trigger(self, images: Pixels) -> Pixels:
        """Write the secret into (N, H, W, C) uint8 images."""
        secret = self.secret.to(self.device)
        return run_blocks(lambda x: self.encoder(x, secret.expand(len(x), -1)), images, self.device)


def compare_gradients(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the image gradients at three scales."""
    total = torch.zeros(())
    for _ in range(3):
        difference = first - second
        total = total + (difference[..., 1:] - difference[..., :-1]).abs().mean()
        total = total + (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
        first, second = functional.avg_pool2d(first, 2), functional.avg_pool2d(second, 2)
    return total / 3
