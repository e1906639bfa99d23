from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from diffense.denoiser import denoise, init_weights
from diffense.onnx_arrays import OnnxNamespace
from diffense.sampling import SIGMA_MIN, draw_noise, in_float32, lay_ladder, pull, sample
from latent_sets import draw_weights, run_graph

TAPS, WIDTH = 2, 3
SIZE = TAPS * WIDTH
NOTHING = np.zeros((1, 1))


def restore_gaussian(noised: Any, sigma: Any, guide: Any) -> Any:
    """The ideal denoiser of N(0, 1) data."""
    return noised / (np.repeat(sigma, noised.shape[-1] // sigma.shape[-1], axis=-1) ** 2 + 1.0)


def draw_samples(
    u: NDArray[np.float64], sigma: float, steps: int, weight: float, noise: NDArray[Any], step: Any = restore_gaussian
) -> NDArray[np.float64]:
    ladder = lay_ladder(np.array([[sigma]]), steps)
    return sample(step, u, NOTHING, noise=noise, ladder=ladder, draws=len(noise), width=u.shape[1], data_guidance=weight, xp=np)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 20.0])
def test_many_steps_follow_the_flow_of_a_standard_gaussian(sigma: float) -> None:
    u, noise = np.array([[0.7, -1.2, 0.1, 3.0]]), draw_noise(1, 8, 4, seed=0)
    start = u[:, None] + sigma * noise
    # x(s) = x(s0) sqrt((1 + s^2) / (1 + s0^2)) solves dx/ds = (x - D(x, s)) / s; the last step restores from SIGMA_MIN.
    last = np.sqrt((1 + SIGMA_MIN**2) / (1 + sigma**2)) / (1 + SIGMA_MIN**2)
    errors = [np.abs(draw_samples(u, sigma, steps, 0.0, noise) - start * last).max() for steps in (50, 200, 800)]
    assert errors[-1] < 4e-3 * np.abs(start * last).max()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("tau", "sigma"), [(0.5, 5.0), (1.0, 1.0), (2.0, 30.0)])
def test_data_guidance_follows_the_flow_of_the_posterior(tau: float, sigma: float) -> None:
    u, noise = np.array([[0.7, -1.2, 0.1, 3.0]]), draw_noise(1, 8, 4, seed=0)
    mean, variance = (u / (1 + tau**2))[:, None], tau**2 / (1 + tau**2)
    start = u[:, None] + sigma * noise
    expected = mean + (start - mean) * np.sqrt(variance / (variance + sigma**2))
    np.testing.assert_allclose(draw_samples(u, sigma, 3000, 1 / tau**2, noise), expected, atol=6e-3, rtol=2e-3)


def test_samples_from_high_noise_are_draws_of_the_posterior() -> None:
    u, tau = np.array([[1.5], [-4.0]]), 0.7
    samples = draw_samples(u, 80.0, 400, 1 / tau**2, draw_noise(1, 4000, 1, seed=1))[:, :, 0]
    for row, seen in zip(samples, u[:, 0], strict=True):
        posterior = stats.norm(seen / (1 + tau**2), np.sqrt(tau**2 / (1 + tau**2)))
        assert row.mean() == pytest.approx(posterior.mean(), abs=0.03)
        assert row.std() == pytest.approx(posterior.std(), rel=0.05)
        assert stats.kstest(row, posterior.cdf).statistic < 0.04


