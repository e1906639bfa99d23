"""More latents from the same clean images: changed copies, only where the target keeps its label on them."""

from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

KEEPS_LABEL: Final = 0.9  # share of labels that must survive a change; digits and signs fail it when mirrored
SHIFT_SHARE: Final = 1 / 16  # of the side


def mirror(images: Pixels, generator: np.random.Generator) -> Pixels:
    """(N, H, W, C) -> the same, left and right exchanged."""
    del generator
    return images[:, :, ::-1]


def shift(images: Pixels, generator: np.random.Generator) -> Pixels:
    """(N, H, W, C) -> each image moved by up to a sixteenth of its side, its border repeated."""
    height, width = images.shape[1:3]
    reach = max(1, round(min(height, width) * SHIFT_SHARE))
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = generator.integers(0, 2 * reach + 1, size=(len(images), 2))
    return np.stack([p[y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)])


def mirror_and_shift(images: Pixels, generator: np.random.Generator) -> Pixels:
    """(N, H, W, C) -> the same, mirrored, then shifted."""
    return shift(mirror(images, generator), generator)


Change = Callable[[Pixels, np.random.Generator], Pixels]
FIRST: Final[tuple[Change, ...]] = (mirror, shift)
MORE: Final[tuple[Change, ...]] = (mirror_and_shift, shift)


def make_copies(
    images: Pixels,
    labels: NDArray[np.int64],
    predict: Callable[[Pixels], NDArray[np.int64]],
    generator: np.random.Generator,
    count: int = 1,
) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    """Change every image by changes that preserve labels, so many times; twice as many changes are tried.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) what the target predicts on them.
        predict: the target's labels on other pixels.
        generator: of the random shifts.
        count: most copies of one image.

    Yields:
        For each change (M, H, W, C) copies that keep their label, M <= N, and (M,) the index of the image each was made from.
    """
    made = 0
    for change in islice(chain(FIRST, cycle(MORE)), 2 * count):
        changed = np.ascontiguousarray(change(images, generator))
        same = predict(changed) == labels
        if same.mean() >= KEEPS_LABEL:
            yield changed[same], np.flatnonzero(same)
            made += 1
        if made == count:
            return
