import numpy as np
import pytest
from crepes.base import p_values_batch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from diffense.calibration import bound_false_alarms, check_alpha, find_threshold, needed_images, rank_p_values
from diffense.errors import OptionError, TooFewImagesError

scores = st.lists(st.integers(0, 12).map(lambda i: i / 4), min_size=1, max_size=60)


def as_sorted(values):
    return np.sort(np.array(values, np.float32))


@given(scores, scores)
def test_p_values_are_the_share_of_clean_scores_at_least_as_high(calibration, inspected):
    got = rank_p_values(as_sorted(calibration), np.array(inspected, np.float32))
    want = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in inspected]
    assert got == pytest.approx(want)


@given(scores, scores)
def test_p_values_agree_with_crepes(calibration, inspected):
    calibration, inspected = np.array(calibration, np.float32), np.array(inspected, np.float32)
    got = rank_p_values(np.sort(calibration), inspected)
    assert got == pytest.approx(p_values_batch(calibration, inspected, smoothing=False))


@given(scores, scores, st.floats(0.02, 0.98))
def test_flagged_is_a_score_above_the_threshold(calibration, inspected, alpha):
    calibration = as_sorted(calibration)
    if len(calibration) < needed_images(alpha):
        with pytest.raises(TooFewImagesError, match=str(needed_images(alpha))):
            check_alpha(alpha, len(calibration))
        return
    check_alpha(alpha, len(calibration))
    inspected = np.array(inspected, np.float32)
    flagged = rank_p_values(calibration, inspected) <= alpha
    assert np.array_equal(flagged, inspected > find_threshold(calibration, alpha))


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.05, 0.02, 0.01, 0.003])
def test_the_needed_number_of_images_is_the_least_that_works(alpha):
    n = needed_images(alpha)
    assert 1 / (n + 1) <= alpha < 1 / n


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_outside_zero_and_one_is_refused(alpha):
    with pytest.raises(OptionError):
        check_alpha(alpha, 1000)


def test_p_values_of_exchangeable_scores_are_uniform():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(3000, 200)).astype(np.float32)
    p = [rank_p_values(np.sort(row[1:]), row[:1])[0] for row in draws]
    assert kstest(np.array(p) - rng.random(3000) / 200, "uniform").pvalue > 0.01


def test_the_interval_covers_the_realised_rate_as_often_as_it_says():
    rng = np.random.default_rng(1)
    low, high = bound_false_alarms(199, 0.05)
    rates = [1 - find_threshold(np.sort(rng.random(199)).astype(np.float32), 0.05) for _ in range(4000)]
    covered = np.mean([(low <= rate <= high) for rate in rates])
    assert covered == pytest.approx(0.9, abs=0.02)
    assert np.mean(rates) == pytest.approx(0.05, abs=0.001)
