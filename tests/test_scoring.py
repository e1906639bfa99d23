from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffense.guidance import Guidance, one_hot
from diffense.rule import combine_surprises, fit_rule
from diffense.scoring import (
    EXCUSED,
    LEAD,
    LEADING,
    REST,
    UNSURE,
    WHOLE,
    Allowance,
    Formula,
    allow,
    fit_allowance,
    lay_bands,
    list_evidence,
    list_parts,
    measure,
    measure_mismatch,
)
from diffense.surprise import Surprise, find_surprise, fit_surprise

CLASSES, TAPS, WIDTH = 5, 3, 8
SIZE = TAPS * WIDTH
EVERY_ENTRY = np.ones(SIZE, bool)
RNG = np.random.default_rng(0)


def make_formula(seen=(True,) * CLASSES, used=EVERY_ENTRY, width=WIDTH):
    size = len(used)
    means = RNG.normal(size=(CLASSES, size)) * used
    slope = np.concatenate([means, np.zeros((1, size))])
    nothing, doubt = np.zeros((CLASSES, 0)), Surprise(np.array([[-20.0, 0.0]]), np.array([[0.1, 0.5]]))
    guidance = Guidance("label", nothing, np.zeros(CLASSES), doubt, slope, np.zeros(size), means, np.array(seen))
    bands, ladder = lay_bands(used, width)[0], np.ones((2, 1, TAPS))
    return Formula(guidance, np.eye(size), bands, np.zeros((4, size)), ladder, 4, width, 0.0, False)


def test_mismatch_is_own_over_nearest_other_distance():
    formula = make_formula(seen=(True, True, False, True, True))
    z, labels = RNG.normal(size=(20, SIZE)), RNG.integers(0, CLASSES, 20)
    got = measure_mismatch(formula, z, np.eye(CLASSES)[labels], np)
    for i, label in enumerate(labels):
        for tap in range(TAPS):
            part = slice(tap * WIDTH, (tap + 1) * WIDTH)
            distance = ((z[i, part] - formula.guidance.means[:, part]) ** 2).sum(axis=1)
            others = [d for c, d in enumerate(distance) if c not in (label, 2)]
            assert got[i, tap] == pytest.approx(distance[label] / min(others))


@pytest.mark.parametrize("directions", [(24, LEADING, 24), (LEADING + 5, 20, 3)])
def test_a_tap_of_many_directions_is_also_judged_by_the_leading_ones_and_by_the_rest(directions):
    width = 24
    used = np.concatenate([np.arange(width) < count for count in directions])
    formula = make_formula(used=used, width=width)
    z, labels = RNG.normal(size=(15, len(used))) * used, RNG.integers(0, CLASSES, 15)
    parts = list_parts(used, width)
    assert parts == [(tap, p) for tap, n in enumerate(directions) for p in ((WHOLE, LEAD, REST) if n > LEADING else (WHOLE,))]
    got = measure_mismatch(formula, z, np.eye(CLASSES)[labels], np)
    assert got.shape == (15, len(parts))
    spans = {WHOLE: slice(0, width), LEAD: slice(0, LEADING), REST: slice(LEADING, width)}
    for column, (tap, part) in enumerate(parts):
        own = np.arange(tap * width, (tap + 1) * width)[spans[part]]
        for i, label in enumerate(labels):
            distance = ((z[i, own] - formula.guidance.means[:, own]) ** 2).sum(axis=1)
            assert got[i, column] == pytest.approx(distance[label] / np.delete(distance, label).min())


def test_strangeness_without_a_network_is_the_mean_square_of_each_band():
    used = np.ones(SIZE, bool)
    used[2 * WIDTH - 2 : 2 * WIDTH] = False
    formula = make_formula(used=used)
    logits, z = RNG.normal(size=(6, CLASSES)), RNG.normal(size=(6, SIZE)) * used
    distances = np.exp(measure(formula, logits, z, one_hot(logits), None, np))
    _, names = lay_bands(used, WIDTH)
    residual = z - formula.guidance.means[logits.argmax(axis=1)]
    assert names == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for column, (tap, band) in enumerate(names):
        low, high = (0, 4) if band == 0 else (4, 6 if tap == 1 else 8)
        want = (residual[:, tap * WIDTH + low : tap * WIDTH + high] ** 2).mean(axis=1)
        assert distances[:, column] == pytest.approx(want, rel=1e-6)
    assert distances.shape[1] == len(list_evidence(names, 1, list_parts(used, WIDTH)))


