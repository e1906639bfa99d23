import numpy as np
import pytest
import torch

from diffense.denoiser import CONSTANTS, build_denoiser, denoise, init_weights, read_weights
from diffense.graphs import open_session
from diffense.precond import scale

TAPS, WIDTH, GUIDE, ROWS, COUNT = 3, 8, 5, 4, 6
SHAPE = (ROWS, TAPS, WIDTH)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def weights():
    drawn = init_weights(TAPS, WIDTH, GUIDE, np.random.default_rng(1))
    return {k: v if k in CONSTANTS else v + 0.05 * RNG.standard_normal(v.shape).astype(np.float32) for k, v in drawn.items()}


@pytest.fixture(scope="module")
def operands():
    noised = RNG.normal(size=(COUNT, ROWS, TAPS * WIDTH)).astype(np.float32)
    sigma = np.exp(RNG.uniform(-2, 1, size=(COUNT, ROWS, TAPS))).astype(np.float32)
    return noised, sigma, np.eye(GUIDE, dtype=np.float32)[RNG.integers(0, GUIDE, COUNT)]


def run(weights, operands, label_guidance=1.0):
    return denoise(weights, *operands, shape=SHAPE, label_guidance=label_guidance, xp=np)


def test_untrained_it_is_the_denoiser_of_a_standard_gaussian(operands):
    restored = run(init_weights(TAPS, WIDTH, GUIDE, np.random.default_rng(2)), operands)
    c_skip = np.repeat(1 / (1 + operands[1] ** 2), WIDTH, axis=2)
    np.testing.assert_allclose(restored, c_skip * operands[0], rtol=1e-6)


@pytest.mark.parametrize("label_guidance", [1.0, 2.0])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 80.0])
def test_graph_torch_and_numpy_agree(weights, operands, sigma, label_guidance):
    noised, _, guide = operands
    level = np.full((COUNT, ROWS, TAPS), sigma, np.float32)
    want = run(weights, (noised, level, guide), label_guidance)
    tensors = {k: torch.from_numpy(v) for k, v in weights.items()}
    inputs = [torch.from_numpy(a) for a in (noised, level, guide)]
    by_torch = denoise(tensors, *inputs, shape=SHAPE, label_guidance=label_guidance, xp=torch).numpy()
    feed = {"noised": noised, "sigma": level, "guide": guide}
    by_graph = open_session(build_denoiser(weights, SHAPE, label_guidance)).run(None, feed)[0]
    np.testing.assert_allclose(by_torch, want, atol=2e-5 * max(1.0, np.abs(want).max()))
    np.testing.assert_allclose(by_graph, want, atol=2e-5 * max(1.0, np.abs(want).max()))


def test_a_tap_does_not_see_the_values_or_levels_of_others(weights, operands):
    before = run(weights, operands).reshape(COUNT, ROWS, TAPS, WIDTH)
    for changed in range(TAPS):
        noised, sigma = operands[0].copy(), operands[1].copy()
        noised[..., changed * WIDTH : (changed + 1) * WIDTH] += 0.5
        sigma[..., changed] *= 3
        after = run(weights, (noised, sigma, *operands[2:])).reshape(COUNT, ROWS, TAPS, WIDTH)
        assert [np.array_equal(before[:, :, tap], after[:, :, tap]) for tap in range(TAPS)] == [
            t != changed for t in range(TAPS)
        ]


def test_rows_and_images_are_restored_each_for_itself(weights, operands):
    noised, sigma, guide = operands
    whole = run(weights, operands)
    np.testing.assert_allclose(run(weights, [o[2:3] for o in operands]), whole[2:3], atol=1e-5)
    np.testing.assert_allclose(run(weights, (noised[:, ::-1], sigma[:, ::-1], guide)), whole[:, ::-1], atol=1e-5)


def test_next_to_no_noise_changes_next_to_nothing(weights, operands):
    noised, sigma, guide = operands
    np.testing.assert_allclose(run(weights, (noised, sigma * 0 + 1e-5, guide)), noised, atol=1e-3)


def test_label_guidance_is_linear_in_its_weight(weights, operands):
    noised, sigma, guide = operands
    none, label = run(weights, (noised, sigma, guide * 0)), run(weights, operands)
    assert np.abs(none - label).max() > 1e-3
    for w in (0.0, 2.0, -1.0):
        np.testing.assert_allclose(run(weights, operands, w), none + w * (label - none), atol=1e-5)


def test_weights_can_be_read_back_from_the_graph(weights):
    read = read_weights(build_denoiser(weights, SHAPE, 1.0))
    assert read.keys() == weights.keys()
    assert all(np.array_equal(read[k], weights[k]) for k in weights)


def test_scalings_keep_variances_at_one():
    for sigma in (0.02, 0.3, 1.0, 50.0):
        c_skip, c_out, c_in, c_noise = scale(np.array(sigma), np)
        assert c_in**2 * (1 + sigma**2) == pytest.approx(1)
        # The effective target (u - c_skip x) / c_out has unit variance for unit-variance data.
        assert ((1 - c_skip) ** 2 + c_skip**2 * sigma**2) / c_out**2 == pytest.approx(1)
        assert c_noise == pytest.approx(np.log(sigma) / 4)