@settings(max_examples=50)
@given(st.floats(0.05, 20), st.floats(0.05, 20), st.floats(-5, 5), st.floats(-5, 5))
def test_one_step_is_the_posterior_mean(sigma: float, tau: float, u: float, n: float) -> None:
    found = draw_samples(np.array([[u]]), sigma, 1, 1 / tau**2, np.array([[n], [-n]]))[0, :, 0]
    precision = 1 + 1 / sigma**2 + 1 / tau**2  # prior, noised value, seen value
    expected = [((u + sigma * s) / sigma**2 + u / tau**2) / precision for s in (n, -n)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_no_weight_is_no_pull_and_much_weight_the_inspected_value() -> None:
    restored, u = np.array([1.0, -2.0]), np.array([3.0, 5.0])
    assert np.array_equal(pull(restored, u, np.array([0.3, 9.0]), 0.0), restored)
    np.testing.assert_allclose(pull(restored, u, np.array([0.3, 9.0]), 1e9), u, rtol=1e-6)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_odd_moments_of_the_bank_vanish_in_every_level(levels: int, pairs: int, size: int, seed: int) -> None:
    bank = draw_noise(levels, 2 * pairs, size, seed)
    assert bank.shape == (levels * 2 * pairs, size) and bank.dtype == np.float32
    by_level = bank.reshape(levels, 2 * pairs, size).astype(np.float64)
    for power in (1, 3, 5):
        np.testing.assert_allclose((by_level**power).sum(axis=1), 0, atol=1e-9)
    assert np.array_equal(bank, draw_noise(levels, 2 * pairs, size, seed))
    assert not np.array_equal(bank, draw_noise(levels, 2 * pairs, size, seed + 1))
    assert len(np.unique(np.abs(bank))) > bank.size * 0.49  # nothing is repeated but the mirror image


def test_the_bank_is_standard_normal() -> None:
    assert stats.kstest(draw_noise(2, 40, 500, seed=3)[:20].ravel(), "norm").pvalue > 0.01


@given(st.lists(st.floats(0.005, 30), min_size=2, max_size=2), st.integers(1, 12))
def test_ladders_fall_from_the_level_of_each_tap_to_zero(sigmas: list[float], steps: int) -> None:
    ladder = lay_ladder(np.array([sigmas]), steps)
    assert ladder.shape == (steps + 1, 1, 2)
    np.testing.assert_allclose(ladder[0, 0], sigmas)
    assert not ladder[-1].any() and (ladder[:-1] > 0).all()
    assert (np.diff(ladder, axis=0) <= 1e-12).all()
    if steps > 1:
        np.testing.assert_allclose(ladder[-2], min(SIGMA_MIN, *sigmas))
    if steps > 2:  # EDM's schedule: evenly spaced in the seventh root
        roots = ladder[:-1] ** (1 / 7)
        np.testing.assert_allclose(np.diff(roots, 2, axis=0), 0, atol=1e-9)


SIGMAS = np.array([[0.3, 0.8], [2.0, 1.0]])
CASES = [(1, 1.0, 0.0), (1, 2.0, 0.5), (3, 1.0, 0.0), (4, 0.5, 2.0)]


@pytest.mark.parametrize(("steps", "label_guidance", "data_guidance"), CASES)
def test_numpy_torch_and_graph_give_the_same_samples(steps: int, label_guidance: float, data_guidance: float) -> None:
    rng = np.random.default_rng(0)
    u = rng.normal(size=(5, SIZE)).astype(np.float32)
    guide = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]]
    weights, noise, ladder = draw_weights(TAPS, WIDTH, 4), draw_noise(2, 4, SIZE, 0), lay_ladder(SIGMAS, steps)
    setting = {"noise": noise, "ladder": ladder, "draws": 4, "width": WIDTH, "data_guidance": data_guidance}
    operands = (u, guide)
    shape = (len(noise), TAPS, WIDTH)

    def run(xp: Any, named: Any, arrays: Any) -> Any:
        step = partial(denoise, named, shape=shape, label_guidance=label_guidance, xp=xp)
        return sample(step, *arrays, **setting, xp=xp)

    expected = run(np, {k: v.astype(np.float64) for k, v in weights.items()}, [a.astype(np.float64) for a in operands])
    assert np.abs(expected - u[:, None]).max() > 0.1
    from_torch = run(torch, {k: torch.from_numpy(v) for k, v in weights.items()}, [torch.from_numpy(a) for a in operands])
    xp = OnnxNamespace()
    inputs = [xp.input(name, ["batch", width]) for name, width in (("u", SIZE), ("guide", 4))]
    recorded = run(xp, {k: xp.weight(k, v) for k, v in weights.items()}, inputs)
    model = xp.build(inputs, {"out": (recorded, ["batch", len(noise), SIZE])})
    from_graph = run_graph(model, u=u, guide=guide)
    assert expected.shape == from_torch.shape == from_graph.shape == (5, 8, SIZE)
    np.testing.assert_allclose(from_graph, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(from_torch.numpy(), expected, atol=1e-4, rtol=1e-4)


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    u, guide = rng.normal(size=(6, SIZE)), np.eye(6)[:, :4]
    noise, ladder = draw_noise(2, 4, SIZE, 0), lay_ladder(SIGMAS, 2)
    step = in_float32(partial(denoise, draw_weights(TAPS, WIDTH, 4), shape=(8, TAPS, WIDTH), label_guidance=1.0, xp=np))

    def run(rows: list[int]) -> NDArray[np.float64]:
        operands = (u[rows], guide[rows])
        return sample(step, *operands, noise=noise, ladder=ladder, draws=4, width=WIDTH, data_guidance=0.3, xp=np)

    whole = run(list(range(6)))
    np.testing.assert_allclose(run([4, 1]), whole[[4, 1]], atol=1e-6)
    np.testing.assert_allclose(run([5]), whole[[5]], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_tap_is_noised_at_its_own_level(steps: int) -> None:
    weights = init_weights(TAPS, WIDTH, 1, np.random.default_rng(0))
    noise = draw_noise(1, 2, SIZE, 0)
    u = np.random.default_rng(1).normal(size=(3, SIZE))

    def run(*sigmas: float) -> NDArray[np.float64]:
        step = partial(denoise, weights, shape=(2, TAPS, WIDTH), label_guidance=1.0, xp=np)
        ladder = lay_ladder(np.array([sigmas]), steps)
        guide = np.zeros((3, 1))
        return sample(step, u, guide, noise=noise, ladder=ladder, draws=2, width=WIDTH, data_guidance=0, xp=np)

    both, first, second = run(0.2, 3.0), run(0.2, 0.2), run(3.0, 3.0)
    np.testing.assert_allclose(both[..., :WIDTH], first[..., :WIDTH], atol=1e-6)
    np.testing.assert_allclose(both[..., WIDTH:], second[..., WIDTH:], atol=1e-6)
    assert np.abs(first - second).min(axis=(0, 1)).max() > 0.01
