"""Evidence, and the score that is made of it, against closed forms and what they must not depend on."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffense.crossfit import cross_fit, measure_reference
from diffense.denoiser import denoise, init_weights
from diffense.guidance import one_hot
from diffense.rule import combine, combine_surprises, find_largest, fit_rule, group_evidence
from diffense.sampling import draw_noise, in_float32, lay_ladder
from diffense.scoring import (
    BAND_EDGES,
    WHOLE,
    Formula,
    lay_bands,
    list_evidence,
    measure,
    measure_mismatch,
    measure_strangeness,
)
from diffense.surprise import QUANTILES, find_surprise, fit_surprise
from latent_sets import draw_rows, draw_weights, make_set

TAPS, WIDTH, CLASSES = 3, 6, 4
SIZE = TAPS * WIDTH
BANDS, NAMES = lay_bands(np.ones(SIZE, bool), WIDTH)
CLEAN = np.random.default_rng(5).gamma(3.0, size=(500, 3)) ** np.array([1.0, 0.3, 2.0])


def make_formula(rows: int = 200, seed: int = 0, steps: int = 1, sigmas: Any = None, data_guidance: float = 0.0) -> Formula:
    clean = make_set(*draw_rows(rows, CLASSES, TAPS, WIDTH, seed), WIDTH)
    guidance, chain = clean.fit_linear(np.ones(rows, bool))
    levels = np.array(sigmas or [[0.5] * TAPS], float)
    noise = draw_noise(len(levels), 4, SIZE, 0).astype(np.float64)
    ladder = lay_ladder(levels, steps)
    return Formula(guidance, chain.transform, BANDS, noise, ladder, 4, WIDTH, data_guidance, False)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.02, 50), st.sampled_from([1, 2, 5]), st.sampled_from([0.0, 0.7]), st.integers(0, 99))
def test_the_untrained_network_orders_inputs_as_the_closed_form_chain(
    sigma: float, steps: int, weight: float, seed: int
) -> None:
    formula = make_formula(steps=steps, sigmas=[[sigma] * TAPS], data_guidance=weight)
    start = {k: v.astype(np.float64) for k, v in init_weights(TAPS, WIDTH, CLASSES, np.random.default_rng(seed)).items()}
    restore = partial(denoise, start, shape=(4, TAPS, WIDTH), label_guidance=1.0, xp=np)

    def step(noised: Any, noise_level: Any, guide: Any) -> Any:
        return restore(noised, noise_level.astype(np.float64), guide)

    residual, guide = np.random.default_rng(seed).normal(0, 2, (20, SIZE)), np.eye(CLASSES)[np.arange(20) % CLASSES]
    chain = measure_strangeness(formula, residual, guide, None, np)
    np.testing.assert_allclose(chain, (residual @ formula.transform) ** 2 @ formula.bands)
    sampled = measure_strangeness(formula, residual, guide, step, np)
    # Antithetic draws cancel the mixed term: |D(u + sigma n) - u|^2 = slope |u|^2 + offset, both of the noise level alone.
    for band in range(chain.shape[1]):
        slope, offset = np.polyfit(chain[:, band], sampled[:, band], 1)
        assert slope > 0
        np.testing.assert_allclose(sampled[:, band], slope * chain[:, band] + offset, rtol=1e-5, atol=1e-9)
        if steps == 1 and weight == 0.0:
            assert slope == pytest.approx((sigma**2 / (1 + sigma**2)) ** 2, rel=1e-4)


def test_strangeness_is_the_squared_distance_to_the_mean_of_the_draws() -> None:
    sigmas = [[0.3, 0.5, 2.0], [1.0, 1.0, 1.0]]
    formula, weights = make_formula(sigmas=sigmas), draw_weights(TAPS, WIDTH, CLASSES)
    step = partial(denoise, weights, shape=(8, TAPS, WIDTH), label_guidance=1.0, xp=np)
    residual, guide = np.random.default_rng(0).normal(size=(3, SIZE)), np.eye(CLASSES)[:3]
    found = measure_strangeness(formula, residual, guide, in_float32(step), np)
    alone = partial(denoise, weights, shape=(1, TAPS, WIDTH), label_guidance=1.0, xp=np)
    for image in range(3):
        context = guide[image : image + 1]
        u = residual[image] @ formula.transform
        for level, sigma in enumerate(np.array(sigmas)):
            noised = u + formula.noise[4 * level : 4 * level + 4] * np.repeat(sigma, WIDTH)
            samples = np.array([alone(row[None, None], sigma[None, None], context)[0, 0] for row in noised])
            errors = (samples.mean(axis=0) - u) ** 2
            for column, (tap, band) in enumerate(NAMES):
                low, high = (min(edge, WIDTH) + tap * WIDTH for edge in BAND_EDGES[band : band + 2])
                assert found[image, level * len(NAMES) + column] == pytest.approx(errors[low:high].mean(), rel=1e-4)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any))
def test_bands_average_what_is_used_of_each_tap(usable: list[int]) -> None:
    used = np.concatenate([np.arange(70) < n for n in usable])
    bands, names = lay_bands(used, 70)
    np.testing.assert_allclose(bands.sum(axis=0), 1)
    assert ((bands > 0).sum(axis=1) == used).all()  # every used entry in one band, padding in none
    assert names == sorted(set(names))
    for column, (tap, band) in zip(bands.T, names, strict=True):
        rows = np.flatnonzero(column)
        assert (rows // 70 == tap).all() and np.ptp(rows) == len(rows) - 1
        assert rows[0] - tap * 70 == BAND_EDGES[band] and len(np.unique(column[rows])) == 1


def test_evidence_is_named_in_the_order_of_the_columns() -> None:
    evidence = list_evidence([(0, 0), (0, 1), (1, 0)], 2, [(0, WHOLE), (1, WHOLE)])
    assert [(e.kind, e.level, e.tap, e.band) for e in evidence] == [
        ("strangeness", 0, 0, 0),
        ("strangeness", 0, 0, 1),
        ("strangeness", 0, 1, 0),
        ("strangeness", 1, 0, 0),
        ("strangeness", 1, 0, 1),
        ("strangeness", 1, 1, 0),
        ("mismatch", -1, 0, -1),
        ("mismatch", -1, 1, -1),
    ]
    groups, weights = group_evidence(evidence)
    wanted = np.array([[1, 0, 0, 0]] * 2 + [[0, 1, 0, 0]] + [[1, 0, 0, 0]] * 2 + [[0, 1, 0, 0]])
    np.testing.assert_allclose(groups[:6], wanted)
    np.testing.assert_allclose(groups[6:], [[0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(weights, [1 / 6, 1 / 3, 1 / 6, 1 / 3])  # the deeper tap counts twice, the kinds alike


@pytest.mark.parametrize("unseen", [(), (2,), (0, 3), (0, 1, 2, 3)])
def test_only_classes_that_were_seen_are_rivals(unseen: tuple[int, ...]) -> None:
    formula = make_formula()
    formula.guidance.seen[list(unseen)] = False
    rng = np.random.default_rng(0)
    latents, labels = rng.normal(0, 2, (30, SIZE)), rng.integers(0, CLASSES, 30)
    found = measure_mismatch(formula, latents, np.eye(CLASSES)[labels], np)
    means = formula.guidance.means.reshape(CLASSES, TAPS, WIDTH)
    for i, label in enumerate(labels):
        for tap in range(TAPS):
            distances = np.sum((latents[i].reshape(TAPS, WIDTH)[tap] - means[:, tap]) ** 2, axis=1)
            others = [d for c, d in enumerate(distances) if c != label and c not in unseen]
            # Without any known rival nothing speaks against the label.
            expected = pytest.approx(distances[label] / min(others), rel=1e-6) if others else pytest.approx(0, abs=1e-6)
            assert found[i, tap] == expected


def test_an_input_at_a_rivals_mean_has_a_large_and_at_its_own_mean_a_small_mismatch() -> None:
    formula = make_formula()
    own, rival = measure_mismatch(formula, formula.guidance.means[[0, 1]], np.eye(CLASSES)[[0, 0]], np)
    assert (own < 1e-9).all() and (rival > 1e3).all() and np.isfinite(rival).all()


def test_surprise_has_its_knots_at_clean_quantiles() -> None:
    fitted = fit_surprise(np.log(CLEAN))
    np.testing.assert_allclose(fitted.knots, np.quantile(np.log(CLEAN), QUANTILES, axis=0).T, atol=1e-9)
    heights = -np.log(1 - np.array(QUANTILES))[:, None].repeat(3, axis=1)
    np.testing.assert_allclose(find_surprise(fitted, fitted.knots.T, np), heights, atol=1e-9)


@given(st.integers(1, 40), st.floats(-5, 5))
def test_surprise_of_clean_distances_that_are_all_alike_is_finite(rows: int, value: float) -> None:
    fitted = fit_surprise(np.full((rows, 2), value))
    h = find_surprise(fitted, np.array([[value - 1.0] * 2, [value] * 2, [value + 1.0] * 2]), np)
    assert np.isfinite(h).all() and not h[:2].any() and (h[2] > 2).all()


@given(st.lists(st.floats(0, 20), min_size=8, max_size=8))
def test_the_score_is_the_weighted_mean_of_what_the_largest_piece_of_each_tap_says(values: list[float]) -> None:
    evidence = list_evidence([(0, 0), (0, 1), (1, 0)], 2, [(0, WHOLE), (1, WHOLE)])
    clean = np.random.default_rng(0).normal(size=(300, 8))
    rule = fit_rule([clean[:, :6], clean[:200, 6:]], evidence)
    score = combine_surprises(rule, np.array([values]), np)[0]
    largest = [np.array(values)[columns].max() for columns in ([0, 1, 3, 4], [2, 5], [6], [7])]
    taps = find_surprise(rule.taps, np.array([largest]), np)[0]
    assert score == pytest.approx(np.average(taps, weights=[1, 2, 1, 2]))


def test_clean_taps_are_as_surprising_as_their_rank_says() -> None:
    evidence = list_evidence([(tap, band) for tap in range(2) for band in range(3)], 1, [(0, WHOLE), (1, WHOLE)])
    clean, fresh = (np.random.default_rng(seed).gamma(2.0, size=(2000, 8)) for seed in (0, 1))
    rule = fit_rule([clean[:, :6], clean[:, 6:]], evidence)
    taps = find_surprise(rule.taps, find_largest(find_surprise(rule.pieces, fresh, np), rule.groups, np), np)
    np.testing.assert_allclose((taps >= -np.log(0.1)).mean(axis=0), 0.1, atol=0.03)


def test_being_less_strange_than_usual_costs_nothing() -> None:
    rule = fit_rule([np.log(CLEAN)], list_evidence([], 0, [(0, WHOLE), (1, WHOLE), (2, WHOLE)]))
    usual = rule.pieces.knots[:, 5].copy()
    low = np.array([rule.pieces.knots[0, 0], *usual[1:]])
    near, nearer, typical = (combine(rule, x[None], np)[0] for x in (low, low - [50, 0, 0], usual))
    assert near == nearer < typical


def test_surprises_of_fresh_clean_latents_are_as_those_of_the_reference() -> None:
    latents, logits = draw_rows(1500, CLASSES, TAPS, WIDTH, seed=3)
    clean = make_set(latents[:400], logits[:400], WIDTH)
    whole = clean.fit_linear(np.ones(400, bool))
    formula = replace(make_formula(), guidance=whole[0], transform=whole[1].transform)
    crossed = cross_fit(clean, whole[0], np.random.default_rng(0))
    found = measure_reference(clean, crossed, formula, None, np.ones(400, bool))
    reference = np.concatenate([found.strange, found.mismatch], axis=1)
    fresh = measure(formula, logits[400:], latents[400:], one_hot(logits[400:]), None, np)
    exceeded = np.mean(find_surprise(fit_surprise(reference), fresh, np) >= -np.log(0.1), axis=0)
    np.testing.assert_allclose(exceeded, 0.1, atol=0.06)  # four standard errors of 400 and 1,100 rows
    assert exceeded.mean() == pytest.approx(0.1, abs=0.02)
