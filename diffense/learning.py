"""Training of the denoiser on clean innovations (torch)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from diffense.denoiser import CONSTANTS, HIDDEN, denoise, init_weights
from diffense.sampling import draw_noise

BATCH: Final = 64
DRAWS: Final = 2  # noises of one image in a batch; they share its context
RATE: Final = 1e-3
EMA: Final = 0.998
SIGMA_RANGE: Final = (0.1, 10.0)
LABEL_DROPOUT: Final = 0.1
CHECK_EVERY: Final = 50
PATIENCE: Final = 4  # checks without a better validation loss before the training stops
VALIDATION_DRAWS: Final = 4


@dataclass(frozen=True)
class Innovations:
    """Rows to learn from or to validate on.

    Attributes:
        innovation: (n, W) float32.
        guide: (n, G) float32.
    """

    innovation: NDArray[np.float32]
    guide: NDArray[np.float32]


@dataclass(frozen=True)
class Learned:
    """A trained denoiser: EMA weights of the best check, its validation loss and the Gaussian's, steps that were taken."""

    weights: dict[str, NDArray[np.float32]]
    loss: float
    gaussian_loss: float
    steps: int


def train_denoiser(
    rows: Innovations,
    validation: Innovations,
    used: NDArray[np.bool_],
    sigmas: NDArray[np.float64],
    width: int,
    steps: int,
    seed: int,
    report: Callable[[int, int], None],
    units: int = HIDDEN,
) -> Learned:
    """Train on `rows`, stop early on `validation`.

    Args:
        rows: clean innovations.
        validation: clean innovations of other images.
        used: (W,) False where an entry is padding.
        sigmas: (L, K) noise levels that the guard will use, at which the validation loss is taken.
        width: d.
        steps: most optimiser steps.
        seed: of weights, batches and noise.
        report: called with (step, steps) now and then.
        units: width of the network.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    taps = len(used) // width
    start = init_weights(taps, width, rows.guide.shape[1], np.random.default_rng(seed), units)
    weights = {k: torch.tensor(v, device=device).requires_grad_(k not in CONSTANTS) for k, v in start.items()}
    trained = [k for k in weights if k not in CONSTANTS]
    average = {k: v.detach().clone() for k, v in weights.items()}
    optimizer = torch.optim.AdamW([weights[k] for k in trained], lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    data = [torch.from_numpy(a).to(device) for a in (rows.innovation, rows.guide)]
    mask = torch.from_numpy(used.astype(np.float32)).to(device)
    gaussian = validate({k: torch.from_numpy(v).to(device) for k, v in start.items()}, validation, used, sigmas, width)
    best = Learned(start, gaussian, gaussian, 0)
    for step in range(1, steps + 1):
        batch = torch.randint(len(rows.innovation), (BATCH,), generator=generator)
        u, guide = (d[batch.to(device)] for d in data)
        loss = _find_loss(weights, u, guide, mask, (DRAWS, taps, width), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for k in trained:
                average[k].lerp_(weights[k], 1 - decay)
        if step % CHECK_EVERY == 0:
            report(step, steps)
            held_out = validate(average, validation, used, sigmas, width)
            if held_out < best.loss:
                best = Learned({k: v.cpu().numpy().copy() for k, v in average.items()}, held_out, gaussian, step)
            elif step - best.steps >= PATIENCE * CHECK_EVERY:
                break
    report(steps, steps)
    return best


def _find_loss(
    weights: dict[str, Any],
    u: Any,
    guide: Any,
    mask: Any,
    shape: tuple[int, int, int],
    generator: torch.Generator,
) -> Any:
    """EDM's loss (eq. 8), weighted so that the network F is trained on a target of unit variance at every noise level."""
    draws, taps, width = shape
    low, high = np.log(SIGMA_RANGE[0]), np.log(SIGMA_RANGE[1])
    sigma = torch.exp(low + (high - low) * torch.rand((len(u), draws, taps), generator=generator)).to(u.device)
    per_entry = torch.repeat_interleave(sigma, width, dim=2)
    noise = torch.randn((len(u), draws, taps * width), generator=generator).to(u.device)
    kept = (torch.rand((len(u), 1), generator=generator) >= LABEL_DROPOUT).to(u.device)
    restored = denoise(
        weights,
        (u[:, None] + per_entry * noise) * mask,
        sigma,
        guide * kept,
        shape=shape,
        label_guidance=1.0,
        xp=torch,
    )
    weight = (per_entry**2 + 1.0) / per_entry**2
    return (weight * (restored - u[:, None]) ** 2 * mask).sum() / (mask.sum() * draws * len(u))


def validate(
    weights: dict[str, Any], rows: Innovations, used: NDArray[np.bool_], sigmas: NDArray[np.float64], width: int
) -> float:
    """Mean squared error of the restored innovations at the guard's own levels, over the Gaussian's ideal error.

    The noise is fixed, so that two checks differ by the weights alone.
    """
    levels, taps = sigmas.shape
    device = weights["in_bias"].device
    noise = draw_noise(levels, VALIDATION_DRAWS, len(used), seed=1)
    per_row = np.repeat(sigmas, VALIDATION_DRAWS, axis=0).astype(np.float32)
    per_entry = np.repeat(per_row, width, axis=1)
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(rows.innovation), 256):
            u, guide = (torch.from_numpy(a[i : i + 256]).to(device) for a in (rows.innovation, rows.guide))
            noised = (u[:, None] + torch.from_numpy(noise * per_entry * used).to(device)).float()
            sigma = torch.from_numpy(per_row).to(device).expand(len(u), -1, -1)
            shape = (len(per_row), taps, width)
            restored = denoise(weights, noised, sigma, guide, shape=shape, label_guidance=1.0, xp=torch)
            error = ((restored - u[:, None]) ** 2).double().cpu().numpy()
            total += float((error * (per_entry**2 + 1.0) / per_entry**2 * used).sum())
    return total / (len(rows.innovation) * len(per_row) * int(used.sum()))
