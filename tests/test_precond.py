import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffense.onnx_arrays import OnnxNamespace
from diffense.precond import scale
from latent_sets import run_graph

SIGMAS = st.floats(1e-3, 1e3)


@given(SIGMAS)
def test_the_skip_is_the_best_linear_guess_and_leaves_the_network_a_target_of_unit_variance(sigma: float) -> None:
    c_skip, c_out, c_in, c_noise = scale(np.float64(sigma), np)
    covariance = np.array([[1.0, 1.0], [1.0, 1.0 + sigma**2]])  # of (u, x = u + sigma n)
    assert c_skip == pytest.approx(covariance[0, 1] / covariance[1, 1])
    rest = np.array([1.0, -c_skip]) / c_out
    assert rest @ covariance @ rest == pytest.approx(1.0, rel=1e-6)
    assert c_in**2 * covariance[1, 1] == pytest.approx(1.0)
    assert np.exp(4.0 * c_noise) == pytest.approx(sigma)


def test_without_noise_the_input_is_kept_and_with_much_noise_forgotten() -> None:
    kept, unsure, _, _ = scale(np.float32(1e-3), np)
    assert kept == pytest.approx(1, abs=1e-5) and unsure == pytest.approx(1e-3, rel=1e-4)
    kept, unsure, _, _ = scale(np.float32(1e3), np)
    assert kept == pytest.approx(0, abs=1e-5) and unsure == pytest.approx(1, rel=1e-4)


def test_numpy_torch_and_graph_agree() -> None:
    sigmas = np.geomspace(1e-3, 1e3, 25).astype(np.float32)[:, None]
    exact = scale(sigmas.astype(np.float64), np)
    for i in range(4):
        xp = OnnxNamespace()
        sigma = xp.input("sigma", ["batch", 1])
        graph = run_graph(xp.build([sigma], {"out": (scale(sigma, xp)[i], ["batch", 1])}), sigma=sigmas)
        np.testing.assert_allclose(graph, exact[i], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scale(torch.from_numpy(sigmas), torch)[i].numpy(), exact[i], rtol=1e-5, atol=1e-6)
