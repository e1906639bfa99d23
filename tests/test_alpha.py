"""What belongs to an alpha: the images it needs, the threshold, the verdicts and the interval of the realised rate."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from diffense.calibration import (
    bound_false_alarms,
    check_alpha,
    count_allowed,
    count_groups_once,
    find_threshold,
    flag,
    needed_images,
    rank_p_values,
)
from diffense.errors import TooFewImagesError

# Few different values, so that ties are common.
SCORES = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]) | st.floats(0, 4, width=32)
LISTS = st.lists(SCORES, min_size=1, max_size=60)
# Rates as they are typed, and some that arithmetic has moved by a last bit in either direction.
RATES = st.integers(1, 999).map(lambda n: n / 1000) | st.sampled_from(
    [0.3 - 0.2, 1 - 0.95, 1 / 3, 0.1 + 0.2, 2 / 21, 0.1 * 3, 1 - 1e-12]
)


def ascending(values: list[float]) -> NDArray[np.float32]:
    return np.sort(np.array(values, np.float32))


@given(LISTS, st.randoms(use_true_random=False), LISTS)
def test_p_values_fall_with_the_score_whatever_the_order_of_calibration(
    calibration: list[float], random: Random, scores: list[float]
) -> None:
    p = rank_p_values(ascending(calibration), ascending(scores))
    assert (np.diff(p) <= 0).all()
    assert (p >= 1 / (len(calibration) + 1)).all() and (p <= 1).all()
    shuffled = calibration.copy()
    random.shuffle(shuffled)
    assert np.array_equal(p, rank_p_values(ascending(shuffled), ascending(scores)))


@given(LISTS, RATES, LISTS)
def test_flagged_is_above_the_threshold_and_something_can_be(
    calibration: list[float], alpha: float, scores: list[float]
) -> None:
    n, known = len(calibration), ascending(calibration)
    assume(n >= needed_images(alpha))
    near = [np.nextafter(known, np.float32(side)) for side in (-9, 9)]
    tried = np.concatenate([ascending(scores), known, *near, np.array([9], np.float32)])
    flagged = flag(rank_p_values(known, tried), alpha, n)
    assert np.array_equal(flagged, tried > find_threshold(known, alpha))
    assert flagged[-1]
    p = rank_p_values(known, tried)
    clear = np.abs(p - alpha) > 1e-9
    assert np.array_equal(flagged[clear], p[clear] <= alpha)


@given(RATES | st.floats(1e-4, 0.999))
def test_the_images_that_an_alpha_needs_are_enough_and_one_fewer_is_not(alpha: float) -> None:
    n = needed_images(alpha)
    check_alpha(alpha, n)
    assert flag(rank_p_values(np.zeros(n, np.float32), np.ones(1, np.float32)), alpha, n).all()
    if n > 1:
        fewer = np.zeros(n - 1, np.float32)
        assert not flag(rank_p_values(fewer, np.ones(1, np.float32)), alpha, n - 1).any()
        with pytest.raises(TooFewImagesError, match=rf"needs {n} calibration images, there are {n - 1};"):
            check_alpha(alpha, n - 1)


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.001, 999), (0.03, 33), (1 / 3, 2)]
)
def test_needed_images_of_common_rates(alpha: float, needed: int) -> None:
    assert needed_images(alpha) == needed


@given(st.integers(1, 3000))
def test_the_alpha_that_is_named_works(n: int) -> None:
    with pytest.raises(TooFewImagesError) as refused:
        check_alpha(1e-5, n)
    named = float(str(refused.value).rsplit("at least ", 1)[1])
    check_alpha(named, n)
    assert named < 1 / (n + 1) + 2e-4


def test_ties_only_make_p_values_larger() -> None:
    draws = np.round(np.random.default_rng(1).gamma(2.0, size=(4000, 40)), 0).astype(np.float32)
    p = np.array([rank_p_values(np.sort(row[:-1]), row[-1:])[0] for row in draws])
    for alpha in (0.05, 0.1, 0.3, 0.6):
        assert np.mean(p <= alpha) <= alpha + 0.01


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.05), (200, 0.01), (400, 0.1)])
def test_the_interval_holds_the_realised_rate_as_often_as_it_says(n: int, alpha: float) -> None:
    # Scores are uniform, so the share of clean inputs above a threshold is one minus it.
    calibrations = np.sort(np.random.default_rng(2).random((3000, n)), axis=1)
    rates = 1 - np.array([find_threshold(row, alpha) for row in calibrations])
    for confidence in (0.9, 0.5):
        low, high = bound_false_alarms(n, alpha, confidence)
        assert np.mean((rates >= low) & (rates <= high)) == pytest.approx(confidence, abs=0.03)
        assert np.mean(rates < low) == pytest.approx((1 - confidence) / 2, abs=0.02)
    assert rates.mean() == pytest.approx(math.floor(alpha * (n + 1) + 1e-9) / (n + 1), rel=0.05)


def test_every_group_counts_once() -> None:
    scores, groups = np.arange(12, dtype=np.float32), np.array([4, 4, 4, 4, 4, 4, 4, 4, 9, 9, 9, 0])
    assert count_groups_once(scores, groups).tolist() == [1, 3, 5, 7, 8, 9, 9, 10, 11, 11, 11, 11]
    assert count_groups_once(scores[::-1].copy(), None).tolist() == count_groups_once(scores, np.arange(12)).tolist()
    generator = np.random.default_rng(4)
    realised = []
    for _ in range(2000):  # a long scene is as strange as its mean; a new input is of a new scene
        sizes = generator.integers(1, 40, 99)
        numbers, means = np.repeat(np.arange(99), sizes), generator.normal(size=99)
        known = count_groups_once(means[numbers].astype(np.float32), numbers)
        realised.append(norm.sf(find_threshold(known, 0.05)))
    assert np.mean(realised) == pytest.approx(0.05, rel=0.1)


def test_the_interval_of_groups_is_that_of_as_many_images_or_wider_than_it_says() -> None:
    generator = np.random.default_rng(3)
    low, high = bound_false_alarms(990, 0.05, groups=99)
    assert (low, high) == pytest.approx(bound_false_alarms(99, 0.05))
    assert bound_false_alarms(99, 0.05, groups=99) == bound_false_alarms(99, 0.05)
    for spread in (0.0, 1.0, 10.0):  # of a group's scores, beside that of the groups' means
        means, noise = generator.normal(size=(2000, 99, 1)), generator.normal(size=(2000, 99, 10))
        scores = np.sort((means + spread * noise).reshape(2000, 990), axis=1).astype(np.float32)
        rates = norm.sf([find_threshold(row, 0.05) for row in scores], scale=np.hypot(1.0, spread))
        assert np.mean((rates >= low) & (rates <= high)) > 0.87
    assert np.isfinite(bound_false_alarms(500, 0.01, groups=20)).all()


def test_an_alpha_next_to_one_flags_all_but_the_lowest() -> None:
    known, alpha = ascending(range(10)), 1 - 1e-12
    assert count_allowed(alpha, 10) == 10
    assert find_threshold(known, alpha) == 0.0
    assert flag(rank_p_values(known, known), alpha, 10).tolist() == [False] + [True] * 9
    assert np.isfinite(bound_false_alarms(10, alpha)).all()


def test_the_interval_narrows_with_more_images() -> None:
    widths = [float(np.diff(bound_false_alarms(n, 0.05))[0]) for n in (19, 99, 999, 9999)]
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.01
