import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diffense.calibration import needed_images
from diffense.clean import (
    FEW_GROUPS,
    FEW_IMAGES,
    FEWEST_FIT_IMAGES,
    FEWEST_IMAGES,
    check_groups,
    count_calibration,
    decide_guide,
    split_rows,
)
from diffense.errors import OptionError, TooFewImagesError
from diffense.guidance import FEWEST_PER_CLASS

RATES = st.integers(1, 500).map(lambda n: n / 1000)


@pytest.mark.parametrize(
    ("images", "alpha", "expected"),
    [
        (1000, 0.01, 400),
        (2500, 0.01, 1000),
        (400, 0.005, 199),  # alpha needs more than two fifths
        (332, 0.005, 199),
        (331, 0.005, 331),  # and here more than three: all, by folds
        (299, 0.1, 299),
    ],
)
def test_two_fifths_calibrate_or_more_where_alpha_needs_more_or_all_by_folds(images: int, alpha: float, expected: int) -> None:
    assert count_calibration(images, alpha) == expected


@pytest.mark.parametrize(
    ("images", "groups", "alpha", "expected"),
    [
        (3096, 328, 0.01, 3096),  # few groups: all, by folds
        (3096, FEW_GROUPS - 1, 0.01, 3096),
        (3096, FEW_GROUPS, 0.01, round(0.4 * 3096)),
        (350, 350, 0.01, 140),  # single images are no groups
    ],
)
def test_few_groups_calibrate_by_folds_however_many_images(images: int, groups: int, alpha: float, expected: int) -> None:
    assert count_calibration(images, alpha, groups) == expected


def test_an_alpha_that_the_groups_cannot_reach_is_refused() -> None:
    with pytest.raises(TooFewImagesError, match=r"alpha 0\.01 needs 99 calibration groups, there are 98"):
        count_calibration(3096, 0.01, 98)


@given(st.integers(0, 3000), RATES)
def test_calibration_images_suffice_or_a_number_is_named_that_does(images: int, alpha: float) -> None:
    try:
        chosen = count_calibration(images, alpha)
    except TooFewImagesError as refused:
        words = str(refused)
        assert f"{images} clean images" in words or f"there are {images};" in words
        named = re.search(r"^alpha \S+ needs (\d+)|give at least (\d+)", words)
        enough = int(named[1] or named[2])
        assert images < enough == max(needed_images(alpha), FEWEST_IMAGES)
        assert count_calibration(enough, alpha) == enough or enough >= FEW_IMAGES
        return
    assert images >= max(needed_images(alpha), FEWEST_IMAGES) and chosen >= needed_images(alpha)
    if chosen < images:
        assert images >= FEW_IMAGES
        assert round(0.4 * images) <= chosen <= 0.6 * images + 1e-9
        assert images - chosen >= FEWEST_FIT_IMAGES


@given(st.integers(34, 3000), RATES)
def test_more_images_never_make_an_alpha_unreachable(images: int, alpha: float) -> None:
    assume(images >= needed_images(alpha))
    assert count_calibration(images + 1, alpha) >= needed_images(alpha)


@given(st.integers(34, 3000))
def test_the_smallest_alpha_that_is_named_works(images: int) -> None:
    with pytest.raises(TooFewImagesError) as refused:
        count_calibration(images, 1e-4)
    named = float(str(refused.value).rsplit("at least ", 1)[1])
    assert count_calibration(images, named) >= needed_images(named)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, math.nan])
def test_an_alpha_that_is_no_rate_is_refused(alpha: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        count_calibration(1000, alpha)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.floats(0, 1), st.integers(0, 99))
def test_every_label_is_split_in_the_same_share(labels: list[int], share: float, seed: int) -> None:
    all_labels, calibration = np.array(labels), round(share * len(labels))
    fit, kept = split_rows(all_labels, calibration, np.random.default_rng(seed))
    assert len(kept) == calibration
    assert sorted([*fit, *kept]) == list(range(len(labels)))
    assert (np.diff(fit) > 0).all() and (np.diff(kept) > 0).all()
    counts = [(np.sum(all_labels[kept] == label), np.sum(all_labels == label)) for label in set(labels)]
    assert max((k - 1) / n for k, n in counts) < min((k + 1) / n for k, n in counts)  # each within one of a common share


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=200), st.floats(0, 1), st.integers(0, 99)
)
def test_no_group_is_split(members: list[tuple[int, int]], share: float, seed: int) -> None:
    labels, groups = (np.array(column) for column in zip(*members, strict=True))
    wanted = round(share * len(labels))
    fit, kept = split_rows(labels, wanted, np.random.default_rng(seed), groups)
    assert sorted([*fit, *kept]) == list(range(len(labels))) and not set(groups[fit]) & set(groups[kept])
    assert wanted <= len(kept) < wanted + np.bincount(groups).max()
    alone = split_rows(labels, wanted, np.random.default_rng(seed), np.arange(len(labels)))
    assert all(map(np.array_equal, alone, split_rows(labels, wanted, np.random.default_rng(seed))))


def test_groups_that_do_not_fit_the_images_or_are_too_few_are_refused() -> None:
    check_groups(np.arange(60) // 3, 60)
    for groups in (np.arange(59), np.arange(60) / 2, np.zeros((60, 1), int)):
        with pytest.raises(OptionError, match="one integer for each of 60 images"):
            check_groups(groups, 60)
    with pytest.raises(TooFewImagesError, match=r"of 19 groups.*at least 20"):
        check_groups(np.arange(60) % 19, 60)
    with pytest.raises(TooFewImagesError, match=r"largest of 31 images.*none with more than half"):
        check_groups(np.maximum(np.arange(60), 30), 60)


def test_the_split_is_drawn_by_the_generator() -> None:
    labels = np.arange(300) % 3
    first, again, other = (split_rows(labels, 120, np.random.default_rng(seed))[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 0.3 < np.mean(first < 150) < 0.7


def decide(counts: list[int], wanted: Any = "auto") -> tuple[str, str]:
    said: list[str] = []
    labels = np.repeat(np.arange(len(counts)), counts)
    return decide_guide(labels, len(counts), wanted, said.append), " | ".join(said)


def test_enough_images_of_every_class_guide_by_label_without_a_word() -> None:
    assert decide([FEWEST_PER_CLASS] * 4) == ("label", "")
    assert decide([FEWEST_PER_CLASS] * 4, "logits") == ("logits", "")


def test_few_images_of_a_class_guide_by_logits_and_are_named() -> None:
    kind, said = decide([9, 4, 9, 1, 0])
    assert kind == "logits"
    assert "2 of 5 classes" in said and "class 1: 4, class 3: 1" in said
    assert "1 of 5 classes are never predicted" in said and "class 4: 0" in said


def test_label_guidance_that_was_asked_for_is_refused_with_classes_and_numbers() -> None:
    with pytest.raises(TooFewImagesError, match=r"5 clean images of every class, 2 classes .*class 1: 4, class 3: 0"):
        decide([9, 4, 9, 0], "label")
    assert decide([9, 5], "label") == ("label", "")


def test_a_thousand_classes_are_named_in_a_line() -> None:
    counts = [5] * 400 + [4] * 500 + [0] * 100
    kind, said = decide(counts)
    assert kind == "logits" and "500 of 1000" in said and "100 of 1000" in said and "class 400: 4" in said
    with pytest.raises(TooFewImagesError, match="600 classes have fewer") as refused:
        decide(counts, "label")
    assert "--guide logits" in str(refused.value) and len(str(refused.value)) < 300 and len(said) < 600