def test_surprise_is_minus_log_p_on_clean_images():
    clean = RNG.normal(size=(4000, 3)) * np.array([1.0, 0.1, 3.0])
    surprise = fit_surprise(clean)
    fresh = find_surprise(surprise, RNG.normal(size=(40000, 3)) * np.array([1.0, 0.1, 3.0]), np)
    for share in (0.5, 0.2, 0.1, 0.02):
        assert (fresh >= -np.log(share)).mean(axis=0) == pytest.approx(share, rel=0.2)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=30))
def test_surprise_grows_with_distance_and_is_zero_for_the_nearest(values):
    surprise = fit_surprise(np.random.default_rng(1).normal(size=(200, 1)))
    h = find_surprise(surprise, np.sort(values)[:, None], np)[:, 0]
    assert (np.diff(h) >= -1e-9).all()
    assert find_surprise(surprise, np.array([[-50.0]]), np)[0, 0] == 0.0


def test_a_constant_distance_gives_a_finite_surprise():
    surprise = fit_surprise(np.zeros((50, 2)))
    assert np.isfinite(find_surprise(surprise, np.array([[0.0, 5.0]]), np)).all()


@settings(max_examples=50)
@given(arrays(float, (4, 6), elements=st.floats(0, 20)), st.integers(0, 5), st.floats(0.1, 5))
def test_more_surprise_never_lowers_the_score(surprises, column, more):
    clean = np.random.default_rng(0).normal(size=(300, 6))
    rule = fit_rule([clean[:, :4], clean[:, 4:]], list_evidence([(0, band) for band in range(4)], 1, [(0, WHOLE), (1, WHOLE)]))
    assert rule.weights.sum() == pytest.approx(1)
    raised = surprises.copy()
    raised[:, column] += more
    assert (combine_surprises(rule, raised, np) >= combine_surprises(rule, surprises, np)).all()
    raised[:, column] += 40.0  # beyond what any clean tap shows, and the strangest of its tap
    assert (combine_surprises(rule, raised, np) > combine_surprises(rule, surprises, np)).all()


def test_two_thirds_of_what_doubt_explains_are_excused():
    rng = np.random.default_rng(0)
    doubt = rng.exponential(size=(40000, 1))
    bend = np.maximum(doubt - UNSURE, 0.0)
    log_mismatch = np.array([[0.5, -1.0]]) + doubt * [[0.8, 0.1]] - bend * [[0.6, 0.0]] + rng.normal(0, 0.3, (40000, 2))
    allowance = fit_allowance(log_mismatch, doubt)
    np.testing.assert_allclose(allowance.lines, [[0.5, -1.0], [0.8 * EXCUSED, 0.1 * EXCUSED], [-0.6 * EXCUSED, 0.0]], atol=0.02)
    left = allow(allowance, log_mismatch, doubt, np)
    sure, unsure = doubt[:, 0] < 0.1, doubt[:, 0] > 3.0
    assert abs(left[sure].mean(axis=0)).max() < 0.05
    explained = log_mismatch[unsure].mean(axis=0) - [0.5, -1.0]
    np.testing.assert_allclose(left[unsure].mean(axis=0), explained * (1 - EXCUSED), atol=0.05)
    # The same mismatch says more about an input that the target is sure of.
    assert (left[sure].mean(axis=0) < left[unsure].mean(axis=0)).all()
    same = allow(allowance, log_mismatch * 0 + 2.0, doubt, np)
    assert (same[sure].min(axis=0) > same[unsure].max(axis=0)).all()


def test_few_images_hold_the_slopes_back():
    doubt = np.array([[0.0], [1.0], [3.0]])
    few, many = (fit_allowance(np.tile(doubt, (n, 1)), np.tile(doubt, (n, 1))).lines[1, 0] for n in (1, 1000))
    assert 0 < few < 0.7 * many and many == pytest.approx(EXCUSED, rel=0.03)


def test_a_sure_input_is_not_excused():
    formula = make_formula()
    z, logits = RNG.normal(size=(2, SIZE)), np.zeros((2, CLASSES))
    logits[0, 1], logits[1, 1] = 30.0, 0.2
    z[1] = z[0]
    spared = replace(formula, allowance=Allowance(np.repeat([[0.0], [1.0], [-0.5]], TAPS, axis=1)))
    plain, got = (measure(f, logits, z, one_hot(logits), None, np)[:, -TAPS:] for f in (formula, spared))
    doubt = find_surprise(formula.guidance.doubt, np.array([[-20.0], [-0.2]]), np)
    np.testing.assert_allclose(got, plain - doubt + np.maximum(doubt - UNSURE, 0.0) / 2, atol=1e-9)
