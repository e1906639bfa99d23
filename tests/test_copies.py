from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from diffense.clean import CleanSet, collect_clean, count_independent
from diffense.copies import KEEPS_LABEL, make_copies, mirror, shift

Pixels = NDArray[np.uint8]
Predict = Callable[[Pixels], NDArray[np.int64]]


def draw_images(count: int = 60, side: int = 16, seed: int = 0) -> Pixels:
    """A bright blob left or right of the middle, on a ground of its own brightness."""
    rng = np.random.default_rng(seed)
    images = np.repeat(rng.integers(0, 100, (count, 1, 1, 1)), side, axis=1).repeat(side, axis=2).astype(np.uint8)
    for i, image in enumerate(images):
        left = side // 4 if i % 2 else side // 2 + 2
        image[side // 3 : side // 2, left : left + side // 8] = 250
    return images


def by_brightness(images: Pixels) -> NDArray[np.int64]:
    return (images[:, 0, 0, 0] > 50).astype(np.int64)


def by_side(images: Pixels) -> NDArray[np.int64]:
    half = images.shape[2] // 2
    return (images[:, :, :half].sum(axis=(1, 2, 3), dtype=float) > images[:, :, half:].sum(axis=(1, 2, 3), dtype=float)).astype(
        int
    )


def by_pixels(images: Pixels) -> NDArray[np.int64]:
    return np.array([hash(image.tobytes()) % 1000003 for image in images])


def copy(images: Pixels, predict: Predict, seed: int = 0) -> tuple[Pixels, NDArray[np.int64]]:
    return next(make_copies(images, predict(images), predict, np.random.default_rng(seed)), (images[:0], np.zeros(0, np.int64)))


def test_images_are_mirrored_where_labels_survive_it() -> None:
    images = draw_images()
    copies, source = copy(images, by_brightness)
    assert np.array_equal(source, np.arange(len(images)))
    assert np.array_equal(copies, images[:, :, ::-1])


def test_images_are_shifted_where_mirroring_changes_labels() -> None:
    images = draw_images()
    copies, source = copy(images, by_side)
    assert len(copies) > 0.9 * len(images)
    assert np.array_equal(by_side(copies), by_side(images)[source])
    for moved, i in zip(copies, source, strict=True):
        offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if np.array_equal(moved, np.roll(images[i], (y, x), (0, 1)))]
        assert offsets  # by one pixel, a sixteenth of the side; the ground is even, so the border repeats it
    assert (copies != images[source]).any(axis=(1, 2, 3)).mean() > 0.7


def test_nothing_is_copied_where_neither_keeps_labels() -> None:
    images = draw_images() + np.random.default_rng(1).integers(0, 5, (60, 16, 16, 1)).astype(np.uint8)
    copies, source = copy(images, by_pixels)
    assert copies.shape == (0, 16, 16, 1) and source.shape == (0,)


@pytest.mark.parametrize(("share", "mirrored"), [(KEEPS_LABEL, True), (KEEPS_LABEL - 0.05, False)])
def test_only_copies_that_keep_their_label_are_kept(share: float, mirrored: bool) -> None:
    images = draw_images(100)
    labels = np.zeros(100, np.int64)

    def predict(changed: Pixels) -> NDArray[np.int64]:
        mirrors = np.array_equal(changed, images[:, :, ::-1])
        return (np.arange(100) >= (share * 100 if mirrors else 97)).astype(np.int64)

    [(copies, source)] = make_copies(images, labels, predict, np.random.default_rng(0))
    assert np.array_equal(source, np.arange(90 if mirrored else 97))
    assert np.array_equal(copies, images[:90, :, ::-1]) == mirrored


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 99))
def test_changes_keep_shape_and_values(height: int, width: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (3, height, width, channels), np.uint8)
    assert np.array_equal(mirror(mirror(images, rng), rng), images)
    moved = shift(images, rng)
    assert moved.shape == images.shape and moved.dtype == np.uint8
    assert all(set(a.reshape(-1)) <= set(b.reshape(-1)) for a, b in zip(moved, images, strict=True))
    reach = max(1, round(min(height, width) / 16))
    y, x = min(height, 2 * reach + 1), min(width, 2 * reach + 1)
    # The middle of the image is somewhere within reach in the moved one.
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images[0], ((reach,) * 2, (reach,) * 2, (0, 0)), "edge"), images[0].shape
    )
    assert any(np.array_equal(moved[0], window[0]) for row in windows for window in row) and y and x


def test_the_clean_set_holds_originals_first_and_each_copy_with_what_the_target_made_of_it() -> None:
    images = draw_images(40)

    def run(pixels: Pixels) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        flat = pixels.reshape(len(pixels), -1).astype(np.float64)
        return np.eye(2)[by_side(pixels)] * 5, [flat[:, :3], flat @ np.ones((flat.shape[1], 2))]

    logits, pooled = run(images)
    clean = collect_clean(images, logits, pooled, run, np.random.default_rng(0), 3)
    made = list(make_copies(images, by_side(images), by_side, np.random.default_rng(0), 3))
    assert len(made) == 3
    copies, source = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
    assert clean.originals == 40 and np.array_equal(clean.source, np.concatenate([np.arange(40), source]))
    expected_logits, expected = run(np.concatenate([images, copies]))
    assert np.array_equal(clean.logits, expected_logits)
    assert all(np.array_equal(a, b) for a, b in zip(clean.pooled, expected, strict=True))
    assert np.array_equal(clean.labels, by_side(images)[clean.source])


def test_further_copies_are_shifted_and_mirrored_where_labels_survive_it() -> None:
    images = draw_images()
    made = list(make_copies(images, by_brightness(images), by_brightness, np.random.default_rng(0), 4))
    assert len(made) == 4
    assert np.array_equal(made[0][0], images[:, :, ::-1])
    assert all((a != b).any() for (a, _), (b, _) in pairwise(made))
    assert all(np.array_equal(by_brightness(copies), by_brightness(images)[source]) for copies, source in made)


@given(st.integers(2, 30), st.integers(0, 99))
def test_a_part_of_a_clean_set_keeps_copies_with_their_originals(originals: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = np.concatenate([np.arange(originals), rng.integers(0, originals, 2 * originals)])
    clean = CleanSet(np.eye(originals)[source], [source[:, None].astype(np.float64)], source, originals)
    kept = rng.random(originals) < 0.6
    part = clean.take(kept[source])
    assert part.originals == kept.sum()
    assert np.array_equal(part.source[: part.originals], np.arange(part.originals))
    assert np.array_equal(part.pooled[0][:, 0], np.flatnonzero(kept)[part.source]), "each row stands for its own original"
    assert np.array_equal(part.labels, part.pooled[0][:, 0])


def test_an_image_and_one_copy_count_as_independent_and_no_more() -> None:
    once = np.arange(9)
    assert [count_independent(np.tile(once, n)) for n in (1, 2, 7)] == [9, 18, 18]
    assert count_independent(np.concatenate([once, once[:4]])) == 13


def test_a_clean_set_without_copies_is_what_was_given() -> None:
    images = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 1), np.uint8)

    def run(pixels: Pixels) -> tuple[Any, Any]:
        return np.eye(1000003)[by_pixels(pixels)] if len(pixels) < 2 else _wide(by_pixels(pixels)), [np.zeros((len(pixels), 2))]

    logits, pooled = run(images)
    clean = collect_clean(images, logits, pooled, run, np.random.default_rng(0))
    assert len(clean.source) == clean.originals == 30


def _wide(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.eye(97)[labels % 97]
