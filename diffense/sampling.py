"""Guided sampling of the innovations: levels, the noise bank, and the steps down the sigma ladder.

The same code runs on NumPy, on torch and as a recorded graph. Noise is an argument: `draw_noise` makes a guard's bank once.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SIGMA_MIN: Final = 0.02  # last noise level of a ladder of several steps, EDM's default divided by its schedule's scale
RHO: Final = 7.0  # EDM's schedule exponent (eq. 5)

Denoise = Callable[[Any, Any, Any], Any]
"""(noised (N, M, W), sigma (1, M, K) float32, guide (N, G)) -> sample (N, M, W): one guided step."""


def draw_noise(levels: int, draws: int, size: int, seed: int) -> NDArray[np.float32]:
    """Make a guard's noise bank, antithetic over the draws.

    Args:
        levels: L.
        draws: R, even, so that every draw has its mirror image and odd moments vanish exactly.
        size: W, entries of one innovation vector.
        seed: the guard's seed.

    Returns:
        (L R, W) float32, row ``level * R + draw``; the second half of a level's draws is minus the first.
    """
    half = np.random.default_rng(seed).standard_normal((levels, draws // 2, size)).astype(np.float32)
    return np.asarray(np.concatenate([half, -half], axis=1).reshape(levels * draws, size), np.float32)


def lay_ladder(sigmas: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """Noise levels of the steps, EDM's schedule (eq. 5) for every level and tap.

    Args:
        sigmas: (L, K) the level each tap starts from.
        steps: number of denoiser calls, >= 1.

    Returns:
        (steps + 1, L, K), from sigmas down to exactly 0.
    """
    share = np.linspace(0.0, 1.0, steps)[:, None, None] if steps > 1 else np.zeros((1, 1, 1))
    low = min(SIGMA_MIN, float(sigmas.min()))
    ladder = (sigmas ** (1 / RHO) + share * (low ** (1 / RHO) - sigmas ** (1 / RHO))) ** RHO
    return np.concatenate([ladder, np.zeros((1, *sigmas.shape))])


def pull(restored: Any, innovation: Any, sigma: Any, weight: float) -> Any:
    """Data guidance: the posterior mean once the inspected innovation is seen with noise variance ``1 / weight``.

    With data of unit variance the denoised value has variance ``r2 = sigma^2 / (1 + sigma^2)``, and Bayes' rule gives
    ``D + g (u - D)`` with ``g = r2 / (r2 + tau2) = r2 w / (r2 w + 1)``; weight 0 is no pull.
    """
    r2 = sigma * sigma / (sigma * sigma + 1.0)
    gain = r2 * weight / (r2 * weight + 1.0)
    return restored + gain * (innovation - restored)


def sample(
    denoise: Denoise,
    innovation: Any,
    guide: Any,
    *,
    noise: Any,
    ladder: NDArray[np.float64],
    draws: int,
    width: int,
    data_guidance: float,
    xp: Any,
) -> Any:
    """Sample every tap's innovation under the guidance of the inspected input (Euler steps of the probability-flow ODE).

    Args:
        denoise: one guided step for all rows.
        innovation: (N, W) of the inspected inputs.
        guide: (N, G).
        noise: (M, W) from `draw_noise`, M = L R.
        ladder: (steps + 1, L, K) from `lay_ladder`.
        draws: R.
        width: d, entries of one tap.
        data_guidance: weight of `pull`.
        xp: array namespace.

    Returns:
        (N, M, W) samples.
    """
    size = ladder.shape[2] * width
    inspected = xp.reshape(innovation, (-1, 1, size))
    per_row = np.repeat(ladder, draws, axis=1).astype(np.float32)  # (steps + 1, M, K)
    per_entry = np.repeat(per_row, width, axis=2)  # (steps + 1, M, W)
    x = inspected + xp.asarray(noise * per_entry[0])
    for now, following, sigma in zip(per_entry[:-1], per_entry[1:], per_row[:-1], strict=True):
        level = xp.asarray(now)
        restored = denoise(x, xp.asarray(sigma[None]), guide)
        restored = pull(restored, inspected, level, data_guidance) if data_guidance else restored
        # The step to sigma 0 lands on the restored value itself; written out it would divide rounding errors by sigma.
        x = restored if not following.any() else x + xp.asarray(following - now) * ((x - restored) / level)
    return x


def in_float32(denoise: Denoise) -> Denoise:
    """Wrap a float32 graph, which takes sigma (N, M, K), for float64 arithmetic around it."""

    def step(noised: NDArray[np.float64], sigma: NDArray[np.float64], guide: NDArray[np.float64]) -> NDArray[np.float64]:
        each = np.broadcast_to(sigma, (len(noised), *sigma.shape[1:]))
        operands = (np.ascontiguousarray(array, np.float32) for array in (noised, each, guide))
        return np.asarray(denoise(*operands), np.float64)

    return step
