"""The corruptions that move or mix pixels: (N, H, W, channels) from 0 to 1 and a severity from 1 to 5, see `corruptions`."""

from typing import Final

import numpy as np
from scipy import ndimage

from benchmarks.peers.fields import Pixels, draw_displacement, draw_swaps, enlarge, resample, streak

SIDE: Final = 224.0  # the side that lengths are meant for
ANGLE: Final = 30.0  # of motion, degrees


def defocus_blur(x: Pixels, severity: int) -> Pixels:
    """Disk blur; its edge is smoothed by half a pixel, so that it blurs small images too."""
    radius = (3, 4, 6, 8, 10)[severity - 1] * x.shape[1] / SIDE
    reach = int(np.ceil(radius)) + 2
    v, u = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = ndimage.gaussian_filter(np.clip(radius + 0.5 - np.hypot(v, u), 0, 1), 0.5)
    return np.asarray(ndimage.convolve(x, (kernel / kernel.sum())[None, :, :, None].astype(np.float32), mode="reflect"))


def glass_blur(x: Pixels, severity: int) -> Pixels:
    """Neighbouring pixels swapped, between two blurs; rounds grow too, as small images leave no room to reach further."""
    sigma, reach, rounds = ((0.7, 1, 1), (0.9, 2, 1), (1.0, 2, 2), (1.1, 3, 3), (1.5, 4, 4))[severity - 1]
    scale = x.shape[1] / SIDE
    blur = (0, sigma * scale, sigma * scale, 0)
    order = draw_swaps(x.shape[1], x.shape[2], max(1, round(reach * scale)), rounds, 4)
    swapped = ndimage.gaussian_filter(x, blur).reshape(len(x), -1, x.shape[3])[:, order].reshape(x.shape)
    return np.asarray(ndimage.gaussian_filter(swapped, blur))


def motion_blur(x: Pixels, severity: int) -> Pixels:
    """Blur along one direction."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return streak(x, radius * x.shape[1] / SIDE, sigma * x.shape[1] / SIDE, ANGLE)


def zoom_blur(x: Pixels, severity: int) -> Pixels:
    """Mean of enlargements."""
    factors = np.linspace(1.0, (1.11, 1.16, 1.21, 1.26, 1.33)[severity - 1], 8)
    return np.asarray((x + sum(enlarge(x, factor) for factor in factors)) / 9, np.float32)


def elastic_transform(x: Pixels, severity: int) -> Pixels:
    """Smooth random displacement of at most 3 to 11 % of the side."""
    side = x.shape[1]
    moved = draw_displacement(side, x.shape[2], (2 * severity + 1) / 100 * side, 0.06 * side, 12)
    rows, columns = np.mgrid[:side, : x.shape[2]]
    return resample(x, rows + moved[0], columns + moved[1])


def pixelate(x: Pixels, severity: int) -> Pixels:
    """Area means on a coarser grid, enlarged without smoothing."""
    for axis in (1, 2):
        size = x.shape[axis]
        cells = max(1, int(size * (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]))
        edges = np.linspace(0, size, cells + 1)
        overlap = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(edges[:-1, None], np.arange(size))
        means = np.maximum(overlap, 0) * cells / size  # (cells, size)
        mixing = means[((np.arange(size) + 0.5) * cells / size).astype(int)].astype(np.float32)
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ mixing.T, -1, axis)
    return x
