import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from sklearn.covariance import ledoit_wolf

from diffense.chain import assign_folds, fit_chain, shrink_covariance
from diffense.guidance import fit_guidance, split_mean
from latent_sets import draw_rows

TAPS, WIDTH = 3, 4
ALL = np.ones(TAPS * WIDTH, bool)


def draw_residual(rows: int, seed: int = 0) -> NDArray[np.float64]:
    latents, logits = draw_rows(rows, 3, TAPS, WIDTH, seed)
    return split_mean(fit_guidance(latents, logits, "label", False), latents, logits, False)[1]


@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_covariance_is_ledoit_and_wolfs(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(rows, columns)) @ rng.normal(size=(columns, columns))
    expected, _ = ledoit_wolf(data, assume_centered=True)
    np.testing.assert_allclose(shrink_covariance(data), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_the_covariance_of_nothing_but_zeros_is_zero() -> None:
    assert np.array_equal(shrink_covariance(np.zeros((5, 3))), np.zeros((3, 3)))


def test_rows_that_repeat_each_other_shrink_as_if_they_stood_there_once():
    data = np.random.default_rng(2).normal(size=(30, 12))
    repeated = np.tile(data, (7, 1))
    np.testing.assert_allclose(shrink_covariance(repeated, independent=30), shrink_covariance(data), rtol=1e-12)
    assert not np.allclose(shrink_covariance(repeated), shrink_covariance(data))
    assert np.array_equal(shrink_covariance(data, independent=60), shrink_covariance(data))


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 5.0])
def test_the_chain_is_the_conditional_gaussian_of_the_precision_matrix(sigma: float) -> None:
    residual = draw_residual(60)
    chain = fit_chain(residual, WIDTH, ALL, sigma)
    innovation = residual @ chain.transform
    covariance, _ = ledoit_wolf(residual, assume_centered=True)
    for tap in range(TAPS):
        o, k = np.arange(tap * WIDTH), np.arange(tap * WIDTH, (tap + 1) * WIDTH)
        seen = covariance[: k[-1] + 1, : k[-1] + 1].copy()
        seen[o, o] += sigma**2
        precision = np.linalg.inv(seen)
        spread = np.linalg.inv(precision[np.ix_(k, k)])
        guess = -spread @ precision[np.ix_(k, o)]
        error = residual[:, k] - residual[:, o] @ guess.T
        np.testing.assert_allclose(
            np.sum(innovation[:, k] ** 2, axis=1), np.einsum("ni,ij,nj->n", error, precision[np.ix_(k, k)], error), rtol=1e-8
        )
        # The symmetric root: of all that whiten, the one that leaves each entry closest to where it was.
        np.testing.assert_allclose(innovation[:, k] @ np.real(sqrtm(spread)), error, rtol=1e-6, atol=1e-8)


def test_a_tap_is_explained_by_shallower_ones_alone() -> None:
    chain = fit_chain(draw_residual(80), WIDTH, ALL, 0.3)
    taps = np.repeat(np.arange(TAPS), WIDTH)
    assert not chain.transform[taps[:, None] > taps].any()
    assert (np.abs(chain.transform[taps[:, None] <= taps]) > 0).all()


def test_innovations_of_unseen_clean_rows_are_white() -> None:
    chain = fit_chain(draw_residual(6000), WIDTH, ALL, 1e-3)
    innovation = draw_residual(6000, seed=1) @ chain.transform
    np.testing.assert_allclose(np.cov(innovation.T), np.eye(TAPS * WIDTH), atol=0.08)
    assert np.mean(innovation**2) == pytest.approx(1, abs=0.02)
    noisy = draw_residual(6000, seed=1) @ fit_chain(draw_residual(6000), WIDTH, ALL, 0.3).transform
    assert 0.9 < np.mean(noisy**2) <= 1.02  # the noise that is allowed for is not in clean rows


def test_an_orthogonal_map_within_a_tap_turns_its_innovation_and_no_other() -> None:
    residual = draw_residual(50)
    turn = np.eye(TAPS * WIDTH)
    turn[WIDTH : 2 * WIDTH, WIDTH : 2 * WIDTH] = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH)))[0]
    before, after = (r @ fit_chain(r, WIDTH, ALL, 0.3).transform for r in (residual, residual @ turn))
    np.testing.assert_allclose(after, before @ turn, atol=1e-8)


def test_padding_is_left_out_and_the_rest_is_as_without_it() -> None:
    residual = draw_residual(50)
    used = ALL.copy()
    used[[3, 7, 10, 11]] = False
    chain = fit_chain(residual * used, WIDTH, used, 0.3)
    assert not chain.transform[~used].any() and not chain.transform[:, ~used].any()
    covariance, _ = ledoit_wolf(residual[:, used], assume_centered=True)
    values = np.linalg.eigvalsh(covariance[:3, :3])
    np.testing.assert_allclose(np.linalg.svd(chain.transform[:3, :3])[1] ** -2, values, rtol=1e-9)


@pytest.mark.parametrize("tap", range(TAPS))
def test_a_tap_that_never_moves_gives_no_innovation(tap: int) -> None:
    used = ALL.copy()
    used[tap * WIDTH : (tap + 1) * WIDTH] = False
    chain = fit_chain(draw_residual(50) * used, WIDTH, used, 0.3)
    assert np.isfinite(chain.transform).all() and not chain.transform[:, ~used].any() and not chain.transform[~used].any()
    assert chain.transform[:, used].any(axis=0).all()


def test_folds_share_their_directions() -> None:
    residual = draw_residual(4000)
    whole = residual @ fit_chain(residual, WIDTH, ALL, 0.3).transform
    for half in (residual[::2], residual[1::2]):
        found = residual @ fit_chain(half, WIDTH, ALL, 0.3).transform
        np.testing.assert_allclose(np.mean(found * whole, axis=0), np.mean(found**2, axis=0), atol=0.08)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(2, 7), st.integers(0, 99))
def test_folds_are_even_within_each_group_and_over_all(groups: list[int], folds: int, seed: int) -> None:
    assigned = assign_folds(np.array(groups), folds, np.random.default_rng(seed))
    for group in {*groups, None}:
        rows = assigned if group is None else assigned[np.array(groups) == group]
        counts = np.bincount(rows, minlength=folds)
        assert counts.sum() == len(rows) and counts.max() - counts.min() <= 1


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=80), st.integers(0, 99))
def test_rows_of_one_group_share_their_fold(members: list[tuple[int, int]], seed: int) -> None:
    labels, groups = (np.array(column) for column in zip(*members, strict=True))
    assigned = assign_folds(labels, 3, np.random.default_rng(seed), groups)
    folds = [set(assigned[groups == group]) for group in set(groups)]
    assert all(len(found) == 1 for found in folds)
    counts = np.bincount([found.pop() for found in folds], minlength=3)
    assert counts.max() - counts.min() <= 1
    alone = assign_folds(labels, 3, np.random.default_rng(seed), np.arange(len(labels)))
    assert np.array_equal(alone, assign_folds(labels, 3, np.random.default_rng(seed)))


def test_folds_are_shuffled_by_the_generator() -> None:
    groups = np.arange(400) % 4
    first, again, other = (assign_folds(groups, 5, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    # Neither blocks nor strides: neighbours of a group share their fold as often as chance has it.
    assert 0.1 < np.mean(first[groups == 0][1:] == first[groups == 0][:-1]) < 0.32
